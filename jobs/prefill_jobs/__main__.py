"""`python -m prefill_jobs` is `prefill-router`: what a submitted job runs, whose Python may have no scripts by it."""

from prefill_jobs.cli.command_line import main

main()
