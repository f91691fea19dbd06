"""The command line: every pipeline by name, quick help, and a job submitted to a running cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.cli import COMMANDS, main

REPOSITORY = Path(__file__).resolve().parent.parent


def test_the_commands_are_listed_and_an_unknown_one_is_named(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert main(["colect"]) == 2
    assert "no command 'colect'; there are: collect" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_heavy_import(name):
    script = (
        "import sys\nfrom pipelines.cli import main\n"
        f"try: main([{name!r}, '--help'])\nexcept SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert shown.stdout.startswith("usage:")
    assert shown.stdout.strip().endswith("heavy: []")


def test_a_job_submitted_to_the_cluster_collects_shards(ray_cluster, tmp_path):
    output = tmp_path / "shards"
    overrides = [
        "collect.prompts=6",
        "trigger.threshold=0.1",
        "collect.max_new_tokens=40",
        "collect.rollout.num_cpus=0.5",
        "collect.label.num_cpus=0.5",
    ]
    entry = [
        sys.executable,
        "-m",
        "pipelines.collect",
        "--recipe",
        "cluster/recipes/embedded.yaml",
        "--output",
        str(output),
    ]
    entry += [part for override in overrides for part in ("--set", override)]
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_cluster, "--working-dir", "."]
    for _ in range(10):
        done = subprocess.run(
            [*submit, "--", *entry],
            cwd=REPOSITORY,
            env=os.environ | {"RAY_ADDRESS": ""},
            capture_output=True,
            text=True,
        )
        if "No available agent" not in done.stderr:  # Ray's job agent is slow to answer on a busy machine
            break
        time.sleep(5)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((output / "collect.json").read_text())["rows"] == 6
