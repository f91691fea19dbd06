"""How every command ends: a status, and at most one line about what went wrong.

A command is `run_command("collect", work, output)`. What a user can put right is a `UserError`; anything else is a
fault of ours or of the machine, and its traceback is kept in `errors.log`. With S2T_DEBUG=1 nothing is caught, and
Ray's own logs are shown.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from s2t_models.errors import UserError, no_room, one_line
from s2t_models.storage import Location

LOG = "errors.log"
#: The exit status of what Ctrl-C stopped, by the shells' convention.
INTERRUPTED = 130
#: How long a command may tidy up after Ctrl-C.
GRACE_S = 5.0


def debugging() -> bool:
    """Whether S2T_DEBUG asks for tracebacks and Ray's logs."""
    return os.environ.get("S2T_DEBUG", "") not in ("", "0")


def run_command(name: str, work: Callable[[], int | None], output: Location | None = None, resumes: bool = True) -> int:
    """Run `work` and return the exit status: its own (0 for None), 1 for a fault, the error's for a `UserError`, 130
    for Ctrl-C.

    `output` is where the traceback of a fault is kept (the current folder where that is no folder of this machine);
    `resumes` says whether the same command goes on where it stopped."""
    if debugging():
        return work() or 0
    try:
        with _ctrl_c_stops(f"{name}: stopped" + ("; the same command goes on from here" if resumes else "")):
            return work() or 0
    except Exception as error:
        if line := no_room(error):
            again = "the same command goes on from here" if resumes else "start it again"
            print(f"{name}: the disk is full ({line}); make room, and {again}", file=sys.stderr)
            return UserError.status
        if isinstance(error, UserError):
            print(f"{name}: {error}{_kept(error, output) if error.__cause__ else ''}", file=sys.stderr)
            return error.status
        print(f"{name}: unexpected {type(error).__name__}: {one_line(error)}{_kept(error, output)}", file=sys.stderr)
        return 1


@contextmanager
def _ctrl_c_stops(line: str) -> Iterator[None]:
    """Ctrl-C prints `line`, silences the process and raises KeyboardInterrupt. The process ends GRACE_S later at the
    latest, and at once when Ctrl-C is pressed again: libraries that are stopped in the middle print tracebacks and may
    wait for long, and no job here needs more than a moment, since what counts is on the disk."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # someone else's thread, or SIGINT is ignored (a background job of a shell)
        return

    screen = os.dup(2)  # Ray's start closes stderr for a while
    newline = "\n" if os.isatty(screen) else ""

    def leave(*_: Any) -> NoReturn:
        os._exit(INTERRUPTED)

    def stop(*_: Any) -> NoReturn:
        signal.signal(signal.SIGINT, leave)
        # A terminal shows ^C and perhaps a line of progress; and print may be what was interrupted, so it is not used
        # here.
        os.write(screen, f"{newline}{line}\n".encode())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        timer = threading.Timer(GRACE_S, leave)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is leave:
            # A local cluster ends with this process, and takes less time about it than Ray's own exit.
            os._exit(INTERRUPTED)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(screen)
        # The work is done: Ctrl-C while Ray shuts down must not bring a traceback. Exit hooks run last come, first
        # served, so this one comes before Ray's.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _kept(error: BaseException, output: Location | None) -> str:
    """Append the traceback to errors.log; returns what the line says of it."""
    folder = output if isinstance(output, Path) and output.is_dir() else Path()
    path = folder / LOG
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n")
            file.writelines(traceback.format_exception(error))
            file.write("\n")
    except OSError:
        return " (S2T_DEBUG=1 shows the traceback)"
    return f" (traceback in {path}; S2T_DEBUG=1 shows it here)"
