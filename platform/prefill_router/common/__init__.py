"""Base utilities that every other package may import: errors, strict models, column schemas, console output.

Start with `errors` (UserError), `validation` (StrictModel) and `schema` (column names and Arrow schemas).
"""
