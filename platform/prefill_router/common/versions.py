"""Package versions, recorded with every result so that it can be reproduced."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("prefill-router", "torch", "transformers", "numpy", "scikit-learn")


def versions() -> str:
    """Returns the versions of Python and of the packages that results depend on, as one line."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)])
