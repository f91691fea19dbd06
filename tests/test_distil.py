"""Distil: batches, an exactly resumable trainer, and the pipeline on Ray Train with workers that are killed.

The shards are real: the embedded pair's own labels on a few training problems' solutions.
"""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from labelled_rows import disagreeing, failed_row, labelled_rows
from made_up import provenance
from scipy import stats

from pipelines.data.layout import SHARDS
from pipelines.data.schema import SHARD
from pipelines.data.shards import shard_metadata, shard_name, write_shard
from pipelines.data.trajectories import ShardTrajectories
from pipelines.distil import job
from pipelines.distil.__main__ import main
from pipelines.distil.inputs import training_folder
from pipelines.tasks import task
from pipelines.tasks.splits import fingerprint
from s2t_models.artifact import Artifact
from s2t_models.loading import load_model, load_tokenizer, tokenizer_hash, weights_hash
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.reserved import reserved_rows
from s2t_models.settings import DivergenceSettings, ModelSettings
from s2t_models.training import losses
from s2t_models.training.batches import BatchOrder, collate, drop_narrow_margins, pieces, split_by_prompt, trajectories
from s2t_models.training.evaluation import latest_of_the_best
from s2t_models.training.trainer import BaseStates, Trainer

SETTINGS = [
    "distil.batch=4",
    "distil.lora.rank=4",
    "distil.validation=0.2",
    "distil.min_teacher_margin=0.1",
    "trigger_head.epochs=2",
    "trigger_head.positives=0.2",
]


def label(recipe: Recipe, task_name: str, count: int) -> pa.Table:
    """Rows of a collection; one more row failed."""
    return pa.Table.from_pylist([*labelled_rows(recipe, task_name, count), failed_row(task_name, count)], SHARD)


def write(folder: Path, table: pa.Table, recipe: Recipe, task: str) -> Path:
    pair = weights_hash(recipe.slm), weights_hash(recipe.teacher), tokenizer_hash(recipe.slm)
    (folder / SHARDS).mkdir(parents=True)
    collected = recipe if task.endswith("-train") else recipe.calibrating()
    write_shard(folder / SHARDS / shard_name(0, 1), table, shard_metadata(collected, *pair, task))
    return folder


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def table(recipe: Recipe) -> pa.Table:
    return label(recipe, "embedded-train", 24)


@pytest.fixture(scope="module")
def shards(recipe: Recipe, table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("shards") / "train", table, recipe, "embedded-train")


def test_trajectories_carry_the_rows_labels(table: pa.Table):
    data = trajectories(table.to_pylist())
    assert len(data) == len(table) - 1  # the row with an error is left out
    row = table.slice(3, 1).to_pylist()[0]
    item = data[3]
    step = row["kept"][2]
    assert item.tree.tokens.tolist() == row["prompt_ids"] + row["output_ids"]
    assert item.tree.prefixes_G[2] == len(row["prompt_ids"]) + step["step"]
    assert item.tree.candidates_GK[2].tolist() == step["candidates_K"]
    assert item.teacher_logprobs_GK[2].tolist() == pytest.approx(step["teacher_logprobs_K"])
    labels = collate(data[2:5], torch.device("cpu"))
    assert labels.valid_GK.all()
    assert labels.packed.leaf_GK.shape == labels.candidates_GK.shape
    leaves = labels.packed.ids_BL[labels.packed.row_G[:, None], labels.packed.leaf_GK]
    assert torch.equal(leaves, labels.candidates_GK)


def test_margin_filter_drops_what_the_loss_calls_narrow(table: pa.Table):
    for item in trajectories(table.to_pylist()):
        labels = collate([item], torch.device("cpu"))
        _, margin_G = losses.teacher_choice(labels.teacher_logprobs_GK, labels.valid_GK)
        assert len(drop_narrow_margins(item, 0.5).by_kl_G) == (margin_G >= 0.5).sum()


def test_the_split_is_one_of_prompts_whatever_the_order(table: pa.Table):
    data = trajectories(table.to_pylist())
    training, validation = split_by_prompt(data, 0.25, seed=0)
    assert len(validation) == 6
    assert not {item.prompt for item in training} & {item.prompt for item in validation}
    _, again = split_by_prompt(data[::-1], 0.25, seed=0)
    assert {item.uid for item in again} == {item.uid for item in validation}
    _, other = split_by_prompt(data, 0.25, seed=1)
    assert {item.uid for item in other} != {item.uid for item in validation}


