"""The paper's tables and figures from answers whose numbers are known: each figure is where the paper has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from recorded import RECIPE

from pipelines.data.layout import COLLECTED, RESULTS, SHARDS
from pipelines.data.schema import SHARD
from pipelines.data.shards import shard_metadata, shard_name, write_shard
from pipelines.paper.drawings import Drawing
from pipelines.paper.evidence import Evidence
from pipelines.paper.job import given
from pipelines.paper.runs import Run, Runs
from pipelines.paper.specs import chosen
from pipelines.paper.tables import Table
from pipelines.results.summary import write_results
from s2t_models.recipe import load_recipe

TASKS = ("gsm8k", "math500", "olympiadbench", "aime25")
#: Questions that each policy was asked.
ASKED = 20
TAUS = (1, 2, 5, 10, 20)
#: How many of the questions were right at each budget, by what the paper calls it.
OVER_TAU = {
    "Takeover": (5, 7, 9, 11, 13),
    "S2T (2)": (1, 2, 3, 4, 5),
    "S2T (4)": (2, 4, 6, 8, 10),
    "S2T (8)": (4, 8, 10, 12, 14),
    "S2T (16)": (6, 9, 12, 15, 18),
}
#: How many of four decisions had the teacher's token among the candidates.
HELD = {2: (0, 0, 1, 1, 2), 4: (1, 1, 2, 2, 2), 8: (2, 3, 3, 3, 4), 16: (3, 3, 4, 4, 4)}
BY_TRIGGER = {
    ("Random", "Takeover"): (3, 3, 4, 5, 6),
    ("Random", "S2T"): (2, 3, 3, 4, 5),
    ("SLM Entropy", "Takeover"): (4, 5, 7, 9, 11),
    ("SLM Entropy", "S2T"): (3, 5, 6, 7, 8),
}
#: The SLM's probability of what is selected, the teacher's and the selector's score, all of a hundred.
SELECTED = {1: (20, 90, 80), 2: (25, 85, 75), 5: (30, 80, 70), 10: (40, 75, 65), 20: (50, 70, 60)}


def decision(
    candidates: int = 4, holds: bool = True, agrees: bool = True, selected: tuple[float, float, float] = (30, 60, 50)
) -> dict[str, Any]:
    """The token with id 1 is selected: of these probabilities by the SLM and the teacher, and with this score. The SLM
    prefers id 0, the teacher id 1 where the choice `agrees`; its own token is 1 where the candidates hold it."""
    slm, teacher, score = (one / 100 for one in selected)
    rest = [0.0] * (candidates - 2)
    other = 0.5 * teacher if agrees else 1.5 * teacher
    return {
        "step": 1,
        "value": 1.0,
        "candidates_K": list(range(candidates)),
        "logprobs_K": np.log([0.6, slm, *(0.001 for _ in rest)]).tolist(),
        "scores_K": [0.1, score, *rest],
        "preferences_K": [0.1, score, *rest],
        "teacher_K": [other, teacher, *rest],
        "chosen": 1,
        "argmax": 1 if holds else 99,
    }


def answers(
    policy: str,
    right: int,
    task: str = "math500",
    tokens: int = 40,
    seconds: float = 2.0,
    seed: int = 0,
    decisions: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Twenty, the first of them right; `tokens` and `seconds` are their means, the first has the decisions."""
    return [
        {
            "key": f"{policy}/{task}/{seed}/{item}",
            "task": task,
            "item": f"{task}/{item}",
            "policy": policy,
            "kind": policy,
            "seed": seed,
            "repeat": 0,
            "verdict": "correct" if item < right else "wrong",
            "score": float(item < right),
            "shortened": False,
            "tokens": tokens + (-1) ** item,
            "usage": "{}",
            "decisions": json.dumps([] if item else list(decisions)),
            "seconds": seconds * (0.5 if item % 2 else 1.5),
        }
        for item in range(ASKED)
    ]


