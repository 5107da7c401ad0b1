"""`evaluate` and `compare`: routers and their rivals on held-out prompts, or on a log."""
