"""The `prefill-router` command line. Start with `command_line`; `flags` turns config models into flags."""
