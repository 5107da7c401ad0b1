"""`demo`: runs every step end to end. Start with `demo_job`; `simulation` generates its data."""
