"""`demo`: runs every step end to end. Start with `demo_job.py`; `simulation.py` generates its data."""