def budgets() -> list[dict[str, Any]]:
    """Takeover, S2T over K, and S2T-Local with 8 candidates, at each budget."""
    rows = []
    for name, counts in OVER_TAU.items():
        for place, (tau, right) in enumerate(zip(TAUS, counts, strict=True)):
            k = int(name.removeprefix("S2T (").removesuffix(")")) if name.startswith("S2T") else 0
            made = [decision(k, number < HELD[k][place], True, SELECTED[tau]) for number in range(4)] if k else []
            rows += answers(f"s2t-k{k}@{tau / 100:g}" if k else f"takeover@{tau / 100:g}", right, decisions=made)
    for tau, (slm, teacher, score) in SELECTED.items():
        made = [decision(8, True, True, (slm / 2, teacher / 2, score))]
        rows += answers(f"s2t-local-k8@{tau / 100:g}", 7, decisions=made)
    return rows


def triggers() -> list[dict[str, Any]]:
    rows = []
    for (trigger, system), counts in BY_TRIGGER.items():
        metric = {"Random": "random", "SLM Entropy": "entropy"}[trigger]
        stem = {"Takeover": f"takeover-{metric}", "S2T": f"s2t-{metric}-k8"}[system]
        for tau, right in zip(TAUS, counts, strict=True):
            rows += answers(f"{stem}@{tau / 100:g}", right)
    return rows


def four(agreed: int) -> list[dict[str, Any]]:
    """Four decisions of which so many choose what the teacher would."""
    return [decision(agrees=number < agreed) for number in range(4)]


def record(runs: Runs, part: str, rows: list[dict[str, Any]]) -> None:
    """The results that a benchmark of the matrix would leave."""
    folder = runs.folder(Run("benchmark", part))
    folder.mkdir(parents=True)
    write_results(folder / RESULTS, rows, {"s2t.recipe": runs.benchmark_recipe(part).model_dump_json()})


def runs_of(tmp_path: Path, *tasks: str) -> Runs:
    """Those of the matrix that ships, on these tasks."""
    return Runs(given(load_recipe(RECIPE), tmp_path / "out", tasks=tasks, items=ASKED))


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    """What the runs of the matrix that ships would leave, where the tables below look for it."""
    runs = runs_of(tmp_path, *TASKS)
    by_task = zip(TASKS, (10, 8, 4, 2), (16, 12, 6, 4), strict=True)
    main = [
        row
        for task, greedy, local in by_task
        for policy, right in (("greedy", greedy), ("s2t-local", local))
        for row in answers(policy, right, task, decisions=four(1) if policy == "s2t-local" else ())
    ]
    s2t = [decision(selected=(10, 70, 50)), decision(selected=(60, 20, 50), agrees=False)]
    record(runs, "main", [*main, *answers("s2t", 15, decisions=s2t)])
    record(runs, "budgets", budgets())
    record(runs, "triggers", triggers())
    swept = {
        "r8-b30": (9, 8, 2),
        "r12-b30": (10, 7, 3),
        "r16-b5": (3, 2, 1),
        "r16-b30": (11, 6, 4),
        "r16-b70": (8, 5, 0),
    }
    of_sweep = [
        row
        for name, (right, _, agreed) in swept.items()
        for row in answers(f"s2t-local:{name}", right, decisions=four(agreed))
    ]
    record(runs, "sweep", of_sweep)
    record(runs, "sweep-greedy", [row for name, (_, right, _) in swept.items() for row in answers(f"ft-{name}", right)])
    several = [decision(2, holds=False), decision(3), decision(4), decision(7)]
    drawn = {"t0.6-p0.7": (2, 5, 1), "t0.6-p0.95": (3, 6, 2), "t1-p0.7": (4, 7, 3), "t1-p0.95": (5, 8, 4)}
    record(
        runs,
        "candidates",
        [
            *answers("s2t-dynamic-01@0.01", 10, decisions=several),
            *answers("s2t-dynamic-05@0.01", 9, decisions=[decision(2), decision(3)]),
            *(
                row
                for name, (size, right, held) in drawn.items()
                for row in answers(
                    f"s2t-{name}-k8@0.01", right, decisions=[decision(size, number < held) for number in range(4)]
                )
            ),
            *answers("s2t-t1-p1-k8@0.01", 13, decisions=[decision(8)]),
        ],
    )
    tuned = {
        "no-margin-filter": (9, 3),
        "pointwise": (8, 2),
        "head-only": (4, 0),
        "listmle": (7, 1),
        "soft-labels": (10, 4),
    }
    record(
        runs,
        "ablations",
        [
            row
            for name, (right, agreed) in tuned.items()
            for row in answers(f"s2t-local:{name}", right, decisions=four(agreed))
        ],
    )
    costs = {
        "greedy": (100, 2.0),
        "llm": (120, 8.0),
        "specreason": (110, 9.0),
        "takeover": (120, 16.0),
        "s2t": (125, 12.0),
        "s2t-local": (90, 4.0),
    }
    record(runs, "latency", [row for name, cost in costs.items() for row in answers(name, 5, "gsm8k", *cost)])
    by_k = {2: (1, 2, 3, 4, 5), 4: (2, 3, 4, 5, 6), 8: (3, 4, 5, 6, 7), 16: (4, 5, 6, 7, 8)}
    record(
        runs,
        "local-latency",
        [
            row
            for k, seconds in by_k.items()
            for tau, one in zip(TAUS, seconds, strict=True)
            for row in answers(f"s2t-local-k{k}@{tau / 100:g}", 5, seconds=one)
        ]
        + answers("greedy", 5, seconds=0.5),
    )
    by_seed = zip((0, 1, 2), (10, 12, 14), strict=True)
    record(
        runs,
        "seeds",
        [
            row
            for seed, greedy in by_seed
            for policy, right in (
                ("greedy", greedy),
                ("s2t-local", 12),
                ("s2t-local:seed-1", 14),
                ("s2t-local:seed-2", 16),
            )
            for row in answers(policy, right, seed=seed)
        ],
    )
    states(runs.folder(Run("collection", "states", "math500")))
    return Evidence(runs)


