"""How every command ends: a status, and at most one line about what went wrong.

A command is `run_command("collect", work, output)`. What a user can put right is a `UserError`; anything else is a fault of ours or of
the machine, and its traceback is kept in `errors.log`. With S2T_DEBUG=1 nothing is caught, and Ray's own logs are shown.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from s2t_models.errors import UserError

LOG = "errors.log"


def debugging() -> bool:
    """Whether S2T_DEBUG asks for tracebacks and Ray's logs."""
    return os.environ.get("S2T_DEBUG", "") not in ("", "0")


def run_command(name: str, work: Callable[[], int | None], output: Path | None = None, resumes: bool = True) -> int:
    """Run `work` and return the exit status: its own (0 for None), 1 for a fault, 2 for a `UserError`, 130 for Ctrl-C.

    `output` is where the traceback of a fault is kept (the current folder where there is none); `resumes` says whether the same
    command goes on where it stopped."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        # Ctrl-C again, while processes are being ended, must not bring the traceback back.
        print(f"\n{name}: stopped" + ("; the same command goes on from here" if resumes else ""), file=sys.stderr)
        return 130
    except UserError as error:
        if debugging():
            raise
        print(f"{name}: {error}{_kept(error, output) if error.__cause__ else ''}", file=sys.stderr)
        return 2
    except Exception as error:
        if debugging():
            raise
        line = " ".join(str(error).split())[:300]
        print(f"{name}: unexpected {type(error).__name__}: {line}{_kept(error, output)}", file=sys.stderr)
        return 1


def _kept(error: BaseException, output: Path | None) -> str:
    """Append the traceback to errors.log; returns what the line says of it."""
    folder = output if output is not None and output.is_dir() else Path()
    path = folder / LOG
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n")
            file.writelines(traceback.format_exception(error))
            file.write("\n")
    except OSError:
        return " (S2T_DEBUG=1 shows the traceback)"
    return f" (traceback in {path}; S2T_DEBUG=1 shows it here)"
