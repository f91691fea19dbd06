"""Every local benchmark row loads, and its gold answer grades as correct; splits, sampling and sources."""

import gzip
import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipelines.tasks import TASKS, Item, Task, TaskError, source, task
from pipelines.tasks.base import sample
from pipelines.tasks.source import Hub, Pinned, Source
from pipelines.tasks.splits import fingerprint, refuse_overlap, text_hash
from s2t_models.embedded.generator import problems

ROWS = {
    "gsm8k": 1319,
    "gsm8k-train": 6473,
    "gsm8k-calibration": 1000,
    "math500": 500,
    "olympiadbench": 675,
    "aime24": 30,
    "aime25": 30,
    "humaneval": 164,
    "mmlu_pro": 12032,
    "arc_challenge": 1172,
    "truthfulqa": 817,
    "mt_bench": 80,
    "math-train": 7500,
    "math-calibration": 4500,
}
MATHS = (
    "gsm8k",
    "gsm8k-train",
    "gsm8k-calibration",
    "math500",
    "olympiadbench",
    "aime24",
    "aime25",
    "math-train",
    "math-calibration",
)
CHOICES = ("mmlu_pro", "arc_challenge", "truthfulqa")

# Rows whose gold answer cannot grade as correct, with the reason.
GOLD_EXCEPTIONS = {
    "math-train/train/number_theory/7115.json": "the solution's \\boxed{} is empty: there is no gold answer",
    "math-train/train/number_theory/7117.json": "the solution's \\boxed{} is empty: there is no gold answer",
}


def failing(chosen: Task, pairs: list[tuple[str, Item]]) -> set[str]:
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda pair: chosen.grade(*pair).verdict, pairs))
    return {item.uid for (_, item), verdict in zip(pairs, verdicts, strict=True) if verdict != "correct"}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_loads(name: str, data_dir: Path) -> None:
    items = task(name).load(data_dir)
    assert len(items) == ROWS[name]
    assert len({item.uid for item in items}) == len(items)
    assert all(item.uid.startswith(f"{name}/") and item.prompt[-1]["role"] == "user" for item in items)
    assert all(item.prompt[-1]["content"].strip() and item.question.strip() for item in items)


@pytest.mark.parametrize("name", MATHS)
def test_gold_answers_of_maths_are_correct(name: str, data_dir: Path) -> None:
    chosen = task(name)
    boxed = [(f"Therefore the answer is $\\boxed{{{item.answer}}}$.", item) for item in chosen.load(data_dir)]
    assert failing(chosen, boxed) == {uid for uid in GOLD_EXCEPTIONS if uid.startswith(f"{name}/")}


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_reference_solutions_are_correct(name: str, data_dir: Path) -> None:
    """The worked solutions carry their answers in their own way: `#### 18`, or a \\boxed{} within the text."""
    chosen = task(name)
    assert failing(chosen, [(item.metadata["solution"], item) for item in chosen.load(data_dir)]) == set()


@pytest.mark.parametrize("name", CHOICES)
def test_gold_letters_are_correct_and_others_wrong(name: str, data_dir: Path) -> None:
    chosen = task(name)
    items = chosen.load(data_dir)
    assert failing(chosen, [(f"A is tempting. So the answer is ({item.answer}).", item) for item in items]) == set()
    others = [(f"The answer is ({'B' if item.answer == 'A' else 'A'}).", item) for item in items]
    assert failing(chosen, others) == {item.uid for item in items}


def test_canonical_programs_pass(data_dir: Path) -> None:
    from pipelines.grading import sandbox

    if sandbox.unavailable():
        pytest.skip(f"no isolation here: {sandbox.unavailable()}")
    chosen = task("humaneval")
    items = chosen.load(data_dir)
    fenced = [(f"Here it is:\n```python\n{item.question}{item.answer}\n```\nDone.", item) for item in items]
    assert failing(chosen, fenced) == set()
    bodies = [(str(item.answer), item) for item in items[:5]]
    assert failing(chosen, bodies) == set()
    nothing = [(f"{item.question}    return None\n", item) for item in items[:5]]
    assert failing(chosen, nothing) == {item.uid for item in items[:5]}


