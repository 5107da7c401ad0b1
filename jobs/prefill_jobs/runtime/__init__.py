"""Jobs on Ray: `cluster` connects and sizes, `ray_tasks` maps items over it.

`local_ray` starts a private Ray, `ray_failures` turns errors into one line; `capacity`, `progress` and `job_metrics`
report. Start with `cluster`.
"""
