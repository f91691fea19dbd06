"""Progress that moves while rows are long: answers counted as they are kept, tokens as engines write them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import ray
import torch

from pipelines.runtime.progress import Progress
from pipelines.runtime.records import NewLines, RecordLog
from s2t_models.engines.contract import Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import Hosted
from s2t_models.settings import ModelSettings
from s2t_models.storage import StorageError
from s2t_models.threads import use_threads
from serving import written


def test_answers_count_as_soon_as_they_are_kept(tmp_path: Path) -> None:
    earlier = RecordLog(tmp_path)
    earlier.append({"key": "before"})
    added = NewLines(tmp_path, from_now=True)
    assert added.count() == 0
    earlier.append({"key": "a"})
    RecordLog(tmp_path).append({"key": "b"})
    assert added.count() == 2
    (tmp_path / "torn.jsonl").write_text(json.dumps({"key": "c"}) + '\n{"key"')
    assert added.count() == 1


def test_a_count_that_fails_is_the_last_one_again(capsys: pytest.CaptureFixture[str]) -> None:
    known = iter([3])

    def count() -> int:
        for number in known:
            return number
        raise StorageError("s3://bucket/out: the store cannot be reached")

    with Progress("collect", "rows", 10, count):
        pass
    assert "collect: 3/10 rows" in capsys.readouterr().err


def test_progress_shows_tokens_and_slow_rows_by_the_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("benchmark", "answers", 100, count=lambda: 0, tokens=lambda: 12345):
        time.sleep(0.2)
    assert "benchmark: 0/100 answers, 0 s, 0.0 answers/s; 12,345 tokens" in capsys.readouterr().err
    progress = Progress("benchmark", "answers", 100, count=lambda: 3)
    progress._first, progress._begin, progress._shown = 0, time.monotonic() - 60, 0
    progress._show(last=True)
    assert re.search(r"3/100 answers, 60 s, 3\.0 answers/min\n", capsys.readouterr().err)


def test_a_board_adds_up_what_engines_have_written(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(written, "_EVERY_S", 0.05)
    board = written.new_board()
    settings = ModelSettings(path="embedded:slm", dtype="float32", device="cpu", slots=2, context=64)
    engines = [load(Hosted(name, settings)) for name in ("one", "other")]
    for engine in engines:
        written.keep_posted(engine, "slm", board)
        draft = asyncio.run(engine.generate([5, 6, 7], Sampling(9)))
        engine.close()
    expected = sum(engine.counted.written for engine in engines)  # type: ignore[attr-defined]
    assert expected >= 2 * len(draft.ids) > 0
    deadline = time.monotonic() + 20
    while written.total(board) < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ray.get(board.total.remote()) == expected


@pytest.mark.slow
def test_ray_exports_what_engines_do(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray collects a process' metrics every ten seconds."""
    import asyncio

    import httpx

    monkeypatch.setattr(written, "_EVERY_S", 0.05)
    settings = ModelSettings(path="embedded:slm", dtype="float32", device="cpu", slots=2, context=64)
    engine = load(Hosted("exported", settings))
    written.keep_posted(engine, "exported")
    draft = asyncio.run(engine.generate([5, 6, 7, 8], Sampling(9)))
    asyncio.run(engine.generate([5, 6, 7, 8, *draft.ids], Sampling(4)))
    engine.close()
    counted = engine.counted  # type: ignore[attr-defined]
    assert (counted.read, counted.cached, counted.running) == (5, 12, 0)
    (node,) = ray.nodes()
    page, deadline = "", time.monotonic() + 60
    wanted = {kind: getattr(counted, kind) for kind in written.KINDS}
    found: dict[str, float] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(1)
        page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        lines = [
            line for line in page.splitlines() if line.startswith("ray_s2t_engine_") and 'engine="exported"' in line
        ]
        kinds = {kind: [line for line in lines if f'kind="{kind}"' in line] for kind in written.KINDS}
        found = {kind: float(own[0].rsplit(maxsplit=1)[1]) for kind, own in kinds.items() if own}
    assert found == wanted
    assert f"ray_{written.TOKENS}_total{{" in page
    assert f"ray_{written.RUNNING}{{" in page


def test_threads_follow_the_recipe_not_the_environment() -> None:
    before = torch.get_num_threads()
    try:
        for num_cpus, threads in ((3.5, 3), (0.25, 1), (2, 2)):
            use_threads(num_cpus)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
