"""Ray Data and Ray Train jobs over the core, and the `prefill-router` command.

A job is a `*_job.py` module, in the package of its subject. Start with `options.py`, which defines every command, and
`extract/extract_job.py`, the simplest distributed job.
"""