@pytest.mark.parametrize("name", ["gsm8k", "math500", "olympiadbench", "aime24", "aime25"])
def test_perturbed_gold_answers_are_wrong(name: str, data_dir: Path) -> None:
    """A digit changed, or a sign turned, is another answer, unless the tolerance or the notation makes it the same."""
    chosen = task(name)
    items = [
        item
        for item in chosen.load(data_dir)
        if any(c.isdigit() for c in item.answer) and not item.metadata.get("tolerance")
    ]
    changed = []
    for item in items[:300]:
        place = min(index for index, character in enumerate(item.answer) if character.isdigit())
        digit = str((int(item.answer[place]) + 1) % 10)
        changed.append((f"\\boxed{{{item.answer[:place]}{digit}{item.answer[place + 1 :]}}}", item))
    right = {item.uid for _, item in changed} - failing(chosen, changed)
    assert right == set()


def test_mmlu_pro_uses_the_letter_not_the_index(data_dir: Path) -> None:
    row = next(item for item in task("mmlu_pro").load(data_dir) if item.uid == "mmlu_pro/3983")
    assert row.answer == "C"


def test_truthfulqa_is_shuffled_the_same_way_every_time(data_dir: Path) -> None:
    items = task("truthfulqa").load(data_dir)
    assert [item.answer for item in items] == [item.answer for item in task("truthfulqa").load(data_dir)]
    assert 0.1 < Counter(item.answer for item in items)["A"] / len(items) < 0.4


def test_olympiadbench_tolerance_and_context(data_dir: Path) -> None:
    chosen = task("olympiadbench")
    row = next(item for item in chosen.load(data_dir) if item.uid == "olympiadbench/2592")
    assert row.metadata["tolerance"] == 0.1
    assert chosen.grade("\\boxed{4.25}", row).verdict == "correct"
    assert chosen.grade("\\boxed{4.35}", row).verdict == "wrong"


def test_mmlu_pro_sample_is_spread_over_the_categories(data_dir: Path) -> None:
    chosen = task("mmlu_pro")
    items = chosen.load(data_dir)
    drawn = chosen.sample(items, 140, seed=3)
    assert drawn == chosen.sample(items, 140, seed=3) != chosen.sample(items, 140, seed=4)
    everywhere, here = Counter(i.metadata["category"] for i in items), Counter(i.metadata["category"] for i in drawn)
    assert len(drawn) == 140
    assert len(here) == 14
    assert all(abs(here[name] - 140 * count / len(items)) < 1 for name, count in everywhere.items())


def test_samples_without_strata() -> None:
    items = [Item(f"x/{n}", [{"role": "user", "content": str(n)}], "") for n in range(10)]
    assert sample(items, 0, 1) == sample(items, 99, 1) == items
    drawn = [item.uid for item in sample(items, 4, 1)]
    assert len(set(drawn)) == 4
    assert drawn == sorted(drawn)


def test_the_splits_of_gsm8k_share_no_question(data_dir: Path) -> None:
    names = ("gsm8k", "gsm8k-train", "gsm8k-calibration")
    refuse_overlap({name: fingerprint(task(name).load(data_dir)) for name in names})


def test_calibration_leaves_math500_out(data_dir: Path) -> None:
    calibration, held_out = task("math-calibration").load(data_dir), task("math500").load(data_dir)
    refuse_overlap({"calibration": fingerprint(calibration), "test": fingerprint(held_out)})
    with pytest.raises(ValueError, match=r"^train and test share 500 rows: math500/.* and 495 more; "):
        refuse_overlap({"train": fingerprint(held_out), "test": fingerprint(held_out)})


