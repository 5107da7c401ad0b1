from __future__ import annotations

import math

import pytest

from prefill_jobs.cli import submit_commands


def test_only_a_silent_log_needs_a_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = submit_commands._Log("extract-1")
    log.write("extract: 16/300 prompts\n")
    assert capsys.readouterr().out == "extract: 16/300 prompts\n"
    monkeypatch.setattr(submit_commands, "_QUIET_S", math.inf)
    assert log.waiting() == ""
    monkeypatch.setattr(submit_commands, "_QUIET_S", 0.0)
    assert log.waiting().endswith("see submit status extract-1")
