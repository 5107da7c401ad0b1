"""`submit`: any job as one of a Ray cluster."""
