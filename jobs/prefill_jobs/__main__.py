"""`python -m prefill_jobs` is `prefill-router`."""

from prefill_jobs.cli import main

main()
