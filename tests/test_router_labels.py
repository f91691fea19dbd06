"""The router's labels as they are kept: a job that was killed goes on with them, and trains what it would have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from labelled_rows import labelled_rows
from test_distil import write

from pipelines.data.schema import SHARD
from pipelines.data.seal import sealed
from pipelines.data.sink import DamagedFiles, committed
from pipelines.distil import router_job, router_labels
from pipelines.distil.inputs import DistilError, training_folder
from pipelines.distil.router_job import distil_router
from pipelines.distil.router_labels import LABELLED, RouterLabels, checkpoint_of, label_prompts, read_steps, survey
from s2t_models.artifact import read_provenance
from s2t_models.engines.contract import EngineDied
from s2t_models.errors import NothingDone
from s2t_models.hosting import pair
from s2t_models.loading import load_config
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.router import WEIGHTS
from s2t_models.storage import Location, ObjectPath

PROMPTS, FILE = 8, 2
#: The row whose prompt does not fit the context.
TOO_LONG = 3
SETTINGS = [
    f"router.prompts={PROMPTS}",
    "router.max_new_tokens=100",
    "router.width=16",
    "router.blocks=1",
    "router.epochs=2",
    "router.validation=0.3",
    "collect.label.num_cpus=0.5",
    f"collect.label.batch={FILE}",
    "distil.num_cpus=0.5",
]


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def shards(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = labelled_rows(recipe, "embedded-train", PROMPTS)
    rows[TOO_LONG]["prompt_ids"] *= 100
    table = pa.Table.from_pylist(rows[::-1], SHARD)  # not in the order of the uids
    return write(tmp_path_factory.mktemp("shards") / "train", table, recipe, "embedded-train")


@pytest.fixture(scope="module")
def actor(recipe: Recipe) -> Iterator[RouterLabels]:
    labels = RouterLabels(recipe, pair(recipe))
    yield labels
    for engine in (labels.slm, labels.teacher):
        engine.close()


@pytest.fixture(scope="module")
def made(recipe: Recipe, shards: Path, actor: RouterLabels) -> pa.Table:
    return actor(router_job._prompts(shards, PROMPTS))


class Labelling:
    """What Ray does in `label_prompts`: the rows that are not committed, FILE of them at a time. Is killed before it
    commits file `killed_at`."""

    def __init__(self, made: pa.Table, order: list[int], killed_at: int = PROMPTS) -> None:
        self.made, self.order, self.killed_at = made, order, killed_at
        self.asked: list[int] = []

    def __call__(self, recipe: Recipe, prompts: pa.Table, state: Location) -> list[Location]:
        folder, checkpoint = state / "labelled", checkpoint_of(state)
        for place in (folder, checkpoint):
            place.mkdir(parents=True, exist_ok=True)
        known = {uid for path in checkpoint.glob("*.parquet") for uid in parquet.read_table(path)["uid"].to_pylist()}
        left = [at for at in self.order if self.made["uid"][at].as_py() not in known]
        for number, start in enumerate(range(0, len(left), FILE)):
            part = self.made.take(left[start : start + FILE])
            name = f"{len(self.asked)}-{left[start]}"
            (folder / f"{name}.arrow").write_bytes(sealed(part))
            if number == self.killed_at:
                raise DistilError("killed")
            parquet.write_table(part.select(["uid"]), checkpoint / f"{name}.parquet")
            self.asked += part["index"].to_pylist()
        return committed(folder, checkpoint)


@pytest.fixture
def train(recipe: Recipe, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`distil_router` to a folder with that labelling in place of Ray."""
    monkeypatch.setattr(router_job.cluster, "start", lambda: None)
    monkeypatch.setattr(router_job, "_on_the_cluster", lambda recipe, state, doing, work, *rest: work(*rest))

    def run(labelling: Labelling, output: Path) -> str:
        monkeypatch.setattr(router_job, "label_prompts", labelling)
        return distil_router(recipe, shards, output)

    return run


