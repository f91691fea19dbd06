"""Grade responses that were recorded elsewhere: `s2t grade TASK RESPONSES.jsonl [--data DIR] [--output FILE]`.

One JSON object a line, with `response` (a text, or a list of texts to vote over; for mt_bench the two turns' answers)
and either `id` (a row of the task) or `answer` (the gold answer). `finish_reason` "length" marks a response that was
cut off, `error` one that failed. Every field is kept; `verdict`, `extracted` and `correct` are added. It asks no model
but MT-Bench's judge. What it does is in `results.recorded`.
"""

from __future__ import annotations

import argparse
import os
import sys

from pipelines.runtime.arguments import here, place
from s2t_models.commands import run_command
from s2t_models.errors import UserError, one_line


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where lines were malformed; 2 where nothing could be graded."""
    options = _parse(argv)
    return run_command("grade", lambda: _grade(options), resumes=False)


def _grade(options: argparse.Namespace) -> int:
    from pipelines.grading.judge import endpoint
    from pipelines.results.recorded import grade_file, report, write_lines
    from pipelines.tasks import task

    chosen = task(options.task).prepared(options.allow_unsandboxed)
    ask = None
    if chosen.judged:
        if not (options.judge and options.judge_model):
            raise UserError(f"{chosen.name} is graded by a judge model: name one with --judge URL --judge-model NAME")
        ask = endpoint(options.judge, options.judge_model, os.environ.get("OPENAI_API_KEY", ""))
    graded = grade_file(options.responses, chosen, here(options.data), ask)
    for number, problem in graded.malformed.items():
        print(f"{options.responses}, line {number}: {problem}; the line is left out", file=sys.stderr)
    if options.output:
        write_lines(options.output, graded.lines)
    if graded.none_graded:
        first = next((line.get("error") for line in graded.lines), None)
        because = f"; the first error: {one_line(str(first))}" if first else ""
        raise UserError(f"{options.responses}: none of its lines could be graded{because}")
    print(report(chosen.name, graded.lines))
    return 1 if graded.malformed else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t grade", description="Grade recorded responses, one JSON object a line.")
    parser.add_argument(
        "task", metavar="TASK", help="a benchmark, such as gsm8k, math500, mmlu_pro, humaneval, mt_bench"
    )
    parser.add_argument(
        "responses", metavar="RESPONSES.jsonl", type=place, help="lines with `response`, and `id` or `answer`"
    )
    parser.add_argument(
        "--data", type=place, metavar="DIR", help="folder with the benchmark files, needed for `id` (default: download)"
    )
    parser.add_argument("--output", type=place, metavar="FILE", help="where the graded lines go")
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="mt_bench: base of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="mt_bench: the judge's model name there")
    parser.add_argument(
        "--allow-unsandboxed",
        action="store_true",
        help="humaneval: run programs with your own rights where they cannot be isolated",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
