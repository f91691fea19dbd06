"""The playground with real clicks in a headless Chromium: the page as it streams, its keyboard, its errors, and answers
saved as files that need nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming_stub import ANSWERS, StreamingStub, streaming_stub

from serving.playground.saved import SavedTrajectory, empty_page

#: A folder for pictures of the page as the tests see it; none are taken where it is not set.
SHOTS = os.environ.get("S2T_SHOTS")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        if not found and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("no Chromium is installed")
        # A container without user namespaces runs no Chromium with its own sandbox; only our own page is opened.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[StreamingStub]:
    with streaming_stub() as stub:
        yield stub


@pytest.fixture
def stub(server: StreamingStub) -> StreamingStub:
    for state in (server.held, server.broken, server.refused, server.left, server.bodies):
        state.clear()
    server.key = None
    return server


@pytest.fixture
def page(browser: Any, stub: StreamingStub) -> Iterator[Any]:
    """The page, just opened; the test fails where the browser had to complain of anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(10_000)
    page = context.new_page()
    complaints = watched(page)
    page.goto(f"{stub.url}/playground")
    ready(page)
    yield page
    context.close()
    assert complaints == []


def watched(page: Any) -> list[str]:
    """What the browser says went wrong; a refused request is what some tests ask for."""
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda message: (
            complaints.append(message.text)
            if message.type in ("error", "warning") and "the server responded with a status of" not in message.text
            else None
        ),
    )
    return complaints


def ready(page: Any) -> None:
    page.get_by_role("button", name="Run", exact=True).and_(page.locator(":enabled")).wait_for()


