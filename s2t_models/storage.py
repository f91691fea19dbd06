"""Files and folders by path or URI: on this machine's file systems, or in an object store (s3://, gs://).

A place on a file system is a `pathlib.Path`, one in an object store an `ObjectPath`, which has the part of pathlib's
interface that is needed here. What is written appears as a whole or not at all in both: by renaming there, because an
object appears when it is complete here. Object stores are reached through pyarrow, which is imported only for them.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2t_models.errors import UserError, one_line

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

SCHEMES = ("s3", "gs")
#: The file of a folder in an object store that holds the sha256 of each of its files, by name; of none while they are
#: being written.
DIGESTS = "digests.json"
#: Files of a folder that go up or come down at once.
TRANSFERS = 8
_CHUNK = 8 * 1024**2
_CONNECT_S, _REQUEST_S = 5, 60


class StorageError(UserError):
    """A place that cannot be read or written; the message is one line."""


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or a folder of objects, by its URI. A folder is there as long as something is in it. Methods are
    those of `pathlib.Path`; they raise StorageError where the store cannot be reached or refuses, and FileNotFoundError
    as a path does."""

    uri: str

    def __post_init__(self) -> None:
        scheme, _, key = self.uri.partition("://")
        object.__setattr__(self, "uri", f"{scheme}://{key.strip('/')}")

    def __str__(self) -> str:
        return self.uri

    def __fspath__(self) -> str:
        raise StorageError(f"{self}: is in an object store; give a folder on this machine here")

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.uri}/{name}")

    @property
    def key(self) -> str:
        """Bucket and name, as pyarrow's file systems take them."""
        return self.uri.partition("://")[2]

    @property
    def file_system(self) -> FileSystem:
        scheme = self.uri.partition("://")[0]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        with self._said():
            return _file_system(scheme, self.key.partition("/")[0], endpoint if scheme == "s3" else None)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.uri.rpartition("/")[0]) if "/" in self.key else self

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def resolve(self) -> ObjectPath:
        return self

    def info(self) -> FileInfo:
        """Its kind, size in bytes and time of writing by the store's clock."""
        with self._said():
            return self.file_system.get_file_info(self.key)

    def exists(self) -> bool:
        return self.info().type.name != "NotFound"

    def is_file(self) -> bool:
        return self.info().type.name == "File"

    def is_dir(self) -> bool:
        return self.info().type.name == "Directory"

    def files(self, recursive: bool = True) -> dict[str, FileInfo]:
        """What is below it, by name relative to it and in the order of names; nothing where there is nothing."""
        from pyarrow.fs import FileSelector

        with self._said():
            found = self.file_system.get_file_info(FileSelector(self.key, recursive=recursive, allow_not_found=True))
        names = {info.path.removeprefix(f"{self.key}/"): info for info in found}
        return {name: names[name] for name in sorted(names) if names[name].type.name == "File" or not recursive}

    def iterdir(self) -> Iterator[ObjectPath]:
        """What is in it, in the order of names."""
        # pyarrow leaves folders out of a listing of GCS that is not recursive.
        names = self.files(recursive=self.uri.startswith("gs:"))
        return (self / name for name in dict.fromkeys(name.partition("/")[0] for name in names))

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Those of its own files whose name fits the pattern."""
        names = self.files(recursive=False)
        return (self / name for name in names if fnmatch.fnmatchcase(name, pattern))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder comes with its first file."""

    def read_bytes(self) -> bytes:
        with self._said(), self.file_system.open_input_stream(self.key) as stream:
            return stream.read()

    @contextmanager
    def open_file(self) -> Iterator[NativeFile]:
        """It as Arrow reads parts of it."""
        with self._said(), self.file_system.open_input_file(self.key) as file:
            yield file

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        with self._said(), self.file_system.open_output_stream(self.key) as stream:
            stream.write(content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._said():
                self.file_system.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def upload(self, source: Path) -> str:
        """Write a file of this machine to it; returns its sha256."""
        digest = hashlib.sha256()
        with self._said(), source.open("rb") as file:
            stream = self.file_system.open_output_stream(self.key)
            try:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    stream.write(chunk)
                stream.close()
            except BaseException:
                stream.close()  # which makes an object of what was written so far
                self.unlink(missing_ok=True)
                raise
        return digest.hexdigest()

    def download(self, target: Path) -> str:
        """Write it to a file of this machine, whole or not at all; returns its sha256."""
        digest = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as part, self._said(), self.file_system.open_input_stream(self.key) as stream:
            file = part.open("wb")
            with file:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
        return digest.hexdigest()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What the store says, in one line that names the place."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self)) from None
        except (OSError, ValueError) as error:
            raise StorageError(f"{self}: {_reason(error)}") from None


#: A file or folder, wherever it lies.
Location = Path | ObjectPath


def location(place: str | os.PathLike[str] | ObjectPath) -> Location:
    """The place that a path or a URI names. Raises StorageError for a URI of another kind than SCHEMES."""
    if isinstance(place, ObjectPath):
        return place
    scheme, separator, key = str(place).partition("://")
    if not separator:
        return Path(place)
    if scheme not in SCHEMES or not key.strip("/"):
        raise StorageError(
            f"{place}: neither a path nor a URI such as {' or '.join(f'{s}://BUCKET/...' for s in SCHEMES)}"
        )
    return ObjectPath(str(place))


def is_uri(place: str) -> bool:
    """Whether it names something in an object store."""
    return place.partition("://")[0] in SCHEMES and "://" in place


def remove(place: Location) -> None:
    """A file, or a folder with all that is in it, if it is there."""
    if isinstance(place, Path):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    elif place.is_dir():
        with place._said():
            if place.uri.startswith("gs:"):  # pyarrow finds no folder there that was not made as one
                place.file_system.delete_dir_contents(place.key, missing_dir_ok=True)
            else:
                place.file_system.delete_dir(place.key)
    else:
        place.unlink(missing_ok=True)


@contextmanager
def whole(place: str | Location, mark: str | None = None) -> Iterator[Path]:
    """A path of this machine to write a file or a folder at. It takes the place of `place` when the block ends without
    an exception, so that `place` is never half of anything; what an interrupted block left behind is removed first.

    A folder in an object store is replaced file by file: the file `mark`, by which readers know what it is, goes first
    and comes last, and `DIGESTS` beside it holds the sha256 of the others."""
    place = location(place)
    if isinstance(place, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="s2t-") as folder:
            part = Path(folder) / place.name
            yield part
            if part.is_dir():
                _publish(part, place, mark)
            else:
                place.upload(part)
        return
    part = place.with_name(place.name + ".part")
    remove(part)
    yield part
    if place.is_dir():
        shutil.rmtree(place)
    part.replace(place)


def write_text(place: Location, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(place) as part:
        part.write_text(text)


def write_json(place: Location, content: dict[str, Any]) -> None:
    write_text(place, json.dumps(content, indent=2) + "\n")


@contextmanager
def written_to(folder: Location) -> Iterator[Path]:
    """A folder of this machine whose files are in `folder` when the block ends: that folder itself, or one whose files
    are then uploaded beside what is there."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="s2t-") as temporary:
        yield Path(temporary)
        _upload(_below(Path(temporary)), folder)


@contextmanager
def copied(place: Location) -> Iterator[Path]:
    """A file or folder on this machine while the block runs: itself, or a copy."""
    if isinstance(place, Path):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="s2t-") as temporary:
        here = Path(temporary) / place.name
        if place.is_file():
            place.download(here)
        for name in place.files():
            (place / name).download(here / name)
        yield here


def _publish(part: Path, place: ObjectPath, mark: str | None) -> None:
    files = _below(part)
    if mark is not None:
        (place / mark).unlink(missing_ok=True)
    (place / DIGESTS).write_text("{}\n")  # from now on it is known as a folder that was not finished
    for name in place.files():
        if name != DIGESTS:
            (place / name).unlink()
    last = files.pop(mark, None) if mark else None
    digests = _upload(files, place)
    (place / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
    if last is not None:
        (place / str(mark)).upload(last)


def _below(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _upload(files: dict[str, Path], place: ObjectPath) -> dict[str, str]:
    with ThreadPoolExecutor(TRANSFERS) as pool:
        digests = pool.map(lambda name: (place / name).upload(files[name]), files)
        return dict(zip(files, digests, strict=True))


@lru_cache(maxsize=64)
def _file_system(scheme: str, bucket: str, endpoint: str | None) -> FileSystem:
    from pyarrow import fs

    if endpoint:
        return fs.S3FileSystem(endpoint_override=endpoint, connect_timeout=_CONNECT_S, request_timeout=_REQUEST_S)
    if scheme == "s3":
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or fs.resolve_s3_region(bucket)
        return fs.S3FileSystem(region=region, connect_timeout=_CONNECT_S, request_timeout=_REQUEST_S)
    emulated = "CLOUD_STORAGE_EMULATOR_ENDPOINT" in os.environ  # which has no credentials
    return fs.GcsFileSystem(anonymous=emulated, retry_time_limit=timedelta(seconds=_REQUEST_S))


def _reason(error: Exception) -> str:
    """What went wrong, of an error of pyarrow's, which says where and how at length."""
    text = one_line(error, 1000)
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        return "the store cannot be reached; see that its address (AWS_ENDPOINT_URL_S3 for S3) is right and it answers"
    if "NO_SUCH_BUCKET" in text:
        return "there is no such bucket; make it, or choose another"
    if any(word in text for word in ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")):
        return "the store refuses these credentials (AWS_ACCESS_KEY_ID and so on, which every node needs)"
    return text.partition(" Details: ")[0][:300]
