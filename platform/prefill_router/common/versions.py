"""What a figure was made with, for whoever wants to make it again."""

from __future__ import annotations

import platform
from importlib.metadata import version

_PACKAGES = ("prefill-router", "torch", "transformers", "numpy", "scikit-learn")


def versions() -> str:
    """Python and the packages that figures depend on, in one line."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in _PACKAGES)])
