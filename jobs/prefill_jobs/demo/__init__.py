"""`demo`: runs every step end to end. Start with `demo_job`; `published_answers` and `simulation` are its data."""
