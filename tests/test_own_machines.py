"""What docs/operations.md shows for machines of one's own, run as it stands for two raylets of this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faults.raylets import SETTINGS
from processes import REPOSITORY, free_port

from serving.proxy import ENVIRONMENT

SHOWS = (
    "import os, ray; ray.init(); "
    "print('nodes', sum(node['Alive'] for node in ray.nodes())); "
    f"print('missing', [name for name in {sorted(ENVIRONMENT)} if name not in os.environ])"
)


def blocks() -> list[str]:
    """The section's blocks: the token, the environment, what starts Ray, and a job."""
    section = (
        (REPOSITORY / "docs" / "operations.md").read_text().split("### Machines of your own\n")[1].split("\n### ")[0]
    )
    return [text.replace("\\\n", " ") for text in re.findall(r"```\n(.*?)```", section, re.DOTALL)]


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="own-", dir="/tmp"))  # sockets have short paths
    (made / "home").mkdir()
    yield made
    shutil.rmtree(made, ignore_errors=True)


def bash(folder: Path, script: str) -> subprocess.Popen[str]:
    """A shell as on one of the machines, at the head of a session of its own."""
    outside = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder / "home")}
    settings = {name: value for name, value in SETTINGS.items() if name != "RAY_AUTH_MODE"}
    return subprocess.Popen(
        ["bash", "-ec", script],
        cwd=REPOSITORY,
        env=outside | settings | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_session(process: subprocess.Popen[str]) -> None:
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    process.communicate()


def beside_others(start: str, folder: Path, port: int, **more: str) -> str:
    """The command on a machine that other raylets are on too: ports and a folder of its own. It stays in its shell."""
    ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    options = {name: str(free_port()) for name in ports} | {"object-store-memory": "100000000", "num-cpus": "1"}
    options |= {"temp-dir": str(folder), "node-ip-address": "127.0.0.1"} | more
    own = start.replace("6379", str(port)).replace("HEAD", "127.0.0.1").replace("8080", str(free_port()))
    return " ".join([own, "--block", *(f"--{name}={value}" for name, value in options.items())])


@pytest.mark.slow
def test_the_commands_for_machines_of_ones_own(folder: Path) -> None:
    token, environment, starts, job = blocks()
    first, other = starts.splitlines()
    # The tests' own environment is active already, and is not in the project's folder for all who run them.
    environment = environment.replace("source .venv/bin/activate\n", "")
    port, dashboard = free_port(), free_port()
    made = bash(folder, token)
    assert made.wait(120) == 0, made.communicate()
    assert (folder / "home" / ".ray" / "auth_token").is_file()
    on_the_head = {"dashboard-port": str(dashboard), "ray-client-server-port": str(free_port())}
    machines = []
    try:
        for command, name, more in ((first, "a", on_the_head), (other, "b", {})):
            (folder / name).mkdir()
            machines.append(bash(folder, environment + beside_others(command, folder / name, port, **more)))
            started = next((line for line in machines[-1].stdout or () if "Ray runtime started" in line), None)
            assert started, f"{command} ended"
        tunnel, submit = job.split("\n", 1)
        assert tunnel == "ssh -N -L 8265:127.0.0.1:8265 HEAD &"
        submit, _ = submit.replace("8265", str(dashboard)).split(" s2t ")
        submitted = bash(folder, f'{submit} python -c "{SHOWS}"')
        said, _ = submitted.communicate(timeout=240)
        assert submitted.returncode == 0, said
        assert "nodes 2\nmissing []\n" in said
        without = bash(folder, submit.replace("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled") + " true")
        refused, _ = without.communicate(timeout=120)
        assert without.returncode != 0
        assert "authentication" in refused.lower(), refused
    finally:
        for machine in reversed(machines):
            end_session(machine)