def test_labelling_goes_on_and_the_router_is_that_of_an_undisturbed_run(
    train: Any, made: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tmp_path / "expected"
    said = train(Labelling(made, [*range(PROMPTS)]), expected)
    assert f"steps of {PROMPTS - 1} answers (1 failed)" in said
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"distil: 1 of {PROMPTS} prompts failed (the first: ContextOverflow: ")

    output = tmp_path / "router"
    killed = Labelling(made, [5, 1, 7, 3, 0, 2, 6, 4], killed_at=2)
    with pytest.raises(DistilError, match="killed"):
        train(killed, output)
    assert killed.asked == [5, 1, 7, 3]
    assert not output.exists()
    torn = next(training_folder(output).glob("router-*/labelled/0-5.arrow"))
    torn.write_bytes(torn.read_bytes()[:-50])
    goes_on = Labelling(made, killed.order)
    said = train(goes_on, output)
    assert goes_on.asked == [0, 2, 6, 4, 5, 1], "those that were not committed, and then those of the damaged file"
    assert f"distil: {torn}: not an Arrow IPC file" in capsys.readouterr().err
    assert (output / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert read_provenance(output) == read_provenance(expected)
    assert not training_folder(output).exists()


def test_steps_are_read_in_the_order_of_the_prompts(recipe: Recipe, made: pa.Table, tmp_path: Path) -> None:
    features = 2 * load_config(recipe.slm).hidden_size + recipe.router.support
    files: list[Location] = []
    for number, rows in enumerate(([6, 2, 4], [7, 3], [5, 0, 1])):
        files.append(tmp_path / f"{number}.arrow")
        files[-1].write_bytes(sealed(made.take(rows)))
    found = survey(files, PROMPTS)
    inputs_TF, labels_T = read_steps(files, found, features)
    whole = made.filter(made["error"].is_null())
    expected = [np.concatenate([row.values.to_numpy() for row in whole[name]]) for name in ("inputs", "labels")]
    np.testing.assert_array_equal(inputs_TF.ravel(), expected[0])
    np.testing.assert_array_equal(labels_T, expected[1])
    assert list(found.errors) == [made["error"].is_valid().to_pylist().index(True)]
    assert (found.missing, found.divergent_P.sum()) == (0, labels_T.sum())
    assert survey(files[1:], PROMPTS).missing == 3
    files[0].write_bytes(files[0].read_bytes()[:-50])  # between the survey and the training
    with pytest.raises(DamagedFiles) as damaged:
        read_steps(files, found, features)
    assert [path for path, _ in damaged.value.files] == files[:1]


def test_where_every_prompt_failed_the_first_reason_is_said(made: pa.Table, tmp_path: Path) -> None:
    rows = [{"index": at, "uid": f"{at}", "read": 0, "written": 0, "error": f"reason {at}"} for at in (1, 0)]
    path = tmp_path / "a.arrow"
    path.write_bytes(sealed(pa.Table.from_pylist(rows, LABELLED)))
    with pytest.raises(NothingDone, match=rf"all 2 prompts failed.*\(the first: reason 0\).*delete {tmp_path}"):
        router_job._check(survey([path], 2), tmp_path)


def test_an_actor_ends_with_its_engine(actor: RouterLabels, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    class Dead:
        async def generate(self, *_: Any) -> None:
            raise EngineDied("gone")

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(actor, "teacher", Dead())
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended):
        actor(pa.Table.from_pylist([{"index": 0, "uid": "a", "prompt_ids": [5, 6]}], router_labels.PROMPT))


@pytest.mark.parametrize("where", [pytest.param("a folder", marks=pytest.mark.slow), "an object store"])
def test_ray_labels_what_is_not_committed_and_leaves_the_rest(
    ray_cluster: str, object_store: str, where: str, recipe: Recipe, shards: Path, made: pa.Table, tmp_path: Path
) -> None:
    state: Location = tmp_path if where == "a folder" else ObjectPath(object_store) / "router" / "labels"
    prompts = router_job._prompts(shards, PROMPTS)
    first = label_prompts(recipe, prompts.take([6, 1, 4, 3]), state)
    written = {path: path.read_bytes() for path in first}
    # As a killed write leaves it: announced, half there, and not committed.
    (checkpoint_of(state) / "killed.pending.parquet").write_bytes(next(checkpoint_of(state).iterdir()).read_bytes())
    (state / "labelled" / "killed.arrow").write_bytes(first[0].read_bytes()[:100])
    files = label_prompts(recipe, prompts, state)
    assert {path: path.read_bytes() for path in files if path in written} == written
    assert sorted((state / "labelled").iterdir()) == sorted(files)
    tables = [pa.ipc.open_file(path.read_bytes()).read_all() for path in files]
    assert sorted(at for table in tables for at in table["index"].to_pylist()) == [*range(PROMPTS)], "each once"
    found = survey(files, PROMPTS)
    assert found.steps_P.tolist() == [len(row.values) if row.is_valid else 0 for row in made["labels"]]
    assert label_prompts(recipe, prompts, state) == files
