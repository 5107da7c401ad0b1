"""Scratch folders: the next one removes those of killed processes. HAProxy's tests kill one."""

from __future__ import annotations

from pathlib import Path

from prefill_router.common.scratch import ScratchFolder, abandoned


def test_it_ends_with_its_block(tmp_path: Path) -> None:
    with ScratchFolder(parent=str(tmp_path)) as folder:
        (folder.path / "more").mkdir()
        assert list(tmp_path.iterdir()) == [folder.path]
        assert list(abandoned(parent=str(tmp_path))) == []
    assert list(tmp_path.iterdir()) == []


def test_only_abandoned_folders_of_its_prefix_are_removed(tmp_path: Path) -> None:
    for name in ("prefill-router-left", "other-left"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prefill-router.owner").touch()
    (tmp_path / "prefill-router-without-owner").mkdir()
    assert list(abandoned(parent=str(tmp_path))) == [tmp_path / "prefill-router-left"]
    with ScratchFolder(parent=str(tmp_path)) as first, ScratchFolder(parent=str(tmp_path)) as second:
        others = [tmp_path / "other-left", tmp_path / "prefill-router-without-owner"]
        assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path, *others])
