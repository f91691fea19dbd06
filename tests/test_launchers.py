"""What starts Ray elsewhere than on Kubernetes (`ray up`, Slurm), the image, and the commands that are shown for them:
what reads them takes them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import known_command, ray_start
from processes import wait_until

from serving.proxy import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = REPOSITORY / "cluster"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SLURM = CLUSTER / "slurm.sh"


# Ray's cluster launcher.


def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())


def test_ray_up_reads_its_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher()))
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(launcher() | {"max_worker": 1}))


def test_ray_up_starts_ray_as_the_manifests_do():
    config = launcher()
    assert config["docker"]["image"] == f"s2t:{PROJECT['version']}"
    given = dict(
        option.removeprefix("-e ").split("=", 1) for option in config["docker"]["run_options"] if "=" in option
    )
    assert given["RAY_AUTH_MODE"] == "token"
    assert {key: given.get(key) for key in ENVIRONMENT} == ENVIRONMENT
    assert "~/.ray/auth_token" in config["file_mounts"], "where Ray looks for it"
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("ami-"), "the one that Ray takes is too old for H100s"
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        for words in map(shlex.split, command.split(";")):
            if words[:2] == ["ray", "start"]:
                ray_start().make_context("start", words[2:])


# Slurm.


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, with stubs of Slurm's commands and of the stage. `srun` writes its
    arguments, and what it sees of the token, to srun.json, and ends with 0, as Ray does in it: after the stage, or
    without where RAY_STARTS is 0. The stage ends with STAGE_ENDS; with "requeued" when the job is back in the queue,
    which Slurm ends it for."""
    bin_folder, venv = tmp_path / "bin", tmp_path / "venv"
    srun = (
        "import json, os, stat, subprocess, sys\n"
        "path = os.environ['RAY_AUTH_TOKEN_PATH']\n"
        "seen = {'words': sys.argv[1:], 'mode': stat.S_IMODE(os.stat(path).st_mode), 'token': open(path).read()}\n"
        "seen['environment'] = {key: os.environ[key] for key in os.environ if key.startswith('RAY_')}\n"
        "json.dump(seen, open('srun.json', 'w'))\n"
        "if os.environ['RAY_STARTS'] == '1':\n"
        "    subprocess.run(sys.argv[sys.argv.index('--') + 1:])\n"
    )
    scontrol = (
        '[[ "$*" == "show hostnames node[1-2]" ]] && printf "node1\\nnode2\\n"\n'
        '[[ "$*" == "requeue 42" ]] && touch requeued; true\n'
    )
    stage = (
        'printf "%s\\n" "$RAY_ADDRESS" "$@" > stage\n'
        '[[ $STAGE_ENDS == requeued ]] || exit "$STAGE_ENDS"\n'
        "for _ in {1..200}; do [[ -e requeued ]] && exit 143; sleep 0.1; done\n"
    )
    for name, text in (
        ("srun", f"#!{sys.executable}\n{srun}"),
        ("scontrol", f"#!/bin/bash\n{scontrol}"),
        ("s2t", f"#!/bin/bash\n{stage}"),
    ):
        bin_folder.mkdir(exist_ok=True)
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").touch()
    slurm = {"JOB_ID": "42", "JOB_NODELIST": "node[1-2]", "CPUS_PER_TASK": "96", "SUBMIT_DIR": str(tmp_path)}
    path = f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = {"PATH": path, "HOME": str(tmp_path), "S2T_VENV": str(venv), "RAY_STARTS": "1", "STAGE_ENDS": "7"}
    return given | {f"SLURM_{k}": v for k, v in slurm.items()}


