"""`label`: decides for every line of a query log. Start with `label_job`, the driver.

`estimation` and `estimator` compute and keep a router's estimates of a corpus, which `collect` uses too.
"""
