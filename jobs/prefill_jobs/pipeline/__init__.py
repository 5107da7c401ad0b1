"""`pipeline`: builds and publishes a router from a corpus and outcomes. Start with `pipeline_job`.

`publish_gate` decides whether a new router may replace the published one.
"""
