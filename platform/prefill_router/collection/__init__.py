"""Collects targets' answers to train routers on, within rate limits and a budget, and pays for no answer twice.

`target_calls` defines a call and its worst-case cost, `target_client` makes one attempt, `shared_budget` bounds the
cost of all calls, and `journal` and `answers` persist the state of every call. Start with `target_calls`.
"""
