"""Formatting of amounts of money, the same in every report."""


def usd(value: float) -> str:
    """Formats USD with three significant digits and at least cents: $0.000123, $0.426, $1.00, $1,234.50."""
    value = value if abs(value) >= 1e-9 else 0.0  # rounding error of a sum
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{'-' if value < 0.0 else ''}${abs(value):,.{max(2, 2 - exponent)}f}"
