"""Ray Data and Ray Train jobs over the core, and the `prefill-router` command."""
