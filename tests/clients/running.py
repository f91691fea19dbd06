"""What the clients' tests stand on: the served pair, the clients' commands, and transformers' own numbers.

The commands are those of `.venv-clients`, which holds the clients and nothing of this project.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
SLM = REPOSITORY / "s2t_models" / "embedded" / "weights" / "slm"
CLIENTS = REPOSITORY / ".venv-clients" / "bin"


@dataclass
class Served:
    """A running `s2t serve`, by its root URL."""

    url: str
    access_log: Path

    def asked(self) -> set[tuple[str, int]]:
        """The paths that were asked, with the statuses they were answered with."""
        lines = [json.loads(line) for line in self.access_log.read_text().splitlines()]
        return {(line["path"], line["status"]) for line in lines if line["method"] == "POST"}


def run_client(home: Path, *command: str, **environment: str) -> str:
    """What a command of `.venv-clients` prints. Whatever it keeps for itself it keeps below `home`."""
    path = f"{CLIENTS}{os.pathsep}{os.environ['PATH']}"
    kept = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "PATH": path}
    ran = subprocess.run(
        [str(CLIENTS / command[0]), *command[1:]],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | kept | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


class Reference:
    """transformers on the SLM's folder, over the rows that are text."""

    def __init__(self, masked_ids: list[int]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(SLM)
        self._model = AutoModelForCausalLM.from_pretrained(SLM, dtype=torch.float32)
        self._masked_ids = masked_ids

    def loglikelihood(self, context: list[int], ids: list[int]) -> tuple[float, bool]:
        """Of `ids` behind `context`, and whether each of them is the likeliest."""
        with torch.no_grad():
            logits_TV = self._model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        logits_TV[:, self._masked_ids] = -torch.inf
        wanted_T = torch.tensor(ids)
        logprobs_T = logits_TV.log_softmax(-1).gather(1, wanted_T[:, None])
        return float(logprobs_T.sum()), bool((logits_TV.argmax(-1) == wanted_T).all())

    def answer(self, question: str, max_tokens: int = 200) -> str:
        """What the SLM writes, the likeliest token at every step."""
        chat = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        written = self._model.generate(
            torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False, suppress_tokens=self._masked_ids
        )
        return str(self.tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))
