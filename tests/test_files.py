"""Whole files and folders, and one job at a time in a folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from processes import end, start, wait_until

from s2t_models import node_cache
from s2t_models.locks import FolderError, locked
from s2t_models.storage import StorageError, whole


def test_a_file_that_is_interrupted_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted() -> None:
        with whole(path) as part:
            part.write_text("ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert path.read_text() == "old"
    with whole(path) as part:
        assert not part.exists(), "what was left behind is gone"
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for name in ("one", "two"):
        with whole(folder) as part:
            part.mkdir()
            (part / name).touch()
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [folder]


def test_two_files_that_differ_in_their_ending_do_not_meet(tmp_path: Path) -> None:
    with whole(tmp_path / "a.json") as one, whole(tmp_path / "a.csv") as other:
        one.write_text("json")
        other.write_text("csv")
    assert (tmp_path / "a.json").read_text() == "json"


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from s2t_models.locks import locked
with locked(pathlib.Path({str(tmp_path)!r}) / "x" / "y"):
    pathlib.Path({str(tmp_path)!r}, "held").touch()
    while not pathlib.Path({str(tmp_path)!r}, "enough").exists(): time.sleep(0.01)
"""
    process = start("-c", script)
    wait_until((tmp_path / "held").exists, process)
    with pytest.raises(FolderError, match="another job is at work there"), locked(tmp_path / "x" / "y"):
        pass
    (tmp_path / "enough").touch()
    assert end(process)[0] == 0
    with locked(tmp_path / "x" / "y"):
        pass


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="not a folder to write to"), locked(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre is without `-o flock`."""

    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refused)
    why = r"its file system has no locks \(flock: Function not implemented\)"
    with pytest.raises(FolderError, match=f"{tmp_path}: {why}; mount it with them, or choose another --output"):
        locked(tmp_path).__enter__()
    with pytest.raises(StorageError, match=f"{tmp_path}: {why}; set S2T_CACHE to a folder of this machine"):
        node_cache._alone(tmp_path / "lock").__enter__()