#: The teacher's ranks at the steps of highest KL, and at those of highest entropy, from the highest on; 0 at others.
RANK_BY_KL = (3, 0, 9, 1, 0, *[2] * 10, *[0] * 5)
RANK_BY_ENTROPY = (0, 8, 1, 0, 0, *[8] * 3, *[0] * 12)


def states(folder: Path) -> None:
    """A hundred steps: KL falls from the first on, entropy rises up to the last."""
    ranks = [*RANK_BY_KL, *[0] * 60, *reversed(RANK_BY_ENTROPY)]
    rows = [
        {
            "uid": f"p/{part}",
            "output_ids": [3] * 50,
            "kl_T": [float(100 - step) for step in range(50 * part, 50 * part + 50)],
            "entropy_T": [float(step) for step in range(50 * part, 50 * part + 50)],
            "teacher_rank_T": ranks[50 * part : 50 * part + 50],
            "error": None,
        }
        for part in (0, 1)
    ]
    (folder / SHARDS).mkdir(parents=True)
    metadata = shard_metadata(load_recipe(RECIPE), "a", "b", "c", "math500")
    write_shard(folder / SHARDS / shard_name(0, 1), pa.Table.from_pylist(rows, schema=SHARD), metadata)
    (folder / COLLECTED).write_text("{}")


def cells(evidence: Evidence, name: str, task: str = "math500") -> dict[tuple[str, str], float | None]:
    """Our figures in a table's column of that task, by line and metric."""
    (spec,) = chosen((name,))
    built = cast(Table, spec.build(evidence, spec))
    return {
        (cell.method, cell.metric): None if cell.ours is None else round(cell.ours.value, 6)
        for cell in built.cells
        if cell.task == task
    }


def drawing(evidence: Evidence, name: str) -> Drawing:
    (spec,) = chosen((name,))
    return cast(Drawing, spec.build(evidence, spec))


def test_the_maths_average_is_of_four_tasks_that_count_alike(evidence: Evidence) -> None:
    averages = cells(evidence, "1", "maths average")
    assert averages["Greedy", "accuracy"] == 30  # of 50, 40, 20 and 10
    assert averages["S2T-Local", "accuracy"] == 47.5  # of 80, 60, 30 and 20
    assert averages["S2T", "accuracy"] is None, "it was asked one of the four"
    assert cells(evidence, "1", "olympiadbench")["S2T-Local", "accuracy"] == 30


