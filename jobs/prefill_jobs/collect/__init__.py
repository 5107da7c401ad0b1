"""`collect`: sends a corpus to the targets of a pool and grades their answers.

Start with `collect_job.py`, the driver. `collector.py` makes the calls, `grading.py` grades answers.
"""
