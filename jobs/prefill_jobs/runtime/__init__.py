"""Jobs on Ray: connecting, sizing actors, mapping items, reporting errors and progress. Start with `cluster.py`."""