def check_access(page: Any) -> None:
    """axe's rules, contrast among them, in light and in dark."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = axe.run(page).response["violations"]
        told = [f"{one['id']} ({scheme}): {node['html'][:120]}" for one in found for node in one["nodes"]]
        assert told == []
    page.emulate_media(color_scheme="light")


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def card(page: Any, policy: str) -> Any:
    return page.get_by_role("article", name=policy, exact=True)


def counters(shown: Any) -> dict[str, str]:
    return {cell.get_attribute("data-counter"): cell.text_content() for cell in shown.locator("[data-counter]").all()}


def ask(page: Any, left: str = "greedy", right: str = "s2t-local") -> None:
    page.get_by_label("Left policy").select_option(left)
    page.get_by_label("Right policy").select_option(right)
    page.get_by_role("button", name="Run", exact=True).click()


def finished(page: Any, *policies: str) -> None:
    for policy in policies:
        card(page, policy).get_by_text("finished", exact=True).wait_for()


def text_of(policy: str) -> str:
    return "".join(text for text, _ in ANSWERS[policy][0])


def written(shown: Any) -> str:
    return shown.get_by_role("group", name="Answer of").text_content()


def test_two_policies_are_asked_one_problem_and_both_stream(page, stub):
    page.get_by_label("Problem", exact=True).select_option("A walk over the market")
    problem = page.get_by_label("The problem’s text").input_value()
    assert problem.startswith("At the first stall Ravi buys")
    page.get_by_label("Max tokens").fill("64")
    page.get_by_label("Temperature").fill("0.5")
    stub.held.update({"greedy", "s2t-local"})
    ask(page)
    for policy in ("greedy", "s2t-local"):
        tokens = ANSWERS[policy][0]
        half = "".join(text for text, _ in tokens[: len(tokens) // 2])
        same_text = "([label, text]) => document.querySelector(`[aria-label='${label}']`)?.textContent === text"
        page.wait_for_function(same_text, arg=[f"Answer of {policy}", half])
        assert card(page, policy).get_by_text("writing", exact=True).is_visible()
    assert "are writing" in page.get_by_role("status").text_content()
    shoot(page, "streaming")
    stub.held.clear()
    finished(page, "greedy", "s2t-local")
    assert written(card(page, "greedy")) == text_of("greedy")
    assert written(card(page, "s2t-local")) == text_of("s2t-local")
    for policy, triggers, rescues in (("greedy", "0", "0"), ("s2t-local", "3", "2")):
        number = str(len(ANSWERS[policy][0]))
        assert list(counters(card(page, policy)).values()) == [number, triggers, rescues, "0", "0.42"]
    page.get_by_text(re.compile(r"s2t-local finished: \d+ tokens, 3 triggers, 2 rescues")).wait_for(state="attached")
    asked = {body["model"]: body for body in stub.bodies}
    assert asked["greedy"]["messages"] == [{"role": "user", "content": problem}]
    for body in asked.values():
        assert body["stream"] is True
        assert body["s2t"] == {"decisions": True}
        assert (body["max_tokens"], body["temperature"], body["seed"]) == (64, 0.5, 0)
    shoot(page, "finished")


def test_a_decision_opens_by_click_to_both_models_probabilities(page):
    ask(page, "takeover", "s2t-local")
    finished(page, "takeover", "s2t-local")
    local = card(page, "s2t-local")
    first = local.get_by_role("button", name="54, decision at token")
    first.click()
    panel = local.get_by_role("group", name="Decision 1 of 3")
    rows = [row.all_inner_texts() for row in map(cells, panel.get_by_role("row").all())]
    assert rows[0] == ["Candidate", "SLM", "Score"]
    assert rows[1:] == [["52", "62.0%", "0.120"], ["54 chosen", "31.0%", "0.930"], ["56", "2.0%", "0.050"]]
    assert "The SLM’s first was 52; 54 was selected." in panel.inner_text()
    assert panel.get_by_text("rescue", exact=True).is_visible()
    panel.get_by_role("button", name="Next decision").click()
    kept = local.get_by_role("group", name="Decision 2 of 3")
    assert "The SLM’s first, ␣bags, was kept." in kept.inner_text()
    kept.get_by_role("button", name="Next decision").click()
    last = local.get_by_role("group", name="Decision 3 of 3")
    assert cells(last.get_by_role("row").first).all_inner_texts()[-1] == "Preference"
    assert "<0.1%" in last.inner_text()
    assert "↵" in last.inner_text()
    taken_over = card(page, "takeover")
    taken_over.get_by_role("button", name="54, decision").click()
    panel = taken_over.get_by_role("group", name="Decision 1 of 1")
    assert "the teacher wrote 54" in panel.inner_text()
    assert "54 chosen teacher’s own\tnot among the candidates" in re.sub(r"\n", " ", panel.inner_text())
    assert cells(panel.get_by_role("row").first).all_inner_texts() == ["Candidate", "SLM", "Teacher"]
    check_access(page)
    shoot(page, "decisions")
    page.emulate_media(color_scheme="dark")
    shoot(page, "decisions-dark")
    panel.get_by_role("button", name="Close").click()
    assert panel.is_hidden()


def cells(row: Any) -> Any:
    return row.locator("th, td")


def test_the_keyboard_runs_walks_opens_and_stops(page, stub):
    page.get_by_label("The problem’s text").fill("How many marbles are 46 and 8?")
    assert page.get_by_label("Problem", exact=True).input_value() == "", "it is one of your own now"
    page.keyboard.press("Control+Enter")
    finished(page, "greedy", "s2t-local")
    local = card(page, "s2t-local")
    buttons = local.get_by_role("button", name=re.compile("decision at token"))
    assert [button.get_attribute("tabindex") for button in buttons.all()] == ["0", "-1", "-1"]
    focused = "document.activeElement.getAttribute('aria-label')"
    for _ in range(40):
        page.keyboard.press("Tab")
        if "decision at token" in (page.evaluate(focused) or ""):
            break
    assert page.evaluate(focused).startswith("54, decision at token")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused).startswith("bags, decision at token")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert local.get_by_role("group", name="Decision 3 of 3").is_visible()
    page.keyboard.press("ArrowLeft")
    assert local.get_by_role("group", name="Decision 2 of 3").is_visible()
    assert [button.get_attribute("aria-expanded") for button in buttons.all()] == ["false", "true", "false"]
    page.keyboard.press("Escape")
    assert local.locator(".panel").is_hidden()
    assert page.evaluate(focused).startswith("bags, decision at token")

    stub.held.update({"greedy", "s2t-local"})
    ask(page)
    page.get_by_role("button", name="Stop").and_(page.locator(":enabled")).wait_for()
    local.get_by_text("writing", exact=True).wait_for()
    page.keyboard.press("Escape")
    local.get_by_text("stopped", exact=True).wait_for()
    assert page.get_by_role("button", name="Stop").is_disabled()
    assert counters(local)["teacher"] == "–", "what a stopped answer cost is not known"


def test_stop_ends_the_requests(page, stub):
    stub.held.update({"greedy", "s2t-local"})
    ask(page)
    for policy in ("greedy", "s2t-local"):
        card(page, policy).get_by_text("writing", exact=True).wait_for()
    page.get_by_role("button", name="Stop").click()
    for policy in ("greedy", "s2t-local"):
        card(page, policy).get_by_text("stopped", exact=True).wait_for()
    for _ in range(500):
        if stub.left == {"greedy", "s2t-local"}:
            break
        page.wait_for_timeout(20)
    assert stub.left == {"greedy", "s2t-local"}, "the endpoint was not told to stop"


def test_what_fails_is_said_where_it_failed_and_the_other_answer_goes_on(page, stub):
    stub.broken.add("greedy")
    ask(page)
    finished(page, "s2t-local")
    alert = card(page, "greedy").get_by_role("alert")
    assert alert.text_content() == "an engine of this policy is not available just now"
    assert written(card(page, "greedy")).startswith("On Tuesday"), "what was written before stays"
    stub.broken.clear()
    stub.refused.add("greedy")
    ask(page)
    finished(page, "s2t-local")
    assert card(page, "greedy").get_by_role("alert").text_content() == "messages: this model's context is 512 tokens"
    assert page.get_by_role("button", name="Save both").is_disabled(), "there is no answer of greedy"
    check_access(page)
    shoot(page, "failed")


def test_an_endpoint_with_keys_is_asked_with_the_key_that_was_typed(page, stub):
    stub.key = "secret"
    page.reload()
    page.get_by_text("The policies cannot be listed: a key is needed").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("secret")
    page.keyboard.press("Tab")
    ready(page)
    assert page.get_by_text("The policies cannot be listed").is_hidden()
    ask(page)
    finished(page, "greedy", "s2t-local")
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert kept == '[{},{},""]'


def test_model_output_is_text_and_never_markup(page, browser, tmp_path):
    ask(page, "greedy", "s2t@0.05")
    finished(page, "greedy", "s2t@0.05")
    assert written(card(page, "s2t@0.05")) == text_of("s2t@0.05")
    card(page, "s2t@0.05").get_by_role("button", name="decision at token").click()
    file = saved(page, "Save both", tmp_path)
    opened = offline(browser, file)
    assert written(card(opened, "s2t@0.05")) == text_of("s2t@0.05")
    for one in (page, opened):
        assert "broken" not in one.title()
        assert one.locator("main img").count() == 0
    opened.context.close()


def saved(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def offline(browser: Any, file: Path) -> Any:
    """A saved file in a browser of its own that has no network."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.complaints = watched(page)
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(file.as_uri())
    return page


