"""State that outlives a call: conversations, spending, and calls that await feedback.

Start with `call_ledger`, which holds all of it for one process; `shared` runs it as one process for all replicas.
"""
