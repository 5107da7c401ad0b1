"""`evaluate` and `compare`: score routers and baselines on held-out prompts, or on feedback from a log.

Start with `evaluate_job`; `log_job` is the variant for feedback, and `compare_job` compares routers.
"""
