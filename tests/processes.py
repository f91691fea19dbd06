"""Commands as a user runs them: processes of their own, stopped with Ctrl-C as a terminal does it, the whole group at
once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def start(*arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.Popen[str]:
    """`python ARGUMENTS` at the head of a process group of its own, its output kept."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As a terminal starts it: what runs in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Until `is_so()`; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"not in time; it said: {process.communicate()}")
        time.sleep(0.05)


def ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def end(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """The exit status, stdout and stderr. Fails where it does not end."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def has_child(process: subprocess.Popen[str], name: str) -> bool:
    """Whether one of the process's descendants has `name` in its command line."""
    return bool(children(process, name))


def children(process: subprocess.Popen[str], name: str) -> list[int]:
    """The ids of the process's descendants that have `name` in their command lines: those of its session, for Ray's
    workers have groups of their own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == process.pid and name in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
