"""`probe` and `train`: build a router from activations and outcomes. Start with `train_job.py`.

`probe_job.py` scores layers, `trunk_fit.py` fits the trunk on Ray Train, `extend_job.py` adds targets to a router.
"""