def test_slurm_runs_a_stage_on_all_nodes(allocation, tmp_path):
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    stage = ["s2t", "collect", "--recipe", "embedded", "--output", "runs/a folder", "--set", "collect.prompts=10"]
    done = subprocess.run(
        ["bash", str(SLURM), *stage], env=allocation, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (7, "")
    seen = json.loads((tmp_path / "srun.json").read_text())
    words = seen["words"]
    start = words.index("symmetric-run")
    assert words[start - 1] == "ray"
    assert "--ntasks=2" in words[: start - 1]
    end = words.index("--")
    ray_arguments = curate_and_validate_ray_start_args(words[start + 1 : end])
    ray_start().make_context("start", list(ray_arguments))
    assert "--num-cpus" in ray_arguments
    asked = dict(zip(words[start + 1 : end : 2], words[start + 2 : end : 2], strict=True))
    assert (asked["--address"], asked["--min-nodes"]) == ("node1:6379", "2")
    assert (tmp_path / "stage").read_text().splitlines() == ["node1:6379", *stage[1:]]
    assert seen["environment"]["RAY_AUTH_MODE"] == "token"
    assert len(seen["token"].strip()) == 64
    assert stat.filemode(seen["mode"]) == "?rw-------"
    assert not list((tmp_path / ".ray").iterdir()), "the token ends with the job, and so does what the stage left"


@pytest.mark.parametrize("left_before", [False, True])
def test_a_job_whose_ray_did_not_start_has_failed(allocation, tmp_path, left_before: bool):
    if left_before:  # by a run of the same job that was killed
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "s2t-42.status").write_text("0\n")
    done = subprocess.run(
        ["bash", str(SLURM), "s2t", "collect"],
        env=allocation | {"RAY_STARTS": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("slurm.sh: the stage left no exit status: Ray did not start")


def test_a_job_near_its_time_limit_goes_back_into_the_queue(allocation, tmp_path):
    (signal_option,) = re.findall(r"^#SBATCH --signal=B:(\w+)@300$", SLURM.read_text(), re.MULTILINE)
    job = subprocess.Popen(
        ["bash", str(SLURM), "s2t", "collect"],
        env=allocation | {"STAGE_ENDS": "requeued"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: (tmp_path / "stage").exists(), job, 60)
    job.send_signal(getattr(signal, f"SIG{signal_option}"))
    _, said = job.communicate(timeout=60)
    assert (job.returncode, said) == (143, "slurm.sh: the time limit is near: back into the queue\n")
    assert (tmp_path / "requeued").exists()


def test_slurm_says_how_it_is_called(allocation, tmp_path):
    done = subprocess.run(
        ["bash", str(SLURM)], env=allocation, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.startswith("usage: sbatch")) == (2, True)
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0


# What is written about them.


@pytest.mark.parametrize("path", [SLURM, CLUSTER / "README.md", REPOSITORY / "docs" / "operations.md"])
def test_commands_that_are_shown_are_ours(path):
    text = re.sub(r"\\\n[# ]*", "", path.read_text())
    shown = re.findall(
        r"^(?:# +|\w+=\S+ |\w+=\$\()*(?:sbatch|ray job submit)\b.*?(s2t [a-z][^)\n]*)", text, re.MULTILINE
    )
    assert shown
    for command in shown:
        known_command(shlex.split(command))


# The image.


def test_the_image_takes_what_is_there_and_all_of_the_project():
    text = (CLUSTER / "Dockerfile").read_text()
    copied = [source for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE) for source in line.split()]
    assert [source for source in copied if not (REPOSITORY / source).exists()] == []
    included = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {package.rstrip("*") for package in included["include"]} <= set(copied)
    patterns = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert {entry for entry in let_in if not (REPOSITORY / entry).exists()} == set()
    assert {entry.split("/")[0] for entry in let_in} == set(copied)
    assert re.findall(r"^USER (\d+)", text, re.MULTILINE) == ["1000"]
    assert ":latest" not in text


def test_a_login_shell_of_the_image_finds_its_commands(tmp_path):
    """`ray up` runs `bash --login`, and the profile of Debian sets PATH anew before it reads what is in profile.d."""
    text = (CLUSTER / "Dockerfile").read_text()
    (line,) = re.findall(r"^RUN (.+) > /etc/profile\.d/s2t\.sh$", text, re.MULTILINE)
    (folder,) = re.findall(r"^ENV PATH=(\S+):\$PATH \\$", text, re.MULTILINE)
    subprocess.run(["sh", "-c", f"{line} > {tmp_path}/s2t.sh"], check=True)
    shown = subprocess.run(
        ["/bin/sh", "-c", f". {tmp_path}/s2t.sh; echo $PATH"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == f"{folder}:/usr/bin:/bin\n"
