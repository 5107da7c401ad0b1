"""`collect`: sends a corpus to the targets of a pool and grades their answers.

Start with `collect_job`, the driver. `prompt_selection` samples prompts, `collector` makes the calls, and
`grading` grades answers.
"""