def test_overlap_is_found_under_another_spelling() -> None:
    first = Item("a/1", [{"role": "user", "content": "What is  2+2?"}], "4")
    second = Item("b/9", [{"role": "user", "content": "Solve this."}], "4", {"question": "what is 2+2?\n"})
    with pytest.raises(ValueError, match=r"^train and test share 1 row: b/9; choose splits that do not overlap$"):
        refuse_overlap({"train": fingerprint([first]), "calibration": {}, "test": fingerprint([second])})
    with pytest.raises(ValueError, match="train and test share 1 row"):
        refuse_overlap({"train": [text_hash("x")], "test": [text_hash("X ")]})


@pytest.mark.parametrize("name", ["embedded", "embedded-hard", "embedded-held-out"])
def test_embedded_problems(name: str) -> None:
    chosen = task(name)
    items = chosen.load()[:50]
    assert failing(chosen, [(item.metadata["solution"], item) for item in items]) == set()
    assert failing(chosen, [(f"\\boxed{{{int(item.answer) + 1}}}", item) for item in items]) == {i.uid for i in items}


def test_the_embedded_problems_that_are_asked_are_not_those_the_pair_was_chosen_by() -> None:
    for name, split in (("embedded", "test"), ("embedded-hard", "hard"), ("embedded-held-out", "held-out")):
        asked = {item.metadata["question"] for item in task(name).load()}
        assert asked.isdisjoint(problem.question for problem in problems(split, 500))


def test_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match="there is no task 'gsm9k'; the tasks are gsm8k, math500"):
        task("gsm9k")
    assert {*ROWS, "embedded", "embedded-hard", "embedded-held-out"} <= set(TASKS)


def test_a_missing_local_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "rows", lambda self: pytest.fail("downloaded although a folder was given"))
    with pytest.raises(
        FileNotFoundError, match=r"gsm8k/test.jsonl does not exist: --data must name a folder that holds"
    ):
        task("gsm8k").load(tmp_path)


def test_a_malformed_local_file_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n{"question": \n')
    with pytest.raises(ValueError, match=r"test.jsonl, line 2: not JSON"):
        task("gsm8k").load(tmp_path)
    path.write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match="row 1: no field 'answer'"):
        task("gsm8k").load(tmp_path)


def test_hub_rows_come_at_the_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's parquet rows and its other layouts give the same items as the local files."""
    asked = []

    def download(repo_id: str, filename: str, revision: str, repo_type: str) -> str:
        asked.append((repo_id, revision, repo_type))
        path = tmp_path / filename.replace("/", "-")
        rows = {
            "openai/gsm8k": [{"question": "One and one?", "answer": "1+1=2\n#### 2"}],
            "truthfulqa/truthful_qa": [
                {"question": "Is it?", "mc1_targets": {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 0]}}
            ],
        }[repo_id]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert task("gsm8k").load()[0].answer == "2"
    row = task("truthfulqa").load()[0]
    assert row.metadata["options"]["ABC".index(row.answer)] == "yes"
    assert all(len(revision) == 40 and kind == "dataset" for _, revision, kind in asked)


def test_every_source_is_pinned() -> None:
    for name in TASKS:
        for place in (entry.remote for entry in task(name).sources):
            assert isinstance(place, Hub | Pinned)
            assert len(place.revision if isinstance(place, Hub) else place.sha256) in (40, 64)


def test_a_pinned_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="SHA-256 is"):
        Pinned(path.as_uri(), "0" * 64).rows()
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Pinned(path.as_uri(), right).rows() == [{"a": 1}]


def test_rows_of_every_format(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for name in ("x.jsonl", "x.jsonl.gz", "x.json"):
        assert Source(name).rows(tmp_path) == rows
    with pytest.raises(FileNotFoundError, match="give a folder"):
        Source("x.jsonl").rows(None)
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list of rows"):
        source.read_rows(tmp_path / "y.json")
