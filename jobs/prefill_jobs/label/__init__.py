"""`label`: decides for every line of a query log. Start with `label_job.py`, the driver.

`estimation.py` and `estimator.py` compute and keep a router's estimates of a corpus, which `collect` uses too.
"""
