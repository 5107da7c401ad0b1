"""`clean` removes what jobs leave, and nothing that is in use."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from command import Command
from prefill_router.common.scratch import ScratchFolder


@pytest.fixture
def leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    monkeypatch.setenv("PREFILL_ROUTER_CACHE", str(cache))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("prefill_jobs.clean_job.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder in (cache / "unpacked", cache / "unpacking", temporary / "prefill-router-killed"):
        folder.mkdir(parents=True)
        (folder / "prefill-router.owner").write_bytes(b"x" * 500_000)
    (temporary / "prefill-router-1.log").write_text("Ray's messages")
    (temporary / "ray").mkdir()
    (temporary / "ray" / "raylet.out").write_bytes(b"x" * 200_000)
    return [cache / "unpacked", temporary / "prefill-router-killed", temporary / "prefill-router-1.log"]


def test_a_dry_run_lists_what_a_run_removes(command: Command, leftovers: list[Path]) -> None:
    with FileLock(f"{leftovers[0].parent}/unpacking.lock"):
        listed = command("clean", "--dry-run")
        assert all(path.exists() for path in leftovers)
        removed = command("clean")
    for path in leftovers:
        assert f"{path}: " in listed.out
        assert not path.exists()
    assert "would remove 1.0 MB" in listed.out
    assert removed.out == listed.out.replace("would remove", "removed")
    assert (leftovers[0].parent / "unpacking").is_dir()
    logs = leftovers[1].parent / "ray"
    assert removed.out.splitlines()[-1] == f"kept {logs}: 0.2 MB: Ray's logs: remove it when no Ray runs"
    assert logs.is_dir()


def test_what_lives_is_kept(command: Command, leftovers: list[Path]) -> None:
    with ScratchFolder() as folder:
        assert command("clean").status == 0
        assert folder.path.is_dir()
