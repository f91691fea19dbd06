"""Analyses of recorded shards and results: the figures that follow from them, and bad input."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from recorded import ITEMS, RECIPE, recorded_results, recorded_shards

from pipelines.analyse.__main__ import main
from pipelines.analyse.audit import TEACHER_ARGMAX, TEACHER_ON_WRITTEN, audit, judge, prompts_of, read, readable
from pipelines.analyse.decisions import scores_by_rank, selected_ranks, tables
from pipelines.analyse.errors import cumulated, first_wrong_rows, step_errors
from pipelines.analyse.shard_tables import hits, read_steps
from pipelines.data.shards import read_shards
from pipelines.results.summary import read_results, write_results
from pipelines.tasks import load
from s2t_models.loading import load_tokenizer
from s2t_models.recipe import load_recipe
from serving.playground.saved import SavedTrajectory


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_shards_give_hit_rates_curves_and_alignment(store: str, tmp_path: Path) -> None:
    recorded_shards(tmp_path / "shards")
    output = tmp_path / "analysis"
    assert main([str(tmp_path / "shards"), "--output", str(output), "--tracking", store]) == 0
    table, metadata = read_shards(tmp_path / "shards")
    steps = read_steps(table, metadata)
    assert len(steps.kl_T) == 12 * 60, "rows with an error have no steps"
    hit = pd.read_csv(output / "hit.csv").set_index(["tau", "k"])["hit"]
    top = np.argsort(-steps.kl_T)[:36]
    assert hit[0.05, 8] == pytest.approx((steps.rank_T[top] < 8).mean())
    assert hits(steps, 0.05)[8] == hit[0.05, 8]
    assert (hit.groupby("tau").diff().dropna() >= 0).all(), "Hit@K grows with K"
    split = pd.read_csv(output / "error_split.csv")
    missed = 1 - split["tau"].map(hit.xs(1, level="k"))
    assert (split["hit_error"] + split["selection_error"]).to_numpy() == pytest.approx(missed.to_numpy())
    alignment = pd.read_csv(output / "alignment.csv").set_index("steps_are")
    assert alignment.loc["top steps by KL", "steps"] == 72
    assert abs(alignment.loc["top steps by KL", "spearman"]) < 0.2, "random orders do not agree"
    triggers = pd.read_csv(output / "triggers.csv").set_index(["trigger", "tau"])["hit@1"]
    assert triggers["kl", 0.01] < triggers["random", 0.2], "the divergence finds the steps where the SLM is wrong"
    for name in ("hit-over-k.png", "hit-over-tau.png", "rank-cdf.png", "error-split.png"):
        assert (output / name).stat().st_size > 5000
    run = mlflow.search_runs(experiment_names=["s2t"]).iloc[0]
    assert run["metrics.hit_8_at_5pct"] == pytest.approx(hit[0.05, 8])


def test_results_give_the_error_split_alignment_and_agreement(store: str, tmp_path: Path) -> None:
    results = recorded_results(tmp_path / "results.parquet")
    output = tmp_path / "analysis"
    assert main([str(results), "--output", str(output), "--tracking", store]) == 0
    frame, _ = read_results(results)
    table = pd.read_csv(output / "decisions.csv").set_index("policy")
    for policy in ("s2t", "s2t-local", "takeover"):
        decisions = [d for text in frame[frame["policy"] == policy]["decisions"] for d in json.loads(text)]
        disagree = np.mean([d["chosen"] != d["argmax"] for d in decisions])
        assert table.loc[policy, "selection_error"] == pytest.approx(disagree)
        assert table.loc[policy, "hit_error"] == 0.0
        assert table.loc[policy, "decisions"] == len(decisions) == 240
    assert table.loc["s2t-local", "agree_at_1"] == pytest.approx(1 - table.loc["s2t-local", "selection_error"])
    groups = pd.read_csv(output / "agreement.csv").set_index(["policy", "group"])["accuracy"]
    assert groups["s2t-local", "agree"] > groups["s2t-local", "disagree"]
    for stem in ("embedded-s2t-local-rescue", "embedded-s2t-local-score-by-rank", "agreement", "decision-error-split"):
        assert (output / f"{stem}.png").stat().st_size > 5000
    assert (output / "embedded-accuracy-over-tau.png").is_file()


def test_answers_that_selecting_turned_get_pages_of_their_own(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(load_recipe(RECIPE).slm)
    ids = tokenizer.encode("On Friday we add 7 and get 42+7=49 caf\u00e9s. The answer is \\boxed{49}.")
    items = load("embedded", None)[1][:ITEMS]
    recorded = recorded_results(tmp_path / "recorded.parquet", {"s2t@0.05": "s2t-local@0.05:new"})
    rows = pq.read_table(recorded).to_pylist()
    for row in rows:
        row |= {"item": items[int(row["item"].split("/")[1])].uid, "output_ids": ids}
        row |= {"kind": "s2t-local:new"} if row["policy"].endswith(":new") else {}
    write_results(tmp_path / "results.parquet", rows, read_results(recorded)[1])
    output = tmp_path / "analysis"
    options = ["--output", str(output), "--tracking", store, "--pages", "3"]
    assert main([str(tmp_path / "results.parquet"), *options]) == 0
    assert f" answers: {output / 'pages' / 'index.html'}\n" in capsys.readouterr().out

    verdicts = {(row["policy"], row["item"], row["seed"]): row["verdict"] == "correct" for row in rows}
    index = (output / "pages" / "index.html").read_text()
    files = sorted(path.name for path in (output / "pages").iterdir() if path.name != "index.html")
    assert sorted(re.findall(r'href="([^"]+)"', index)) == files
    expected = 0
    for policy in ("s2t", "s2t-local@0.05:new", "s2t-local"):
        turned = [key for key in verdicts if key[0] == policy and verdicts[key] != verdicts["greedy", *key[1:]]]
        for right, name in ((True, "rescued"), (False, "flipped")):
            number = min(3, sum(verdicts[key] is right for key in turned))
            assert sum(file.endswith(f"-{name}-{policy.replace(':', '_')}.html") for file in files) == number
            expected += number
    assert len(files) == expected > 6
    for file in files:
        page = (output / "pages" / file).read_text()
        (data,) = re.findall(r'<script type="application/json" id="trajectories">(.*?)</script>', page)
        greedy, other = (SavedTrajectory.model_validate(one) for one in json.loads(data))
        named = file.removesuffix(".html").split("-", 2)[2]
        assert (greedy.policy, other.policy.replace(":", "_")) == ("greedy", named)
        assert (greedy.verdict == "correct", other.verdict == "correct") == ("flipped" in file, "rescued" in file)
        assert other.prompt == next(item.question for item in items if item.uid == other.item)
        assert "".join(text for text, _ in other.tokens) == tokenizer.decode(ids)
        assert {step for step, (_, source) in enumerate(other.tokens) if source == "selected"} == {
            decision.step for decision in other.decisions
        }
        for decision in other.decisions:
            assert decision.texts_K == [tokenizer.decode([token]) for token in decision.candidates_K]
    (run,) = mlflow.search_runs(experiment_names=["s2t"], output_format="list")
    logged = mlflow.MlflowClient().list_artifacts(run.info.run_id, "pages")
    assert {Path(entry.path).name for entry in logged} == {"index.html", *files}

    assert main([str(tmp_path / "results.parquet"), *options[:-1], "0"]) == 0
    assert not (output / "pages").exists(), "pages of another analysis"


def test_errors_cumulated_over_steps_are_those_of_a_loop_over_answers() -> None:
    """Eqs. 11 and 12 spelt out: at a step without a decision the candidates are the one token that was written."""
    rng = np.random.default_rng(0)
    answers = []
    for length in (8, 9, 1):
        ids, argmax = rng.integers(0, 4, length), rng.integers(0, 4, length)
        steps = rng.permutation(length)[: length // 2]
        decisions = [
            {"step": int(t), "candidates_K": sorted({int(ids[t]), *rng.integers(0, 4, 3).tolist()})} for t in steps
        ]
        answers.append((ids, decisions, argmax))
    hit, selection = np.zeros(9), np.zeros(9)
    for ids, decisions, argmax in answers:
        candidates = {decision["step"]: decision["candidates_K"] for decision in decisions}
        for t in range(len(ids)):
            if argmax[t] not in candidates.get(t, [ids[t]]):
                hit[t:] += 1 / 3
            elif ids[t] != argmax[t]:
                selection[t:] += 1 / 3
    found = cumulated(step_errors(*answer) for answer in answers)
    assert found.answers == 3
    assert found.hit_T == pytest.approx(hit)
    assert found.selection_T == pytest.approx(selection)
    assert selection[-1] > 0


def test_the_table_of_decisions_has_the_mean_candidates_and_how_often_they_hold_the_teachers_token(
    tmp_path: Path,
) -> None:
    frame, metadata = read_results(recorded_results(tmp_path / "results.parquet"))
    frame = frame[frame["policy"] == "s2t"].copy()
    changed = [json.loads(text) for text in frame["decisions"]]
    for number, decision in enumerate(d for answer in changed for d in answer):
        if number % 4 == 0:  # two candidates, without the teacher's token
            keep = [i for i, c in enumerate(decision["candidates_K"]) if c not in (decision["argmax"], 13)][:2]
            for key in ("candidates_K", "logprobs_K", "scores_K", "preferences_K", "teacher_K"):
                decision[key] = [decision[key][i] for i in keep]
            decision["chosen"] = decision["candidates_K"][1]
    frame["decisions"] = [json.dumps(answer) for answer in changed]
    (row,) = tables([(frame, metadata)])["decisions"]
    assert row["candidates"] == pytest.approx(0.75 * 4 + 0.25 * 2)
    assert row["hit"] == pytest.approx(0.75)
    ranks = selected_ranks([d for answer in changed for d in answer])
    assert ranks[::4] == [1] * 60


def test_scores_are_sorted_by_the_teachers_rank() -> None:
    decision = {"scores_K": [0.1, 0.9, 0.5]}
    ranked = scores_by_rank([(decision, np.array([0.2, 0.7, 0.1])), (decision, np.array([0.6, 0.3, 0.1]))])
    assert ranked[:4] == [[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], []]


def test_several_results_make_curves_over_k(tmp_path: Path) -> None:
    files = []
    for k in (2, 8):
        recipe = load_recipe(RECIPE, [f"candidates.k={k}"])
        path = recorded_results(tmp_path / f"k{k}.parquet", None, **{"s2t.recipe": recipe.model_dump_json()})
        files.append(read_results(path))
    rows = [row for row in tables(files)["accuracy"] if row["policy"] == "s2t" and row["tau"] == 0.10]
    assert sorted(row["k"] for row in rows) == [2, 8]


def test_the_audit_adds_what_the_teacher_thinks_of_each_choice() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from s2t_models.engines.load import load as load_engine
    from s2t_models.hosting import Hosted

    recipe = load_recipe(RECIPE)
    tokenizer = load_tokenizer(recipe.teacher)
    engine = load_engine(Hosted("teacher", recipe.teacher))
    prompt, output = tokenizer.encode("How many apples are 3 + 4?"), tokenizer.encode("There are 7 apples in all")
    decisions = [
        {"step": 1, "candidates_K": [output[1], 5, 6], "chosen": output[1], "argmax": None},
        {"step": 3, "candidates_K": [9, output[3]], "chosen": output[3], "argmax": None},
    ]
    try:
        view = asyncio.run(judge(decisions, prompt, output, engine))
    finally:
        engine.close()
    import torch

    from s2t_models.loading import load_model

    model = load_model(recipe.teacher)
    assert isinstance(model, Qwen2ForCausalLM)
    assert isinstance(model.config, Qwen2Config)
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    assert view.argmax_T.tolist() == logits_TV.argmax(-1).tolist()
    written_T = logits_TV.softmax(-1)[torch.arange(len(output)), output]
    assert view.on_written_T.tolist() == pytest.approx(written_T.tolist(), abs=1e-5)
    for decision in decisions:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output[: decision["step"]]])).logits[0, -1].float()
        assert decision["argmax"] == int(logits.argmax())
        assert decision["teacher_K"] == pytest.approx(logits.softmax(-1)[decision["candidates_K"]].tolist(), abs=1e-5)


def test_the_audit_reads_the_recorded_ids_and_not_the_text() -> None:
    """Ids that the text would not give back: the same words, tokenised otherwise."""
    recipe = load_recipe(RECIPE)
    tokenizer = load_tokenizer(recipe.slm)
    item = load("embedded", None)[1][0]
    ids = [tokenizer.encode(character)[0] for character in "There are"]
    assert tokenizer.encode("There are") != ids
    decision = {
        "step": 3,
        "candidates_K": [ids[3], 5],
        "logprobs_K": [-0.1, -3.0],
        "scores_K": [0.9, 0.1],
        "preferences_K": [0.9, 0.1],
        "chosen": ids[3],
        "argmax": None,
        "teacher_K": None,
    }
    row = {"task": "embedded", "item": item.uid, "policy": "s2t-local", "output": "There are"}
    rows = [row | {"decisions": json.dumps([decision]), "output_ids": known} for known in (ids, None)]
    whole = audit(pd.DataFrame(rows), recipe, prompts_of(pd.DataFrame(rows), recipe, None))
    audited = [json.loads(text)[0] for text in whole["decisions"]]
    assert len(audited[0]["teacher_K"]) == 2
    assert audited[0]["argmax"] is not None
    assert audited[1] == decision, "without ids a row stays as it was"
    assert whole[TEACHER_ARGMAX][0][3] == audited[0]["argmax"]
    assert (len(whole[TEACHER_ARGMAX][0]), whole[TEACHER_ARGMAX][1]) == (len(ids), None)


def test_wrong_answers_are_counted_by_where_they_first_go_wrong(store: str, tmp_path: Path) -> None:
    """The teacher's own answer with another number in one place: the trigger fired there, before it, or not at all."""
    import torch

    from s2t_models import chat
    from s2t_models.loading import load_model

    recipe = load_recipe(RECIPE)
    tokenizer, item = load_tokenizer(recipe.slm), load("embedded", None)[1][0]
    prompt = chat.prompt_ids(tokenizer, item.prompt)
    sure = load_model(recipe.teacher).generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)
    ids = sure[0, len(prompt) :].tolist()
    slip = next(t for t, token in enumerate(ids) if tokenizer.decode([token]) == "=") + 1
    slipped = [*ids[:slip], tokenizer.encode("+")[0], *ids[slip + 1 :]]

    def answer(policy: str, ids: list[int] | None, step: int | None, verdict: str = "wrong") -> dict[str, object]:
        return {"policy": policy, "output_ids": ids, "step": step, "verdict": verdict}

    local, routed = "s2t-local@0.05", "r2r"
    answers = [
        *(answer(local, slipped, step) for step in (slip, slip, slip - 1, slip + 1, None)),
        answer(local, ids, slip),
        answer(local, None, slip),
        *(answer(local, slipped, slip, verdict) for verdict in ("correct", "truncated")),
        answer(routed, slipped, None),
        answer(routed, ids, 3, "correct"),
        answer("greedy", slipped, None),
    ]
    recorded = recorded_results(tmp_path / "recorded.parquet")
    rows = pq.read_table(recorded).to_pylist()[: len(answers)]
    for row, changes in zip(rows, answers, strict=True):
        step = changes.pop("step")
        decided = [] if step is None else [{"step": step, "candidates_K": [], "teacher_K": None}]
        row |= {**changes, "item": item.uid, "decisions": json.dumps(decided)}
    write_results(tmp_path / "results.parquet", rows, read_results(recorded)[1])
    output = tmp_path / "analysis"
    options = ["--output", str(output), "--tracking", store, "--pages", "0"]
    assert main([str(tmp_path / "results.parquet"), *options, "--audit"]) == 0
    table = pd.read_csv(output / "first_wrong.csv").set_index("policy").drop(columns="task")
    assert table.to_dict("index") == {
        local: {"wrong": 7, "read": 6, "at_triggered": 2, "elsewhere": 3, "nowhere": 1},
        routed: {"wrong": 1, "read": 1, "at_triggered": 0, "elsewhere": 1, "nowhere": 0},
    }
    (run,) = mlflow.search_runs(experiment_names=["s2t"], output_format="list")
    assert run.data.metrics["first_wrong_at_triggered/embedded/s2t-local at 0.05"] == 2
    assert run.data.metrics["first_wrong_elsewhere/embedded/r2r"] == 1

    frame, _ = read_results(tmp_path / "results.parquet")
    assert first_wrong_rows(frame) == [], "the teacher was not asked"
    wrong = readable(frame)
    assert wrong["policy"].tolist() == [local] * 6 + [routed], "of policies with a trigger, and with their ids"
    views = pd.Series(read(wrong, recipe, prompts_of(wrong, recipe, None)), index=wrong.index)
    split = {row["policy"]: row for row in first_wrong_rows(frame.assign(**{TEACHER_ON_WRITTEN: views}))}
    for policy, row in split.items():
        assert {key: row[key] for key in table.columns} == table.loc[policy].to_dict(), (
            "as an audit of all answers says"
        )
    assert set(split) == {local, routed}