def test_tokens_and_seconds_are_means_and_what_is_compared_is_relative(evidence: Evidence) -> None:
    third, whole = cells(evidence, "3", "math500"), cells(evidence, "A13", "gsm8k")
    assert set(third.values()) == {None}, "only gsm8k was asked"
    assert whole == {
        **{("SLM (Greedy)", "tokens"): 100, ("SLM (Greedy)", "seconds"): 2},
        **{("LLM (Greedy)", "tokens"): 120, ("LLM (Greedy)", "seconds"): 8},
        **{("SpecReason", "tokens"): 110, ("SpecReason", "seconds"): 9},
        **{("Takeover", "tokens"): 120, ("Takeover", "seconds"): 16},
        **{("S2T", "tokens"): 125, ("S2T", "seconds"): 12},
        **{("S2T-Local", "tokens"): 90, ("S2T-Local", "seconds"): 4},
        **{("S2T-Local vs. Takeover, %", "tokens"): -25, ("S2T-Local vs. Takeover, %", "seconds"): -75},
    }


def test_seconds_over_k_and_the_budget(evidence: Evidence) -> None:
    found = cells(evidence, "A14")
    assert found["SLM greedy", "seconds"] == 0.5
    assert [found[f"S2T-Local (2), tau = {tau}%", "seconds"] for tau in TAUS] == [1, 2, 3, 4, 5]
    assert [found[f"S2T-Local (16), tau = {tau}%", "seconds"] for tau in TAUS] == [4, 5, 6, 7, 8]
    assert len(found) == 21


def test_the_sweep_has_accuracy_with_the_selector_without_it_and_agreement(evidence: Evidence) -> None:
    first = cells(evidence, "A1")
    lines = {"R = 8, beta = 30", "R = 12, beta = 30", "R = 16, beta = 5", "R = 16, beta = 30", "R = 16, beta = 70"}
    assert {line for line, _ in first} == lines
    metrics = ("S2T-Local", "FT Greedy", "Agree@1")
    assert [first["R = 8, beta = 30", metric] for metric in metrics] == [45, 40, 50]
    assert [first["R = 16, beta = 5", metric] for metric in metrics] == [15, 10, 25]
    assert [first["R = 16, beta = 70", metric] for metric in metrics] == [40, 25, 0]
    second = cells(evidence, "A2")
    assert [second["R = 12", metric] for metric in metrics] == [50, 35, 75]
    assert [second["R = 16", metric] for metric in metrics] == [55, 30, 100]


def test_accuracy_over_k_and_the_budget(evidence: Evidence) -> None:
    found = cells(evidence, "A3")
    shares = {name: [100 * right / ASKED for right in counts] for name, counts in OVER_TAU.items()}
    assert {name: [found[f"{name}, tau = {tau}%", "accuracy"] for tau in TAUS] for name in OVER_TAU} == shares
    assert len(found) == 25


def test_sets_of_candidates_have_their_mean_size_and_how_often_they_hold_the_teachers_token(evidence: Evidence) -> None:
    dynamic = cells(evidence, "A4")
    metrics = ("Avg. |C|", "Hit@C", "accuracy")
    assert [dynamic["Dynamic (1%), tau = 1%", metric] for metric in metrics] == [4, 75, 50]
    assert [dynamic["Dynamic (5%), tau = 1%", metric] for metric in metrics] == [2.5, 100, 45]
    assert [dynamic["Fix. (8), tau = 1%", metric] for metric in metrics] == [8, 50, 20], "of the benchmark `budgets`"
    assert [dynamic["Fix. (8), tau = 10%", metric] for metric in metrics] == [8, 75, 60]
    drawn = cells(evidence, "A15")
    assert [drawn["Sampling, T = 0.6, top-p = 0.7", metric] for metric in metrics] == [2, 25, 25]
    assert [drawn["Sampling, T = 1, top-p = 0.95", metric] for metric in metrics] == [5, 100, 40]
    assert [drawn["S2T, T = 1, top-p = 1", metric] for metric in metrics] == [8, 100, 65]


