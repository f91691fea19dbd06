"""What takes minutes: the whole demo, and the embedded pair trained again from nothing. `make test-slow` runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path):
    output = tmp_path / "demo"
    command = [sys.executable, "-m", "pipelines.demo", "--output", str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    accuracy = {name: figures["accuracy"] for name, figures in summary["policies"].items()}
    assert min(figures["items"] for figures in summary["policies"].values()) >= 500
    assert 0.30 <= accuracy["greedy"] <= 0.55
    assert accuracy["llm"] >= 0.85
    assert accuracy["s2t-local"] >= accuracy["greedy"] + 0.15
    for other in ("greedy", "maj@8"):
        assert summary["paired"][f"s2t-local-{other}"]["interval"][0] > 0
    assert abs(accuracy["s2t"] - accuracy["takeover"]) <= 0.02
    assert summary["hit"]["8"] >= 0.75
    assert summary["hit"]["1"] < 0.30
    for split in summary["first_wrong"].values():
        assert split["read"] == split["wrong"] == split["at_triggered"] + split["elsewhere"] + split["nowhere"]
    split = summary["first_wrong"]["s2t-local"]
    assert split["at_triggered"] + split["elsewhere"] > 0.9 * split["wrong"], "the teacher sees where it goes wrong"


@pytest.mark.slow
def test_the_pair_can_be_trained_again(tmp_path):
    from s2t_models.embedded.build import greedy_accuracy

    command = [sys.executable, "-m", "s2t_models.embedded.build", "--output", str(tmp_path / "pair")]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    assert 0.30 <= greedy_accuracy(tmp_path / "pair" / "slm", "calibration", 300) <= 0.55
    assert greedy_accuracy(tmp_path / "pair" / "teacher", "calibration", 300) >= 0.85
