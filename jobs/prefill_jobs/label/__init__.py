"""`label`: a query log in, a decision for every line out."""
