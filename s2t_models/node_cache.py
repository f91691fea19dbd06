"""What a node keeps of files that lie elsewhere, or take long to hash: each is fetched once and hashed once.

The folder is S2T_CACHE, by default ~/.cache/select-to-think. Nothing in it is ever needed: it may be deleted while no
job runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from s2t_models.storage import DIGESTS, TRANSFERS, Location, ObjectPath, StorageError, whole

#: Files below this size are hashed again each time, bytes.
LARGE = 16 * 1024**2
_SHA256 = re.compile("[0-9a-f]{64}")


def cache_folder() -> Path:
    return Path(os.environ.get("S2T_CACHE") or Path.home() / ".cache" / "select-to-think")


def fetched(place: Location, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """The folder `place` on this machine: itself, or a copy of those of its files whose names are `wanted`, fetched
    once a node. The copy is known by names, sizes and times of all its files, so a folder that is written anew is
    fetched anew. Raises StorageError where it cannot be had, or a file is not what its digest says."""
    if isinstance(place, Path):
        return place
    files = place.files()
    if not files:
        raise StorageError(f"{place}: no such folder")
    state = json.dumps([str(place), [(name, info.size, info.mtime_ns) for name, info in files.items()]])
    folder = cache_folder() / "fetched" / hashlib.sha256(state.encode()).hexdigest()[:32] / place.name
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / "lock"):
        missing = [name for name in files if wanted(name) and not (folder / name).is_file()]
        size = sum(files[name].size for name in missing)
        if size >= LARGE:
            print(f"fetching {place} ({size / 1e9:.2f} GB) to {folder}, once a node", file=sys.stderr, flush=True)
        _fetch(place, missing, folder)
    return folder


def recorded_digests(place: ObjectPath) -> dict[str, str]:
    """The sha256 of the files of a folder, by name, as they were recorded when it was written: in itself, or in the
    folder that it is part of. Nothing where it was put there by other means."""
    for folder, below in ((place, ""), (place.parent, f"{place.name}/")):
        if (folder / DIGESTS).is_file():
            found: Mapping[str, str] = json.loads((folder / DIGESTS).read_bytes())
            return {name.removeprefix(below): digest for name, digest in found.items() if name.startswith(below)}
    return {}


def sha256_of(path: Path) -> str:
    """sha256 of a file. That of a large one is computed once, and again where its size or time has changed; a file of
    the hub's cache has it for a name."""
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    stat = real.stat()
    if stat.st_size < LARGE:
        return _hash(real)
    state = {"path": str(real), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    record = cache_folder() / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(record.read_text())
        if {key: known[key] for key in state} == state:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not readable: it is written again
    digest = _hash(real)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole(record) as part:
            part.write_text(json.dumps({**state, "sha256": digest}))
    except OSError:
        pass  # no room, or no home: the next time hashes again
    return digest


def _fetch(place: ObjectPath, names: list[str], folder: Path) -> None:
    digests = recorded_digests(place) if names else {}

    def one(name: str) -> None:
        found = (place / name).download(folder / name)
        if digests.get(name, found) != found:
            (folder / name).unlink()
            raise StorageError(f"{place / name}: is not the file that was published there; publish it again")

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(one, names))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock of this machine; wait for it where another process has it. Raises StorageError where there are no
    locks."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise StorageError(
                f"{lock.parent}: its file system has no locks (flock: {error.strerror}); set S2T_CACHE to a folder of "
                "this machine"
            ) from None
        yield


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
