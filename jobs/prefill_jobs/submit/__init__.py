"""`submit`: runs jobs on a Ray cluster through its Jobs API. Start with `submission.py`."""
