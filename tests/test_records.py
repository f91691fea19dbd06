"""Records that are appended are there as a whole or not at all, on a disk that fills up too."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.benchmark.answer_log import read_answers
from pipelines.runtime.records import RecordLog


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_record_that_finds_no_room_leaves_the_log_as_it_was(small_disk: Path) -> None:
    log = RecordLog(small_disk)
    for number in range(40):
        log.append({"key": str(number), "text": "x" * 1500})
    with pytest.raises(OSError, match="No space left on device") as refused:
        log.append({"key": "40", "text": "x" * 9000})
    assert refused.value.errno == errno.ENOSPC
    assert list(read_answers(small_disk)) == [str(number) for number in range(40)]
    subprocess.run(["mount", "-o", "remount,size=128k", str(small_disk)], check=True)
    log.append({"key": "40"})
    assert len(read_answers(small_disk)) == 41
