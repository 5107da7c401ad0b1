"""Amounts of money as people read them, in one form wherever they are shown."""


def usd(value: float) -> str:
    """USD with three significant digits, and cents at least: $0.000123, $0.426, $1.00, $1,234.50."""
    value = value if abs(value) >= 1e-9 else 0.0  # a sum's rounding is no amount
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{'-' if value < 0.0 else ''}${abs(value):,.{max(2, 2 - exponent)}f}"
