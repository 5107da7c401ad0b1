"""A real Prometheus that watches a Ray on this machine, and what a panel or an alert asks of it."""

from __future__ import annotations

import re
import shutil

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")

_QUOTED = re.compile(r'"[^"]*"')
_NAME = re.compile(r"\b(?:ray_|up\b)\w*")


def metrics_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names. All that we watch are Ray's, or Prometheus' own `up`."""
    return set(_NAME.findall(_QUOTED.sub('""', expression)))
