"""Evaluation of a router: on held-out prompts beside its baselines, and on a gateway's log of requests.

Start with `evaluate` in contenders.py. learning_curve.py extrapolates what more outcomes would bring, and off_policy.py
estimates the value of a policy from logged feedback.
"""
