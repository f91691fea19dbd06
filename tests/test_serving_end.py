"""How `s2t serve` waits, says what loads, and ends: with Serve's answers made up, in processes that get real
signals."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import ctrl_c, end, start, wait_until
from ray.serve.exceptions import RayServeException

from serving import lifecycle

SCRIPT = """
import sys, time
from pathlib import Path
from s2t_models.commands import run_command
from serving.lifecycle import until_stopped

class Application:
    def drain(self, seconds):
        Path("draining").touch()
        while not Path("answered").exists():
            time.sleep(0.01)
        print("drained", flush=True)

def work():
    try:
        Path("serving").touch()
        until_stopped(Application(), 30)
    finally:
        print("tidied", flush=True)

sys.exit(run_command("serve", work, resumes=False))
"""


def served(folder: Path) -> Any:
    (folder / "job.py").write_text(SCRIPT)
    process = start("job.py", cwd=folder)
    wait_until((folder / "serving").exists, process)
    return process


def test_after_ctrl_c_what_is_in_flight_is_waited_for(tmp_path: Path):
    process = served(tmp_path)
    ctrl_c(process)
    wait_until((tmp_path / "draining").exists, process)
    (tmp_path / "answered").touch()
    assert end(process) == (130, "drained\n", "serve: stopped\n")


def test_a_supervisor_gets_the_same_and_a_status_of_0(tmp_path: Path):
    process = served(tmp_path)
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "draining").exists, process)
    (tmp_path / "answered").touch()
    assert end(process) == (0, "drained\ntidied\n", "")


@pytest.mark.parametrize(
    ("second", "status", "said"), [(signal.SIGINT, 130, "serve: stopped\n"), (signal.SIGTERM, 143, "")]
)
def test_a_second_signal_ends_at_once(second: int, status: int, said: str, tmp_path: Path):
    process = served(tmp_path)
    ctrl_c(process)
    wait_until((tmp_path / "draining").exists, process)
    process.send_signal(second)
    ended, out, err = end(process)
    assert (ended, err) == (status, said)
    assert "drained" not in out


class Serve:
    """What Serve says of the application "s2t": its deployments' states, and its gateways' counts."""

    def __init__(self) -> None:
        self.states: dict[str, str] | None = None
        self.deployed = 1.0
        self.counts: list[list[int]] = []
        self.asked: list[str] = []
        self.looked = threading.Event()

    def status(self) -> Any:
        self.looked.set()
        if self.states is None:
            raise RayServeException("not there yet")
        deployments = {
            name: SimpleNamespace(status=SimpleNamespace(value=state)) for name, state in self.states.items()
        }
        found = SimpleNamespace(deployments=deployments, last_deployed_time_s=self.deployed)
        return SimpleNamespace(applications={"s2t": found})

    def get_deployment_handle(self, deployment: str, name: str) -> Any:
        assert (deployment, name) == ("gateway", "s2t")
        return SimpleNamespace(is_initialized=True, broadcast=self._broadcast)

    def _broadcast(self, method: str) -> Any:
        self.asked.append(method)
        answers: list[Any] = self.counts.pop(0) if method == "in_flight" else [None]
        return SimpleNamespace(results=lambda **_: answers)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    serve = Serve()
    monkeypatch.setattr(lifecycle, "serve", serve)
    for wait in ("_LOOKS_EVERY_S", "_COUNTS_EVERY_S", "_FLUSH_S"):
        monkeypatch.setattr(lifecycle, wait, 0.001)
    return serve


def test_each_change_while_engines_load_is_a_line(serve: Serve, capsys: pytest.CaptureFixture[str]):
    stages: list[dict[str, str] | None] = [
        None,
        {},
        {"slm": "UPDATING", "teacher": "UPDATING", "gateway": "HEALTHY"},
        {"slm": "HEALTHY", "teacher": "UPDATING", "gateway": "HEALTHY"},
        {"slm": "HEALTHY", "teacher": "HEALTHY", "gateway": "HEALTHY"},
    ]
    with lifecycle.Loading("benchmark", "s2t"):
        for serve.states in stages:
            for _ in range(3):  # a look that had begun before may still see the stage before
                serve.looked.clear()
                assert serve.looked.wait(30)
    said = [line.rpartition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["benchmark: loading slm, teacher; up: gateway", "benchmark: loading teacher; up: slm, gateway"]


def test_a_long_silence_is_broken(serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lifecycle, "SAYS_EVERY_S", 0.0)
    serve.states = {"slm": "UPDATING"}
    with lifecycle.Loading("serve", "s2t"):
        for _ in range(4):
            serve.looked.clear()
            assert serve.looked.wait(30)
    assert len(capsys.readouterr().err.splitlines()) >= 2


def test_draining_ends_when_nothing_is_in_flight(serve: Serve, capsys: pytest.CaptureFixture[str]):
    serve.states, serve.counts = {}, [[3, 4], [0, 4], [0, 0]]
    lifecycle.Deployed("s2t").drain(30)
    assert serve.asked == ["drain", "in_flight", "in_flight", "in_flight"]
    assert capsys.readouterr().err == "serve: ending; 7 in flight have 30 s (Ctrl-C again ends at once)\n"


def test_draining_has_an_end(serve: Serve, capsys: pytest.CaptureFixture[str]):
    serve.states, serve.counts = {}, [[2]] * 100
    lifecycle.Deployed("s2t").drain(0)
    assert capsys.readouterr().err == "serve: 2 in flight were not ready in time\n"


def test_what_someone_else_has_deployed_since_is_left_alone(serve: Serve):
    serve.states = {}
    application = lifecycle.Deployed("s2t")
    serve.deployed = 2.0
    application.drain(30)
    application.delete()
    assert not serve.asked
