"""The auxiliary ranking head of D.1, for models without free rows: the same scores, trained by the same code, read
beside the vocabulary; nothing is masked for it, and an artifact says which of the two it has."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import provenance
from safetensors.torch import save_file
from test_families import SERVED, prompts, run, tiny
from tiny_families import FAMILIES, write_pair
from transformers import AutoModelForCausalLM

from s2t_models import loading
from s2t_models.artifact import RANKING_HEAD, Artifact, ArtifactError
from s2t_models.engines.contract import Sampling, Selection
from s2t_models.engines.torch.load import load
from s2t_models.hosting import LOCAL, Hosted, host
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.reserved import bins, masked_rows, reserved_rows
from s2t_models.settings import CandidateSettings
from s2t_models.training.batches import Trajectory, trajectories
from s2t_models.training.build import build
from s2t_models.training.selector import ROWS, Selector
from s2t_models.training.trainer import Trainer
from s2t_models.training_settings import LoraSettings

R, K = 6, 4
ALWAYS = Selection(-1e9, CandidateSettings(k=K, method="top_k"), 0.5)


@pytest.mark.parametrize("name", ["granite", "gemma2", "phi", "llama"])
@torch.no_grad()
def test_the_head_reads_hidden_states_as_they_are(name: str) -> None:
    """In training and before it nothing scales, caps or masks: all of the vocabulary is text, and merging leaves the
    output embedding as it was."""
    model, ids = tiny(SERVED[name]), torch.tensor([prompts()[1]])
    before_VH = model.get_output_embeddings().weight.clone()
    out = model(ids, use_cache=False, output_hidden_states=True)
    selector = Selector(copy.deepcopy(model), (), LoraSettings(rank=2), R).eval()
    hidden_BLH = selector(input_ids=ids)  # LoRA begins at zero: this is the model
    assert selector.rows_RH.shape == (R, model.config.hidden_size)
    expected = (out.hidden_states[-1] @ selector.rows_RH.T).softmax(-1) @ bins(R)
    torch.testing.assert_close(selector.scores(hidden_BLH), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(selector.text_logits(hidden_BLH), out.logits, atol=1e-4, rtol=0)
    merged = selector.merge()
    assert torch.equal(merged.get_output_embeddings().weight, before_VH)
    assert selector.ranking_head is not None


def test_its_beginning_depends_on_the_seed_alone() -> None:
    rows = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rows.append(Selector(tiny(SERVED["llama"]), (), LoraSettings(rank=2), R).rows_RH.detach())
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny Mistral pair whose tokenizer fills every row."""
    folder = tmp_path_factory.mktemp("mistral")
    write_pair(FAMILIES["mistral"], folder)
    common = {"dtype": "float32", "device": "cpu", "slots": 4, "context": 200}
    return Recipe.model_validate(
        {
            "name": "head",
            **{side: {"path": str(folder / side), **common} for side in ("slm", "teacher")},
            "reserved": {"count": R},
            "distil": {
                "lora": {"rank": 2, "alpha": 4, "dropout": 0},
                **{"batch": 4, "learning_rate": 0.02, "validation": 0.25, "min_teacher_margin": 0, "steps": 20},
            },
            "trigger_head": {"epochs": 2, "hidden": 8, "positives": 0.3, "validation": 0.4},
        }
    )


@pytest.fixture(scope="module")
def data() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in range(8):
        kept = [
            {
                "step": step,
                "by_kl": True,
                "candidates_K": rng.choice(90, K, replace=False).tolist(),
                "slm_logprobs_K": [-1.0, -1.5, -2.0, -2.5],
                "teacher_logprobs_K": rng.permutation([-0.1, -3.0, -4.0, -5.0]).tolist(),
            }
            for step in (1, 4)
        ]
        ids = {"prompt_ids": rng.integers(2, 90, 5).tolist(), "output_ids": rng.integers(2, 90, 7).tolist()}
        figures = {"kl_T": rng.random(7).tolist(), "entropy_T": rng.random(7).tolist()}
        figures["teacher_argmax_T"] = ids["output_ids"]
        rows.append({"uid": str(n), "prompt": str(n), **ids, **figures, "kept": kept})
    return trajectories(rows)


