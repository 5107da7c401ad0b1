"""Jobs on Ray: connecting and sizing (`cluster.py`), mapping items (`ray_tasks.py`), errors, progress and metrics."""
