"""Files and folders that are whole or not there, and one job at a time in a folder."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2t_models.errors import UserError


class FolderError(UserError):
    """A folder that a job cannot work in."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder at. It takes the place of `path` when the block ends without an exception, so
    that `path` is never half of anything; what an interrupted block left behind is removed first."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    _remove(part)
    yield part
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, making it where it is missing: two jobs in one folder would undo or repeat each other's work.
    Raises FolderError where it cannot be made or another process holds it. The lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise FolderError(f"{folder}: not a folder to write to: {error.strerror}; choose another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"{folder}: another job is at work there; wait for it or choose another --output"
            ) from None
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
