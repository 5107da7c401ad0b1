"""`python -m prefill_jobs` is `prefill-router`; so is a submitted job, which first looks for its secrets."""

from prefill_jobs.cli import main

main()
