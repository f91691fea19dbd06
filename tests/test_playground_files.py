"""The playground's files without a browser: how the page is served, what a saved answer holds, what it may load."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from streaming_stub import ANSWERS

from pipelines.tasks import load
from pipelines.tasks.splits import fingerprint, text_hash
from serving.playground.routes import HEADERS, router
from serving.playground.saved import ASSETS, SavedTrajectory, trajectory_page

NASTY = "</script><script>alert(1)</script><!-- & \ud7ff \u2028"


def taken(policy: str, **given: Any) -> SavedTrajectory:
    """What a page would save of a recorded answer."""
    tokens, decisions = ANSWERS[policy]
    fields = {"policy": policy, "prompt": "How many?", "tokens": tokens, "decisions": decisions}
    return SavedTrajectory.model_validate(fields | given)


class Parts(HTMLParser):
    """The elements of a page whose contents are no HTML, as (tag, attributes, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.policy = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(given["content"])
        if tag in ("script", "style"):
            self.found.append((tag, given, ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            tag, given, text = self.found[-1]
            self.found[-1] = (tag, given, text + data)


def test_the_page_and_its_files_are_served_with_a_policy_that_allows_nothing_else():
    app = FastAPI()
    app.include_router(router)
    client = TestClient(app)
    page = client.get("/playground")
    named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert named
    assert "<style" not in page.text
    for path in ["playground", *named, "playground/trajectory.js", "playground/problems.json", "playground/saved.html"]:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "'unsafe" not in HEADERS["Content-Security-Policy"]
    for path in ("playground/nothing.js", "playground/index.html", "playground/..%2Froutes.py"):
        assert client.get(f"/{path}").status_code == 404


def test_no_file_of_the_page_names_an_address_or_puts_in_html():
    for path in ASSETS.iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            path.name
        )


def test_a_saved_file_holds_its_data_and_its_policy_allows_its_own_script_and_style_alone():
    whole = [
        taken("greedy", prompt=NASTY, tokens=[[NASTY, "slm"]], samples=[NASTY]),
        taken("s2t-local", seed=3, models={"s2t-local": "ab"}),
    ]
    parts = Parts(trajectory_page(whole))
    (_, _, style), (_, data_is, data), (_, script_is, script) = parts.found
    assert (data_is["type"], script_is["type"]) == ("application/json", "module")
    assert [SavedTrajectory.model_validate(one) for one in json.loads(data)] == whole
    for text in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in parts.policy
    assert parts.policy.startswith("default-src 'none'; ")
    assert "unsafe" not in parts.policy


def test_the_examples_are_of_our_own():
    tests = fingerprint(
        item for name in ("embedded", "embedded-hard", "embedded-held-out") for item in load(name, None)[1]
    )
    problems = json.loads((ASSETS / "problems.json").read_text())
    assert len(problems) >= 5
    assert not [name for name, text in problems.items() if text_hash(text) in tests]
