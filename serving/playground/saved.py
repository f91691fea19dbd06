"""Answers as self-contained HTML files: their tokens by source, their decisions and what they cost (section F.9).

A file holds its data, and the code that the live page shows answers with; it loads nothing. It knows nothing of HTTP,
policies or engines.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

ASSETS = Path(__file__).parent / "assets"
_DATA = "[/*trajectories*/]"
_SHOW = 'show(JSON.parse(document.getElementById("trajectories").textContent), document.querySelector("main"));'
_POLICY = "default-src 'none'; style-src '{style}'; base-uri 'none'; form-action 'none'"


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedDecision(_Saved):
    """A decision as `s2t_models.engines.contract.Decision` has it, with its tokens' texts."""

    step: int
    value: float
    candidates_K: list[int]
    texts_K: list[str]
    logprobs_K: list[float]
    scores_K: list[float]
    preferences_K: list[float]
    chosen: int
    chosen_text: str
    argmax: int | None = None
    argmax_text: str | None = None
    teacher_K: list[float] | None = None


class SavedTrajectory(_Saved):
    """One answer of a policy. `tokens` are [text, source] in order, each decision's `step` counts from the first of
    them; `usage` maps an engine to its `prefill`, `decode`, `leaves` and `forwards`, None where nobody said; `models`
    to the sha256 of its weights. `temperature` and `max_tokens` are None where they were left to the policy. `item`,
    `verdict`, `extracted` and `gold` say of an answer that was graded which question it is to, what came of it, what
    it answers and what is right."""

    version: Literal[1] = 1
    policy: str
    prompt: str
    tokens: list[tuple[str, Literal["slm", "selected", "teacher"]]]
    decisions: list[SavedDecision] = []
    finish: Literal["stop", "length", "stopped", "failed"] = "stop"
    seed: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seconds: float | None = None
    usage: dict[str, dict[str, int]] = {}
    models: dict[str, str] = {}
    samples: list[str] = []
    item: str | None = None
    verdict: str | None = None
    extracted: str | None = None
    gold: str | None = None


_LIST = TypeAdapter(list[SavedTrajectory])


@cache
def empty_page() -> str:
    """The file without its data, which goes where `[/*trajectories*/]` stands. Its policy allows the style and the
    script that it holds, by their hashes, and no address at all."""
    style, viewer = _asset("style.css"), _asset("trajectory.js")
    script = f"{viewer}\n{_SHOW}\n"
    parts = {"style-hash": _hash(style), "script-hash": _hash(script), "style": style, "script": script}
    page = _asset("saved.html")
    for name, text in parts.items():
        page = page.replace(f"/*{name}*/", text)
    return page


def trajectory_page(trajectories: Sequence[SavedTrajectory]) -> str:
    """The HTML of one answer, or of several side by side."""
    # "<" as an escape: a text that holds "</script>" must not end the data.
    data = _LIST.dump_json(list(trajectories)).decode().replace("<", "\\u003c")
    return empty_page().replace(_DATA, data, 1)


def index_page(title: str, header: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    """The HTML of a table of files: in each row a cell a name of `header`, the first a link to the row's `file`."""
    style = _asset("style.css")
    cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = []
    for row in rows:
        link, *others = (html.escape(row[name]) for name in header)
        first = f'<th scope="row"><a href="{html.escape(row["file"])}">{link}</a></th>'
        body.append(f"<tr>{first}{''.join(f'<td>{text}</td>' for text in others)}</tr>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(style=_hash(style))}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header class="top"><h1>{html.escape(title)}</h1></header>\n'
        '<main><section class="problem"><table class="pages">\n'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{chr(10).join(body)}\n</tbody>\n</table></section></main>\n"
        "</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source of a content security policy that stands for this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
