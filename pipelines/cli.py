"""`s2t NAME ...`: each pipeline by name. The same as `python -m pipelines.NAME`; imports only what it runs."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "collect": ("pipelines.collect.__main__", "SLM rollouts and teacher labels into Arrow shards"),
    "distil": (
        "pipelines.distil.__main__",
        "shards into an S2T-Local artifact (selector and trigger head), a baseline or an ablation",
    ),
    "benchmark": ("pipelines.benchmark.__main__", "policies x tasks x seeds over an endpoint, graded, into MLflow"),
    "analyse": ("pipelines.analyse.__main__", "the paper's curves and tables from shards or results"),
    "plan": ("pipelines.plan.__main__", "what a recipe needs, stage by stage, and whether its cards hold it"),
    "grade": ("pipelines.grade", "grade recorded responses"),
    "serve": ("serving.app", "the OpenAI endpoint: every policy is a model"),
    "export": ("pipelines.export", "an artifact as a folder that transformers, peft and others load"),
    "loop": ("pipelines.loop", "all of it in order for one recipe, going on where it was broken off"),
    "paper": ("pipelines.paper.__main__", "every table and figure of the paper, from the runs of a matrix"),
    "demo": ("pipelines.demo", "the loop on the embedded pair"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (2: it was called wrongly)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: s2t COMMAND ...    (s2t COMMAND --help says more)\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:10} {what}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"s2t: no command {argv[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0)
    except KeyboardInterrupt:  # before the command itself had begun (`s2t_models.commands`)
        return 130


if __name__ == "__main__":
    sys.exit(main())
