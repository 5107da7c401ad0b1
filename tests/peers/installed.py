"""Programs of other gateways, which `make test-gateways` installs in an environment of their own."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = Path(os.environ.get("GATEWAYS", Path(__file__).parents[2] / ".venv" / "gateways"))


def program(name: str) -> str:
    path = ENVIRONMENT / "bin" / name
    assert path.exists(), f"{path} is missing: run make test-gateways"
    return str(path)
