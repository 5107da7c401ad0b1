"""`collect`: sends a corpus to the targets of a pool and grades their answers.

Start with `collect_job.py`, the driver. `prompt_selection.py` samples prompts, `collector.py` makes the calls, and
`grading.py` grades answers.
"""
