"""State that outlives a call: conversations, spending, and calls that await feedback.

Start with `call_ledger`, which holds all of it for one process; `shared` makes it one for all replicas.
"""
