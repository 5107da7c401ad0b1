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


def test_an_encoder_that_is_being_unpacked_is_kept_with_its_parts(command: Command, leftovers: list[Path]) -> None:
    partial = leftovers[0].parent / "unpacking.partial"
    partial.mkdir()
    with FileLock(f"{leftovers[0].parent}/unpacking.lock"):
        assert command("clean").status == 0
        assert partial.is_dir()
    assert command("clean").status == 0
    assert not partial.exists()


def test_what_cannot_be_removed_is_said_and_the_rest_is_removed(
    command: Command, leftovers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary folder is shared with other users."""
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == leftovers[2]:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    cleaned = command("clean")
    assert (cleaned.status, cleaned.err) == (0, f"clean: {leftovers[2]}: Operation not permitted\n")
    assert [path.exists() for path in leftovers] == [False, False, True]
    assert str(leftovers[2]) not in cleaned.out
