"""The `prefill-router` command."""