@pytest.fixture(scope="module")
def artifact(recipe: Recipe, data: list[Trajectory], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    trainer = Trainer(recipe, "selector", data)
    before = trainer.selector.rows_RH.detach().clone()
    losses = [trainer.advance()["selection_loss"] for _ in range(12)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert not torch.equal(trainer.selector.rows_RH, before)
    folder = tmp_path_factory.mktemp("built") / "artifact"
    made = provenance(
        base_weights=loading.weights_hash(recipe.slm), teacher_weights=loading.weights_hash(recipe.teacher)
    )
    trained = trainer.selector.trained()
    build(recipe, trained, data, None, made, folder)
    built = Artifact.load(folder)
    assert torch.equal(built.ranking_head(), trained[ROWS])
    assert (built.card.reserved_ids, len(built.card.bins)) == ((), R)
    return built


def test_an_engine_scores_with_the_head_and_masks_nothing(recipe: Recipe, artifact: Artifact) -> None:
    assert (reserved_rows(recipe), masked_rows(recipe)) == ((), ())
    model = AutoModelForCausalLM.from_pretrained(artifact.folder / "model", dtype=torch.float32).eval()
    prompt = [5, 17, 41, 8]
    engine = load(Hosted(LOCAL, recipe.slm, artifact=artifact.folder))
    assert asyncio.run(engine.card()).masked_ids == ()
    (draft,) = run(engine.generate_selecting(prompt, Sampling(12), ALWAYS))
    everything_TN = np.arange(model.config.vocab_size)[None]
    (text,) = run(engine.score(prompt, len(prompt), everything_TN))
    ids = list(prompt)
    with torch.no_grad():
        np.testing.assert_allclose(
            text.logprobs_TN[0], model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1), atol=1e-4
        )
        for decision in draft.decisions:
            logprobs_K, candidates_K = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(K)
            assert decision.candidates_K == candidates_K.tolist()
            leaves = torch.tensor([[*ids, candidate] for candidate in decision.candidates_K])
            after_KH = model(leaves, output_hidden_states=True).hidden_states[-1][:, -1]
            scores_K = (after_KH @ artifact.ranking_head().T).softmax(-1) @ bins(R)
            np.testing.assert_allclose(decision.scores_K, scores_K, atol=1e-5)
            (selected,) = run(engine.select(ids, decision.candidates_K))
            np.testing.assert_allclose(selected.scores_K, scores_K, atol=1e-5)
            ids.append(int(candidates_K[int((scores_K / ALWAYS.temperature + 0.5 * logprobs_K).argmax())]))
    engine.close()
    assert draft.ids == ids[len(prompt) :]
    assert len({tuple(np.round(decision.scores_K, 4)) for decision in draft.decisions}) > 1


def test_kd_trains_no_head_and_leaves_a_plain_checkpoint(
    recipe: Recipe, data: list[Trajectory], tmp_path: Path
) -> None:
    trainer = Trainer(recipe, "kd", data)
    trainer.advance()
    trained = trainer.selector.trained()
    assert ROWS not in trained
    build(recipe, trained, data, None, provenance(objective="kd"), tmp_path / "kd")
    assert not (tmp_path / "kd" / RANKING_HEAD).exists()


def test_an_artifact_is_not_taken_for_the_other_kind(recipe: Recipe, artifact: Artifact, tmp_path: Path) -> None:
    def changed(**changes: Any) -> Path:
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        for part in artifact.folder.iterdir():
            if not (other / part.name).exists():
                (other / part.name).symlink_to(part)
        (other / "artifact.json").unlink()
        (other / "artifact.json").write_text(artifact.card.model_copy(update=changes).model_dump_json())
        return other

    with pytest.raises(ArtifactError, match=r"from the reserved rows .* or from ranking_head.*, not from both"):
        Artifact.load(changed(reserved_ids=tuple(range(R))))
    with pytest.raises(ArtifactError, match="2 reserved_ids, but 6 bins"):
        Artifact.load(changed(reserved_ids=(3, 4)))
    with pytest.raises(ArtifactError, match=r"ranking_head\.safetensors: does not hold a ranking head of 3$"):
        Artifact.load(changed(bins=(0.0, 0.5, 1.0))).ranking_head()
    other = changed()
    (other / RANKING_HEAD).unlink()
    with pytest.raises(ArtifactError, match=r"names no reserved rows, and ranking_head\.safetensors is missing$"):
        Artifact.load(other)
    save_file({"bias": torch.zeros(R)}, other / RANKING_HEAD)
    with pytest.raises(ArtifactError, match="does not hold a ranking head of 6"):
        Artifact.load(other).ranking_head()


def test_a_recipe_hosts_an_artifact_of_its_own_kind_alone(recipe: Recipe, artifact: Artifact, tmp_path: Path) -> None:
    mine = recipe.model_copy(update={"artifact": str(artifact.folder)})
    assert host(mine).engines[LOCAL].artifact == artifact.folder.resolve()
    rows = tmp_path / "rows"
    rows.mkdir()
    for part in artifact.folder.iterdir():
        if part.name not in ("artifact.json", RANKING_HEAD):
            (rows / part.name).symlink_to(part)
    card = artifact.card.model_copy(update={"reserved_ids": tuple(range(80, 80 + R))})
    (rows / "artifact.json").write_text(card.model_dump_json())
    with pytest.raises(
        RecipeError,
        match=r"^artifact: .* scores with 6 reserved rows \(80 to 85\), the recipe says a ranking head beside the voc",
    ):
        host(recipe.model_copy(update={"artifact": str(rows)}))


def test_a_head_takes_no_block_of_rows(recipe: Recipe) -> None:
    both = recipe.reserved.model_copy(update={"kind": "head", "first": 5})
    with pytest.raises(RecipeError, match=r"^reserved\.first = 5: a ranking head .* takes no rows"):
        reserved_rows(recipe.model_copy(update={"reserved": both}))
