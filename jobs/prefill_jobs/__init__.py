"""Ray Data and Ray Train jobs over the core, and the `prefill-router` command.

A job is a `*`_job`` module, in the package of its subject. Start with `options`, which defines every command, and
`extract/extract_job`, the simplest distributed job.
"""

import prefill_router  # noqa: F401  before torch, for which it sets a variable
