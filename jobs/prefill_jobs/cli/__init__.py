"""The `prefill-router` command line. Start with `command_line`; `commands` runs jobs and prints their results,
`flags` turns config models into flags."""