def test_every_epoch_takes_each_trajectory_once_in_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(10, 500, 640)
    order = BatchOrder(lengths, batch=8, seed=3)
    epoch = [order(step) for step in range(80)]
    assert sorted(np.concatenate(epoch).tolist()) == list(range(640))
    padded = sum(8 * lengths[batch].max() for batch in epoch)
    assert padded < 1.1 * lengths.sum()
    assert not np.array_equal(order(80), epoch[0])
    assert np.array_equal(BatchOrder(lengths, batch=8, seed=3)(17), epoch[17])
    assert len(BatchOrder([5, 6, 7], batch=8, seed=0)(4)) == 8  # fewer trajectories than a batch holds


@pytest.mark.parametrize("objective", ["selector", "kd"])
def test_training_learns_and_goes_on_where_it_stopped(recipe: Recipe, table: pa.Table, objective: str):
    data = trajectories(table.to_pylist())
    recipe = recipe.model_copy(update={"distil": recipe.distil.model_copy(update={"steps": 12})})
    whole = Trainer(recipe, objective, data)
    before = whole.evaluate()
    parts = [whole.advance() for _ in range(4)]
    state = copy.deepcopy(whole.state())
    rest = [whole.advance() for _ in range(4, 12)]
    name = "selection_loss" if objective == "selector" else "kd_loss"
    assert np.mean([p[name] for p in rest[-4:]]) < 0.8 * np.mean([p[name] for p in parts])
    after = whole.evaluate()
    assert before["kl_to_base"] == pytest.approx(0, abs=1e-6)
    assert after["kl_to_base"] > before["kl_to_base"]
    assert after["agree_at_1_slm"] == before["agree_at_1_slm"]

    again = Trainer(recipe, objective, data)
    again.load(state)
    repeated = [again.advance() for _ in range(4, 12)]
    # Not to the bit: the frozen base's states were computed in other batches.
    for left, right in zip(repeated, rest, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    for key, value in whole.selector.trained().items():
        torch.testing.assert_close(again.selector.trained()[key], value, atol=1e-4, rtol=1e-3)
    assert ("rows_RH" in whole.selector.trained()) == (objective == "selector")


@pytest.mark.parametrize("objective", ["selector", "kd"])
def test_the_gradient_is_the_batch_mean_however_it_is_spread(recipe: Recipe, table: pa.Table, objective: str):
    """Two workers' gradients, averaged as DDP does, are one worker's, and so is that of a trajectory at a time with
    activations computed again and no room for the base's states; the trajectories have unlike numbers of groups."""
    data = [
        item.with_groups(np.arange(len(item.by_kl_G)) % (2 + i) == 0)
        for i, item in enumerate(trajectories(disagreeing(table.to_pylist()))[:8])
    ]
    settings = recipe.distil.model_copy(update={"batch": 4, "validation": 0.3, "min_teacher_margin": 0.0})

    def gradient(rank: int = 0, world: int = 1, **changes: Any) -> tuple[torch.Tensor, float]:
        cut = recipe.model_copy(update={"distil": settings.model_copy(update=changes)})
        trainer = Trainer(cut, objective, data, rank, world)
        parts = trainer.advance()
        flat = torch.cat([value.grad.flatten() for value in trainer.parameters])
        return flat * max(parts["gradient_norm"], 1.0), parts["loss"]  # as it was before it was clipped

    whole, loss = gradient()
    (left, left_loss), (right, right_loss) = gradient(0, 2), gradient(1, 2)
    alone, alone_loss = gradient(micro_batch=1, gradient_checkpointing=True, base_cache_gb=0.0)
    assert left_loss != pytest.approx(right_loss, rel=0.01)
    assert (left_loss + right_loss) / 2 == pytest.approx(loss, rel=1e-4)
    assert alone_loss == pytest.approx(loss, rel=1e-4)
    for found in ((left + right) / 2, alone):
        torch.testing.assert_close(found, whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-3)


def test_forwards_are_filled_up_to_the_limit_with_padding_counted():
    lengths = [9, 5, 5, 5, 30, 2, 2]
    cut = [lengths[piece] for piece in pieces(lengths, 20)]
    assert cut == [[9, 5], [5, 5], [30], [2, 2]]  # 9 + 5 + 5 would be 27 with padding; 30 goes alone
    assert list(pieces([], 20)) == []


def test_the_bases_states_are_kept_while_there_is_room(table: pa.Table):
    first, second, *_ = trajectories(table.to_pylist())
    states_SH = torch.randn(len(first.kl_T) + len(second.kl_T), 4, dtype=torch.bfloat16)
    room = len(first.kl_T) * 4 * 2
    kept = BaseStates(room)
    kept.keep([first, second], states_SH)
    assert torch.equal(kept.of([first]), states_SH[: len(first.kl_T)])
    assert kept.of([first, second]) is None
    nothing = BaseStates(room - 1)
    nothing.keep([first], states_SH[: len(first.kl_T)])
    assert nothing.of([first]) is None


@pytest.mark.parametrize("base", ["slm", "teacher"])
def test_validation_figures_equal_a_forward_a_candidate(recipe: Recipe, table: pa.Table, base: str):
    """The untrained selector is its base with the reserved rows, so plain transformers can say what it should find. The
    prior is the base's own, also where another model was labelled; where the SLM was, it is what the labels say."""
    recorded = {
        (row["uid"], step["step"]): step[f"{base}_logprobs_K"]
        for row in table.to_pylist()
        for step in row["kept"] or ()
    }
    recipe = recipe.model_copy(update={"slm": getattr(recipe, base)})
    trainer = Trainer(recipe, "selector", trajectories(table.to_pylist()))
    found = trainer.evaluate()
    model, ids = load_model(recipe.slm), list(reserved_rows(recipe))
    settings = recipe.distil
    losses, agree, random, slm, spearman = [], [], [], [], []
    for item in trainer.validation:
        for group, prefix in enumerate(item.tree.prefixes_G):
            tokens = item.tree.tokens[:prefix].tolist()
            candidates_K = item.tree.candidates_GK[group].tolist()
            with torch.no_grad():
                logits_KV = model(torch.tensor([[*tokens, token] for token in candidates_K])).logits[:, -1]
                prior_K = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[candidates_K].numpy()
            np.testing.assert_allclose(prior_K, recorded[item.uid, prefix - item.tree.prompt], atol=1e-4)
            scores_K = logits_KV[:, ids].softmax(-1) @ torch.linspace(0, 1, len(ids))
            teacher_K = item.teacher_logprobs_GK[group]
            preference_K = scores_K.numpy() / settings.temperature + settings.prior_weight * prior_K
            best = int(teacher_K.argmax())
            spearman.append(stats.spearmanr(preference_K, teacher_K).statistic)
            if item.by_kl_G[group]:
                losses.append(np.log(np.exp(preference_K - preference_K[best]).sum()))
                agree.append(preference_K.argmax() == best)
                slm.append(prior_K.argmax() == best)
            else:
                random.append(preference_K.argmax() == best)
    assert found["selection_loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    assert found["agree_at_1"] == pytest.approx(np.mean(agree))
    assert found["agree_at_1_random"] == pytest.approx(np.mean(random))
    assert found["agree_at_1_slm"] == pytest.approx(np.mean(slm))
    assert found["spearman"] == pytest.approx(np.mean(spearman), abs=1e-3)
    assert len(agree) > 5


def test_trajectories_without_a_labelled_step_are_trained_and_evaluated_with(recipe: Recipe, table: pa.Table):
    data = [item.with_groups(np.zeros(len(item.by_kl_G), dtype=bool)) for item in trajectories(table.to_pylist())]
    trainer = Trainer(recipe, "selector", data)
    assert trainer.advance()["selection_loss"] == 0.0
    assert trainer.evaluate()["agree_at_1"] == 0.0


def test_the_latest_of_the_checkpoints_that_are_as_good_as_the_best_is_taken():
    def at(step: int, agree: float) -> tuple[None, dict[str, float]]:
        return None, {"step": step, "agree_at_1": agree, "top_steps": 400}

    assert latest_of_the_best([at(200, 0.89), at(320, 0.88)])[1]["step"] == 320  # 0.016 is one standard error
    assert latest_of_the_best([at(200, 0.89), at(320, 0.87)])[1]["step"] == 200
    assert latest_of_the_best([at(320, 0.9), at(200, 0.9)])[1]["step"] == 320


def test_a_training_is_known_by_what_decides_it_and_not_by_its_workers(recipe: Recipe):
    def named(**changes: Any) -> tuple[str, Any]:
        changed = recipe.model_copy(update={"distil": recipe.distil.model_copy(update=changes)})
        settings = job._settings(changed)
        return job._name(changed, provenance(settings=settings)), settings

    for same in ({"workers": 4}, {"workers": 4, "min_workers": 2}, {"num_cpus": 2.0}, {"num_gpus": 1.0}):
        assert named(**same) == named()
    for other in ({"steps": 99}, {"batch": 2}, {"evaluate_every": 3}, {"micro_batch": 9}):
        assert named(**other)[0] != named()[0]
        assert named(**other)[1] != named()[1]


def kill_a_worker(after: Path, done: threading.Event) -> None:
    """SIGKILL one Ray Train worker as soon as Ray's record of checkpoints in the folder `after` names one."""
    import ray
    from ray.util.state import list_actors

    cluster = ray.get_runtime_context().gcs_address
    while not any("checkpoint_" in path.read_text() for path in after.glob("*/checkpoint_manager_snapshot.json")):
        if done.wait(0.05):
            return
    workers = [
        actor.pid
        for actor in list_actors(address=cluster, filters=[("state", "=", "ALIVE")], limit=1000)
        if "RayTrainWorker" in actor.class_name
    ]
    os.kill(workers[-1], signal.SIGKILL)


def run(command: list[str], output: Path, meanwhile: Callable[[Path, threading.Event], None] | None = None) -> int:
    """distil's exit status, with `meanwhile` running beside it."""
    done = threading.Event()
    thread = threading.Thread(target=meanwhile, args=(training_folder(output), done))
    if meanwhile:
        thread.start()
    status = main([*command, "--output", str(output)])
    done.set()
    if meanwhile:
        thread.join()
    return status


@pytest.fixture
def command(recipe_path: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where errors.log goes
    settings = [*SETTINGS, "distil.steps=40", "distil.evaluate_every=4"]
    return ["--recipe", str(recipe_path), "--shards", str(shards), *(part for s in settings for part in ("--set", s))]


def test_two_workers_survive_a_killed_one_and_leave_an_artifact(
    ray_cluster: None, command: list[str], recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calibration = write(
        tmp_path / "calibration", label(recipe, "embedded-calibration", 6), recipe, "embedded-calibration"
    )
    output = tmp_path / "artifact"
    more = ["--set", "distil.workers=2", "--calibration", str(calibration)]
    assert run([*command, *more], output, meanwhile=kill_a_worker) == 0
    assert "Agree@1" in capsys.readouterr().out
    artifact = Artifact.load(output)
    provenance = artifact.card.provenance
    assert provenance.begun_at_steps[0] == 0
    assert len(provenance.begun_at_steps) == 2
    assert provenance.begun_at_steps[1] >= 4
    assert provenance.base_weights == weights_hash(recipe.slm)
    assert set(provenance.shards) == {"training", "calibration"}
    rows = provenance.rows
    assert {name: len(hashes) for name, hashes in rows.items()} == {
        "training (embedded-train)": 25,
        "calibration (embedded-calibration)": 7,
    }
    assert rows["training (embedded-train)"][0] in fingerprint(task("embedded-train").load()[:25])
    assert tokenizer_hash(artifact.model(recipe.slm)) == tokenizer_hash(recipe.slm)
    assert not training_folder(output).exists()

    written = (output / "artifact.json").stat().st_mtime_ns
    assert run([*command, *more], output) == 0
    assert (output / "artifact.json").stat().st_mtime_ns == written, "what is done is not done again"

    steps = provenance.calibration_steps
    data = ShardTrajectories(calibration)
    assert steps == sum(len(item.kl_T) for item in data)
    model, base = load_model(artifact.model(recipe.slm)), load_model(recipe.slm)
    ids = list(artifact.card.reserved_ids)
    is_text = torch.ones(base.config.vocab_size, dtype=torch.bool)
    is_text[ids] = False
    rows, base_rows = model.get_output_embeddings().weight, base.get_output_embeddings().weight
    assert torch.equal(rows[is_text], base_rows[is_text])
    assert (rows[ids] != base_rows[ids]).any()
    head = artifact.head()
    with torch.no_grad():
        logits = []
        for item in data:
            states = model.get_decoder()(torch.from_numpy(item.tree.tokens)[None]).last_hidden_state[0]
            logits += head(states[item.tree.prompt - 1 : -1]).tolist()
    for budget in (0.01, 0.02, 0.05, 0.1, 0.2):
        threshold = artifact.card.thresholds["head"][budget]
        assert sum(logit >= threshold - 1e-4 for logit in logits) == pytest.approx(round(budget * steps), abs=1)

    import mlflow

    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("s2t").experiment_id])
    assert [r.info.run_name for r in runs] == ["distil-selector"]
    seen = {metric.step for metric in client.get_metric_history(runs[0].info.run_id, "validation/agree_at_1")}
    assert seen >= {4, 40}
    for name in ("train/selection_loss", "validation/spearman", "validation/kl_to_base", "trigger/auc"):
        assert name in runs[0].data.metrics
    assert {
        used.dataset.name: used.tags[0].value for used in client.get_run(runs[0].info.run_id).inputs.dataset_inputs
    } == {
        "embedded-train": "training",
        "embedded-calibration": "calibration",
    }
    (version,) = client.search_model_versions("name = 'embedded-selector'")
    assert version.tags["s2t.weights"] == weights_hash(artifact.model(recipe.slm))
    assert version.tags["s2t.calibration"] == provenance.shards["calibration"]


@pytest.mark.slow
def test_the_same_command_goes_on_after_the_job_failed(
    ray_cluster: None,
    command: list[str],
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "kd"
    command = [*command, "--objective", "kd"]
    monkeypatch.setattr(job, "MAX_FAILURES", 0)
    assert run(command, output, meanwhile=kill_a_worker) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distil: ")]
    assert "the same command goes on" in line
    assert "Traceback" in (tmp_path / "errors.log").read_text()
    assert not output.exists()

    begun: list[tuple[int, ...]] = []
    monkeypatch.setattr(job, "report", lambda done, _: begun.append(done.begun_at_steps) or "")
    assert run(command, output) == 0
    assert begun[0][0] == 0
    assert begun[0][1] >= 4
    tuned = load_model(ModelSettings(path=str(output), dtype="float32", device="cpu")).state_dict()
    base = load_model(recipe.slm).state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    assert len(load_tokenizer(ModelSettings(path=str(output)))) == len(load_tokenizer(recipe.slm))


def refused(command: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that distil gives up with."""
    assert run(command, output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not training_folder(output).exists()
    return line


def test_wrong_input_is_refused_in_one_line_before_anything_runs(
    command: list[str],
    recipe: Recipe,
    table: pa.Table,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "out"
    assert "no such folder" in refused([*command, "--shards", str(tmp_path / "none")], output, capsys)
    other_pair = [*command, "--set", "teacher.path=embedded:slm"]
    assert "of another pair: not the recipe's teacher" in refused(other_pair, output, capsys)
    test_rows = write(tmp_path / "test", table, recipe, "embedded")
    assert "a test split" in refused([*command, "--shards", str(test_rows)], output, capsys)
    again = write(tmp_path / "again", table, recipe.calibrating(), "embedded-train")
    assert "share 25 rows" in refused([*command, "--calibration", str(again)], output, capsys)
    published = recipe.calibrating().model_copy(update={"divergence": DivergenceSettings(tail="renormalised")})
    other = write(tmp_path / "other", table, published, "embedded-train")
    assert "collected with another divergence" in refused([*command, "--calibration", str(other)], output, capsys)
    assert "unknown key distil.colour" in refused([*command, "--set", "distil.colour=1"], output, capsys)
    assert "does not divide" in refused([*command, "--set", "distil.workers=3"], output, capsys)
    more_than_all = ["--set", "distil.workers=2", "--set", "distil.min_workers=3"]
    assert "min_workers = 3 exceeds distil.workers = 2" in refused([*command, *more_than_all], output, capsys)
    fused = refused([*command, "--set", "distil.lora.targets=[q_proj,qkv_proj]"], output, capsys)
    assert "qwen2 has no linear layers called qkv_proj; it has q_proj, k_proj" in fused
    output.mkdir()
    (output / "thesis.tex").touch()
    assert "holds something else" in refused(command, output, capsys)
