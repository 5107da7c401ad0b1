"""The one error that a user can put right. Entry points print it as a line and exit with status 1."""


class UserError(ValueError):
    """Says which input is bad, its value, and the remedy: `pool.toml: target "x": output_price = -1, must be >= 0`."""
