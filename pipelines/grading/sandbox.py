"""Running model-written code against its tests without trusting it.

`check` starts `sandbox_child`, which runs the program in namespaces of its own (user, pid, network, mounts), as nobody,
without capabilities or network, in a root that holds the interpreter read-only and an empty scratch folder in memory;
CPU, memory, processes, file size and wall time are limited. The tests run in another process that calls the program's
function and gets plain data back, so a program passes only by returning right values: how it exits, prints or rewrites
its own interpreter makes no difference.

Where the system allows no isolation, `check` refuses with `SandboxUnavailable` unless told `allow_unsandboxed=True`. It
does not guard against flaws of the kernel, nor against programs that know the benchmark by heart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from s2t_models.errors import UserError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_START_SECONDS = 60.0  # a busy machine may take long to start three processes; the program's own time starts later
_GRACE_SECONDS = 2.0


class SandboxUnavailable(UserError):
    """The system allows no isolation, and running without it was not asked for."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. `cpu_seconds` holds for each of its processes, `wall_seconds` for the whole check."""

    cpu_seconds: int = 3
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 29
    processes: int = 8
    file_bytes: int = 4 << 20
    scratch_bytes: int = 16 << 20


@dataclass(frozen=True)
class Outcome:
    """`passed`, `failed` (a test failed, or the program broke or ended) or `timeout`, and why."""

    status: Literal["passed", "failed", "timeout"]
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def _run(job: dict[str, str], limits: Limits, isolate: bool, folder: str) -> dict[str, str]:
    command = [
        sys.executable,
        "-I",
        "-S",
        "-B",
        str(_CHILD),
        json.dumps(asdict(limits)),
        "isolated" if isolate else "bare",
    ]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=folder,
        start_new_session=True,
    ) as keeper:
        try:
            output, _ = keeper.communicate(
                json.dumps(job).encode() + b"\n", timeout=_START_SECONDS + limits.wall_seconds + _GRACE_SECONDS
            )
        except subprocess.TimeoutExpired:
            keeper.kill()
            return {"status": "timeout", "detail": "the tests did not finish in time"}
    if not output:
        return {"status": "failed", "detail": "the checker ended without a verdict"}
    verdict: dict[str, str] = json.loads(output)
    return verdict


@cache
def unavailable() -> str | None:
    """Why this system allows no isolation, or None where it does. Tried once a process."""
    job = {
        "code": "def f():\n    return 1\n",
        "entry_point": "f",
        "preamble": "",
        "test": "def check(f):\n    assert f() == 1\n",
    }
    verdict = _run(job, Limits(), isolate=True, folder="/")
    return None if verdict["status"] == "passed" else verdict["detail"]


def refusal(reason: str) -> SandboxUnavailable:
    """What a user is told where there is no isolation for `reason`."""
    return SandboxUnavailable(
        f"model-written code cannot be isolated on this system ({reason}); allow user namespaces, or pass "
        f"--allow-unsandboxed "
        "(allow_unsandboxed=True) to run it with your own rights"
    )


def check(
    code: str,
    test: str,
    entry_point: str,
    preamble: str = "",
    limits: Limits | None = None,
    allow_unsandboxed: bool = False,
) -> Outcome:
    """Whether the function `entry_point` that `code` defines passes `test`.

    Args:
        code: the program under test; untrusted.
        test: trusted code that defines `check(candidate)`, which raises where the candidate is wrong.
        preamble: trusted code that the tests may need, such as the helpers in a problem's prompt.
        allow_unsandboxed: run without isolation where the system allows none.

    Raises:
        SandboxUnavailable: no isolation here, and `allow_unsandboxed` is not set.
    """
    limits = limits or Limits()
    job = {"code": code, "entry_point": entry_point, "preamble": preamble, "test": test}
    reason = unavailable()
    if reason is None:
        verdict = _run(job, limits, isolate=True, folder="/")
    elif allow_unsandboxed:
        with tempfile.TemporaryDirectory(prefix="s2t-unsandboxed-") as folder:
            verdict = _run(job, limits, isolate=False, folder=folder)
    else:
        raise refusal(reason)
    if verdict["status"] == "unavailable":
        raise SandboxUnavailable(f"isolation worked before and now fails: {verdict['detail']}")
    return Outcome(verdict["status"], verdict["detail"])  # type: ignore[arg-type]
