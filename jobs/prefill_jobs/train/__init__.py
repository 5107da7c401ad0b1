"""`probe` and `train`: build a router from activations and outcomes. Start with `train_job`.

`probe_job` scores layers, `trunk_fit` fits the trunk on Ray Train, `extend_job` adds targets to a router.
"""