def test_a_saved_file_shows_the_same_without_a_network(page, browser, tmp_path):
    ask(page)
    finished(page, "greedy", "s2t-local")
    both = saved(page, "Save both", tmp_path)
    alone = saved(page, "Save the answer of s2t-local", tmp_path)
    assert (both.name, alone.name) == ("s2t-greedy-s2t-local.html", "s2t-s2t-local.html")
    for file, policies in ((both, ["greedy", "s2t-local"]), (alone, ["s2t-local"])):
        (data,) = re.findall(r'<script type="application/json" id="trajectories">(.*?)</script>', file.read_text())
        kept = [SavedTrajectory.model_validate(one) for one in json.loads(data)]
        assert [one.policy for one in kept] == policies
        assert file.read_text().replace(data, "[/*trajectories*/]") == empty_page()
        opened = offline(browser, file)
        assert [heading.text_content() for heading in opened.locator("article h2").all()] == policies
        assert opened.locator(".problem").inner_text().endswith(page.get_by_label("The problem’s text").input_value())
        for policy in policies:
            there, here = card(opened, policy), card(page, policy)
            assert written(there) == written(here)
            assert counters(there) == counters(here)
            marks = "spans => spans.map(span => [span.className, span.textContent])"
            assert there.locator(".text .mark").evaluate_all(marks) == here.locator(".text .mark").evaluate_all(marks)
            assert there.get_by_text("About this run").is_visible()
        opened.get_by_role("button", name="54, decision at token").click()
        assert "54 was selected" in opened.get_by_role("group", name="Decision 1 of 3").inner_text()
        check_access(opened)
        shoot(opened, file.stem)
        assert opened.requested == [file.as_uri()]
        assert opened.complaints == []
        opened.context.close()


def test_a_narrow_screen_needs_no_scrolling_aside(page):
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page)
    finished(page, "greedy", "s2t-local")
    local = card(page, "s2t-local")
    local.get_by_role("button", name="\\boxed{, decision at token").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert local.locator(".panel").bounding_box()["width"] <= 360
    left, right = card(page, "greedy").bounding_box(), local.bounding_box()
    assert right["y"] >= left["y"] + left["height"], "one below the other"
    check_access(page)
    shoot(page, "narrow")


def test_the_page_works_below_a_route_prefix(page, stub):
    page.goto(f"{stub.url}/benchmark-x/playground")
    ready(page)
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    ask(page)
    finished(page, "greedy", "s2t-local")
    assert urls
    assert all(url.startswith(f"{stub.url}/benchmark-x/") for url in urls)
