"""Evaluation of a router: on held-out prompts beside its baselines, and on a gateway's log of requests.

Start with `evaluate` in `contenders`. `learning_curve` extrapolates what more outcomes would bring, and `off_policy`
estimates the value of a policy from logged feedback.
"""