def test_a_policy_without_wrong_answers_has_none_that_go_wrong(tmp_path: Path) -> None:
    frame, _ = read_results(recorded_results(tmp_path / "results.parquet"))
    frame = frame[frame["policy"].isin(["s2t", "takeover"])].assign(verdict="correct", **{TEACHER_ON_WRITTEN: None})
    counts = {"wrong": 0, "read": 0, "at_triggered": 0, "elsewhere": 0, "nowhere": 0}
    assert first_wrong_rows(frame) == [{"task": "embedded", "policy": name} | counts for name in ("s2t", "takeover")]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = tmp_path / "noise.parquet"
    noise.write_text("noise")
    for path, words in (
        (tmp_path / "nothing", "no such collection of shards or results file"),
        (noise, "not a results file"),
        (tmp_path, "no such folder"),
    ):
        assert main([str(path), "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


def test_results_in_which_every_row_errored_end_with_1_and_the_reason(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(recorded_results(tmp_path / "results.parquet"))
    metadata = read_results(tmp_path / "results.parquet")[1]
    rows = [row | {"verdict": "errored", "error": "400: no\nsuch thing"} for row in table.to_pylist()]
    write_results(tmp_path / "errored.parquet", rows, metadata)
    output = tmp_path / "analysis"
    assert main([str(tmp_path / "errored.parquet"), "--output", str(output), "--tracking", store]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"analyse: {tmp_path / 'errored.parquet'}: all {len(rows)} rows errored (the first: 400: no such thing)"
    )
    assert said.count("\n") == 1
    assert not output.exists()


def test_results_hold_any_text(tmp_path: Path) -> None:
    (row, *_) = pq.read_table(recorded_results(tmp_path / "results.parquet")).to_pylist()
    write_results(tmp_path / "odd.parquet", [row | {"output": "a\ud83d", "samples": ["\udc00", "b"]}], {})
    (back,) = read_results(tmp_path / "odd.parquet")[0].to_dict("records")
    assert back["output"] == "a\ufffd"
    assert list(back["samples"]) == ["\ufffd", "b"]
