"""`python -m prefill_jobs` runs `prefill-router`. Submitted jobs use it, as the script may not be on their path."""

from prefill_jobs.cli.command_line import main

main()
