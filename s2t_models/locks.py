"""One job at a time in a folder, wherever the folder lies.

On a file system the lock is the kernel's (`flock`) and ends with the process. In an object store it is a lease. Whoever
wants the folder writes an entry of its own and then lists them all; if there is another live one, it takes its own away
and is refused. Stores list what was written before (S3 and GCS do), so of two that come at once the later one sees the
earlier; both may be refused, never none. An entry is renewed while its job runs, and counts no more when it has not
been for LEASE_S by the store's own clock, or when its process was on this machine and has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2t_models.storage import Location, ObjectPath, StorageError

#: The lock file of a folder, and the folder of leases.
LOCK = ".lock"
#: An entry is renewed every RENEW_S, and counts for LEASE_S.
LEASE_S, RENEW_S = 60.0, 15.0
#: How often two that came in the same moment step back and try again.
TRIES = 3
_SAME_MOMENT_S = 2.0
#: The exit status of a job whose folder was taken.
LOST = 3


class FolderError(StorageError):
    """A folder that a job cannot work in."""


@contextmanager
def locked(folder: Location) -> Iterator[None]:
    """Hold `folder`, making it where it is missing: two jobs in one folder would undo or repeat each other's work.
    Raises FolderError where it cannot be made, another process holds it or its file system has no locks, and
    StorageError where the store cannot be reached."""
    with _leased(folder) if isinstance(folder, ObjectPath) else _flocked(folder):
        yield


@contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise FolderError(f"{folder}: not a folder to write to: {error.strerror}; choose another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"{folder}: another job is at work there; wait for it or choose another --output"
            ) from None
        except OSError as error:  # Lustre without `-o flock`, some NFS
            raise FolderError(
                f"{folder}: its file system has no locks (flock: {error.strerror}); mount it with them, or choose "
                "another --output"
            ) from None
        yield


@contextmanager
def _leased(folder: ObjectPath) -> Iterator[None]:
    entry = folder / LOCK / f"{uuid.uuid4().hex}.json"
    me = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
    for left in reversed(range(TRIES)):
        entry.write_text(json.dumps(me))
        others = _live(entry, me)
        if not others:
            break
        entry.unlink(missing_ok=True)
        holder, age = others[0]
        if not left or age > _SAME_MOMENT_S:
            raise FolderError(
                f"{folder}: another job is at work there; wait for it or choose another --output (process "
                f"{holder.get('pid', '?')} on {holder.get('host', '?')}; if it was killed, the folder is free "
                f"{max(LEASE_S - age, 0):.0f} s from now)"
            )
        time.sleep(random.uniform(0.1, 1.0))
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(entry, me, done), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        with contextlib.suppress(StorageError):  # it runs out
            entry.unlink(missing_ok=True)


def _live(entry: ObjectPath, me: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The other holders and the seconds since each was last seen; entries that no longer count are removed."""
    entries = entry.parent.files()
    now = entries[entry.name].mtime_ns
    live = []
    for name, info in entries.items():
        if name == entry.name:
            continue
        other, age = entry.with_name(name), (now - info.mtime_ns) / 1e9
        try:
            holder = json.loads(other.read_bytes())
        except FileNotFoundError:
            continue
        except (ValueError, StorageError):  # one that is being taken away as it is read, perhaps
            holder = {}
        if age > LEASE_S or _has_ended(holder, me):
            other.unlink(missing_ok=True)
        else:
            live.append((holder, age))
    return live


def _has_ended(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    if any(holder.get(key) != me[key] for key in ("host", "boot")):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError):
        return False
    return False


def _renew(entry: ObjectPath, me: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(RENEW_S):
        try:
            if not entry.is_file():
                print(
                    f"{entry.parent.parent}: this job did not reach the store for {LEASE_S:g} s, and another has taken "
                    "the folder",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(LOST)
                return
            entry.write_text(json.dumps(me))
        except (StorageError, FileNotFoundError):
            continue  # the next time may do


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
