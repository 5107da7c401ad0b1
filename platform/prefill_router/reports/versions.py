"""The versions that a report records, so that its figures can be reproduced."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("prefill-router", "torch", "transformers", "numpy", "scikit-learn")


def versions() -> str:
    """The versions of Python and of the packages that results depend on, in one line."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)])
