"""A small run of the benchmark of mixed calls."""

from __future__ import annotations

from pathlib import Path

from benchmarks import mixed_calls
from upstream import Fault


def test_mixed_calls_are_answered_as_their_upstream_said_and_billed_once(router: str, tmp_path: Path) -> None:
    faults = [fault for fault in Fault if fault not in (Fault.HANG, Fault.STALL, Fault.SLOW_CHUNKS)]  # to be quick
    for ends in mixed_calls.run(router, 40, 0.2, 0, tmp_path, faults).values():
        assert ends.answered + sum(ends.refused.values()) + ends.broken == ends.calls == ends.recorded == 40
        assert ends.answered > 20
        assert (ends.billed_twice, ends.differing) == (0, [])
        assert ends.longest_s < mixed_calls.PATIENCE_S
