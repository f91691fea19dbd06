"""How commands end: their statuses, the one line, the traceback in errors.log, and Ctrl-C."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from processes import ctrl_c, end, start, wait_until

from s2t_models.commands import LOG, run_command
from s2t_models.errors import NothingDone, UserError, one_line


def fails(error: BaseException, cause: BaseException | None = None):
    def work() -> None:
        raise error from cause

    return work


@pytest.mark.parametrize(
    ("work", "status", "line", "has_log"),
    [
        (lambda: None, 0, "", False),
        (lambda: 3, 3, "", False),
        (fails(UserError("x.yaml: no such file")), 2, "job: x.yaml: no such file", False),
        (fails(NothingDone("all 3 rows errored")), 1, "job: all 3 rows errored", False),
        (fails(UserError("an actor failed"), KeyError("gone")), 2, "job: an actor failed (traceback in ", True),
        (fails(ZeroDivisionError("a\nb")), 1, "job: unexpected ZeroDivisionError: a b (traceback in ", True),
    ],
)
def test_a_command_ends_with_a_status_and_a_line(
    work, status: int, line: str, has_log: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("job", work, tmp_path) == status
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == bool(line)
    assert (tmp_path / LOG).is_file() is has_log
    if has_log:
        assert f"{tmp_path / LOG}; S2T_DEBUG=1" in said


def test_ray_s_coloured_tracebacks_become_their_last_line() -> None:
    said = "\x1b[36mray::_train()\x1b[39m (pid=7, ip=192.0.2.2)\n  File x, line 3\nValueError: too few steps"
    assert one_line(said) == "ValueError: too few steps"


def test_a_full_disk_is_said_in_one_line_wherever_it_was_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = OSError(errno.ENOSPC, "No space left on device", "/data/out/a.arrow")
    remote = RuntimeError(
        "ray::write()\n  File x, line 3\nOSError: [Errno 28] No space left on device: '/data/out/a.arrow'\n"
    )
    for error, cause in ((here, None), (UserError("an actor failed"), here), (UserError("training failed"), remote)):
        assert run_command("job", fails(error, cause), tmp_path) == 2
        said = capsys.readouterr().err
        assert said.startswith("job: the disk is full (")
        assert "/data/out/a.arrow" in said
        assert said.endswith("make room, and the same command goes on from here\n")
        assert said.count("\n") == 1


def test_the_log_holds_the_traceback_and_what_it_came_from(tmp_path: Path) -> None:
    run_command("job", fails(UserError("an actor failed"), KeyError("gone")), tmp_path)
    run_command("job", fails(ValueError("\ud83d")), tmp_path)
    log = (tmp_path / LOG).read_text()
    assert "KeyError: 'gone'" in log
    assert "direct cause" in log
    assert "ValueError: \\ud83d" in log


def test_a_folder_that_is_not_there_leaves_the_log_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command("job", fails(ValueError("x")), tmp_path / "none") == 1
    assert (tmp_path / LOG).is_file()


@pytest.mark.parametrize("error", [UserError("x"), ValueError("x")])
def test_debugging_catches_nothing(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2T_DEBUG", "1")
    with pytest.raises(type(error)):
        run_command("job", fails(error), tmp_path)
    assert not (tmp_path / LOG).exists()


def test_an_error_in_one_line() -> None:
    assert one_line(ValueError(" a\n  b ")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("x" * 500) == "x" * 300
    remote = "ray::f()\n  File x\nTraceback (most recent call last):\n  File y\nKeyError: 'gone'\n"
    assert one_line(remote) == "KeyError: 'gone'"


SCRIPT = """
import sys, time, atexit
from pathlib import Path
from s2t_models import commands
commands.GRACE_S = {grace}

def work():
    try:
        print("ready", flush=True)
        Path("ready").touch()
        {body}
    finally:
        print("noise"); print("noise", file=sys.stderr)
        {tidying}

sys.exit(commands.run_command("job", work))
"""


def script(folder: Path, body: str = "time.sleep(100)", tidying: str = "pass", grace: float = 100) -> list[str]:
    (folder / "job.py").write_text(SCRIPT.format(body=body, tidying=tidying, grace=grace))
    return ["job.py"]


def stopped(folder: Path, presses: int = 1, **parts) -> tuple[int, str, str]:
    process = start(*script(folder, **parts), cwd=folder)
    for press in range(presses):
        wait_until((folder / ("tidying" if press else "ready")).exists, process)
        ctrl_c(process)
    return end(process)


LINE = "job: stopped; the same command goes on from here\n"


def test_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    assert stopped(tmp_path) == (130, "ready\n", LINE)


def test_tidying_up_after_ctrl_c_has_an_end(tmp_path: Path) -> None:
    assert stopped(tmp_path, tidying="time.sleep(1000)", grace=0.2) == (130, "ready\n", LINE)


@pytest.mark.parametrize("instead", ["raise ValueError('x')", "sys.exit(0)", "pass"])
def test_whatever_a_library_makes_of_the_interrupt(instead: str, tmp_path: Path) -> None:
    body = f"exec('try: time.sleep(1000)\\nexcept KeyboardInterrupt: {instead.replace(chr(39), chr(34))}')"
    assert stopped(tmp_path, body=body) == (130, "ready\n", LINE)


def test_ctrl_c_again_ends_at_once(tmp_path: Path) -> None:
    tidying = "Path('tidying').touch(); time.sleep(1000)"
    assert stopped(tmp_path, presses=2, tidying=tidying, grace=1000) == (130, "ready\n", LINE)


def test_a_library_that_swallows_the_interrupt_does_not_keep_the_command(tmp_path: Path) -> None:
    body = "exec('while True:\\n try: time.sleep(1000)\\n except BaseException: pass')"
    assert stopped(tmp_path, body=body, grace=0.2) == (130, "ready\n", LINE)


def test_ctrl_c_when_the_work_is_done_is_no_matter(tmp_path: Path) -> None:
    body = "atexit.register(lambda: (Path('tidying').touch(), time.sleep(1)))"
    process = start(*script(tmp_path, body=body), cwd=tmp_path)
    wait_until((tmp_path / "tidying").exists, process)
    ctrl_c(process)
    assert end(process) == (0, "ready\nnoise\n", "noise\n")
