"""`pipeline`: builds and publishes a router from a corpus and outcomes. Start with `pipeline_job`.

`gathered_feedback` copies what a gateway's callers reported, `publish_gate` decides whether a new router may replace
the published one, `rounds` repeats it all.
"""