def test_triggers_over_the_budget(evidence: Evidence) -> None:
    found = cells(evidence, "A10")
    for (trigger, system), counts in BY_TRIGGER.items():
        shown = [found[f"{trigger}, {system}, tau = {tau}%", "accuracy"] for tau in TAUS]
        assert shown == [100 * right / ASKED for right in counts]
    assert [found[f"KLD, S2T, tau = {tau}%", "accuracy"] for tau in TAUS] == [20, 40, 50, 60, 70]
    assert [found[f"KLD, Takeover, tau = {tau}%", "accuracy"] for tau in TAUS] == [25, 35, 45, 55, 65]
    assert len(found) == 30


def test_hit_rates_are_taken_at_the_steps_that_each_trigger_picks(evidence: Evidence) -> None:
    metrics = ("Hit@1", "Hit@8", "accuracy")
    one = cells(evidence, "A11")
    assert [one["KL Divergence", metric] for metric in metrics] == [0, 100, 20]  # one step, of rank 3
    assert [one["SLM Entropy", metric] for metric in metrics] == [100, 100, 15]  # one step, of rank 0
    assert one["Random", "accuracy"] == 10
    assert one["Random", "Hit@1"] in (0, 100)
    over = cells(evidence, "A12")
    assert [over[f"KLD, tau = {tau}%", "Hit@8"] for tau in (1, 5, 20)] == [100, 80, 95]
    assert [over[f"SLM Entropy, tau = {tau}%", "Hit@8"] for tau in (1, 5, 20)] == [100, 80, 80]
    assert [over[f"KLD, tau = {tau}%", "accuracy"] for tau in (1, 5, 20)] == [20, 50, 70]
    assert [over[f"SLM Entropy, tau = {tau}%", "accuracy"] for tau in (1, 5, 20)] == [15, 30, 40]


def test_training_strategies_have_accuracy_and_agreement(evidence: Evidence) -> None:
    found = cells(evidence, "D.4")
    assert {line: (found[line, "accuracy"], found[line, "Agree@1"]) for line, _ in found} == {
        "Selector (Eq. 7, margin filter)": (60, 25),
        "Without the margin filter": (45, 75),
        "Pointwise": (40, 50),
        "Head only": (20, 0),
        "ListMLE": (35, 25),
        "Soft labels": (50, 100),
    }


def test_figure_1_shows_accuracy_and_hits_over_k_and_over_the_budget(evidence: Evidence) -> None:
    found = drawing(evidence, "figure-1")
    rows = {row["policy"]: row for row in found.rows if row["task"] == "math500"}
    assert len(rows) == 25
    assert (rows["takeover@0.05"]["tau"], rows["takeover@0.05"]["accuracy"]) == (0.05, 45)
    assert "hit" not in rows["takeover@0.05"]
    assert (rows["s2t-k16@0.2"]["accuracy"], rows["s2t-k16@0.2"]["hit"]) == (90, 100)
    assert (rows["s2t-k2@0.05"]["accuracy"], rows["s2t-k2@0.05"]["hit"]) == (15, 25)
    assert rows["s2t-k2@0.05"]["low"] < 15 < rows["s2t-k2@0.05"]["high"]

    def lines(panel: str) -> dict[str, list[tuple[float, float]]]:
        (axes,) = found.figures[f"{panel}-math500"].axes
        return {
            str(line.get_label()): list(zip(*(np.round(xy, 6).tolist() for xy in line.get_data()), strict=True))
            for line in axes.get_lines()
        }

    assert lines("b") == {  # over K, at 1%
        "hit rate": [(2, 0), (4, 25), (8, 50), (16, 75)],
        "accuracy": [(2, 5), (4, 10), (8, 20), (16, 30)],
    }
    assert lines("c") == {  # over tau, with 8 candidates
        "hit rate": [(1, 50), (2, 75), (5, 75), (10, 75), (20, 100)],
        "accuracy": [(1, 20), (2, 40), (5, 50), (10, 60), (20, 70)],
    }


def test_figure_4_shows_what_is_selected_over_the_budget_and_each_decision(evidence: Evidence) -> None:
    found = drawing(evidence, "figure-4")
    means = {(row["policy"], row["of"]): row["mean"] for row in found.rows if row["task"] == "math500"}
    for tau, (slm, teacher, score) in SELECTED.items():
        s2t, local = f"s2t-k8@{tau / 100:g}", f"s2t-local-k8@{tau / 100:g}"
        assert (means[s2t, "SLM"], means[s2t, "teacher"]) == pytest.approx((slm, teacher))
        assert [means[local, of] for of in ("SLM", "teacher", "score")] == pytest.approx([slm / 2, teacher / 2, score])
        assert (s2t, "score") not in means
    assert len(means) == 25
    (axes,) = found.figures["b-math500-s2t"].axes
    kept, rescues = (np.asarray(marks.get_offsets()) for marks in axes.collections)
    assert len(kept) == 0, "the SLM's own first is another token"
    assert rescues.round(6).tolist() == [[0.1, 0.7], [0.6, 0.2]]  # the SLM's probability and the teacher's


def test_deviations_are_over_the_seeds_that_a_policy_was_asked_with_and_over_trainings(evidence: Evidence) -> None:
    assert cells(evidence, "A6") == {
        **{("Greedy", "accuracy"): 60, ("Greedy", "deviation"): 10},  # 50, 60 and 70
        **{("S2T-Local", "accuracy"): 60, ("S2T-Local", "deviation"): 0},  # 60 with each seed
        **{("S2T-Local, three trainings", "accuracy"): 70, ("S2T-Local, three trainings", "deviation"): 10},
    }
    assert cells(evidence, "A6", "gsm8k")["Greedy", "deviation"] is None


def test_beyond_maths_the_embedded_pair_is_asked_its_own_other_problems(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "embedded")
    stand_ins = ("embedded-hard", "embedded-held-out")
    assert runs.benchmark_recipe("beyond").benchmark.task == stand_ins
    assert runs.benchmark_recipe("main").benchmark.task == ("embedded",)
    right = {"embedded-hard": (2, 5, 9), "embedded-held-out": (4, 7, 20)}
    rows = [
        row
        for task, counts in right.items()
        for policy, count in zip(("greedy", "s2t-local", "s2t"), counts, strict=True)
        for row in answers(policy, count, task)
    ]
    record(runs, "beyond", rows)
    lines = ("SLM Greedy", "S2T-Local", "S2T")
    for task, shares in (("embedded-hard", (10, 25, 45)), ("embedded-held-out", (20, 35, 100))):
        expected = {(line, "accuracy"): share for line, share in zip(lines, shares, strict=True)}
        assert cells(Evidence(runs), "A5", task) == expected, "nobody rates them"


def test_beyond_maths_each_task_has_its_own_metric_and_maths_does_not_stand_in(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, "gsm8k", "mt_bench", "truthfulqa")
    assert runs.benchmark_recipe("beyond").benchmark.task == ("mt_bench", "truthfulqa")
    assert runs.benchmark_recipe("main").benchmark.task == ("gsm8k",)
    record(runs, "beyond", [*answers("s2t", 13, "mt_bench"), *answers("s2t", 8, "truthfulqa")])
    evidence = Evidence(runs)
    assert cells(evidence, "A5", "mt_bench")["S2T", "rating"] == 6.5
    assert {metric for _, metric in cells(evidence, "A5", "mt_bench")} == {"rating"}
    assert cells(evidence, "A5", "truthfulqa")["S2T", "accuracy"] == 40
    assert {metric for _, metric in cells(evidence, "A5", "truthfulqa")} == {"accuracy"}

    maths = runs_of(tmp_path, "math500")
    assert str(maths.never(Run("benchmark", "beyond"))).startswith(
        "none of its tasks is chosen (--tasks): truthfulqa, "
    )
    assert set(cells(Evidence(maths), "A5", "truthfulqa").values()) == {None}
    assert cells(Evidence(maths), "A5", "math500") == {}
