"""The artifact directory: what is saved comes back, and anything else is refused in one line."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import provenance
from test_tree import SIZES
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from s2t_models import artifact
from s2t_models.artifact import Artifact, ArtifactError, Card, read_provenance
from s2t_models.engines.contract import Sampling, Selection
from s2t_models.engines.torch.load import load
from s2t_models.hosting import Hosted
from s2t_models.loading import load_tokenizer
from s2t_models.provenance import ProvenanceError
from s2t_models.recipe import load_recipe
from s2t_models.reserved import bins
from s2t_models.settings import CandidateSettings, ModelSettings
from s2t_models.trigger import TriggerHead

CARD = Card(
    reserved_ids=tuple(range(88, 96)),
    bins=tuple(bins(8).tolist()),
    temperature=0.1,
    prior_weight=2.0,
    trained_prior_weight=1.0,
    thresholds={"head": {0.01: 2.5, 0.1: 0.25}},
    provenance=provenance(rows={"training (x)": ("a", "b")}, settings={"distil.lora": {"targets": ["q"]}}),
)


@pytest.fixture
def parts() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast, TriggerHead]:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    return model, tokenizer, TriggerHead(32, 16, dropout=0.1).eval()


@torch.no_grad()
def test_what_is_saved_comes_back(tmp_path: Path, parts):
    model, tokenizer, head = parts
    artifact.save(tmp_path / "a", model, tokenizer, head, CARD)
    loaded = Artifact.load(tmp_path / "a")
    assert loaded.card == CARD
    hidden = torch.randn(4, 32)
    assert torch.equal(loaded.head()(hidden), head(hidden))
    settings = loaded.model(ModelSettings(path="embedded:slm", dtype="float32"))
    assert settings.dtype == "float32"
    again = AutoModelForCausalLM.from_pretrained(settings.path, dtype=torch.float32)
    ids = torch.randint(96, (1, 6))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert sorted(path.suffix for path in (tmp_path / "a" / "model").glob("*.bin")) == []


def test_saving_replaces_an_artifact_as_a_whole_and_nothing_else(tmp_path: Path, parts):
    artifact.save(tmp_path / "a", *parts, CARD)
    (tmp_path / "a" / "left-over").touch()
    artifact.save(tmp_path / "a", *parts, CARD.model_copy(update={"temperature": 0.5}))
    assert Artifact.load(tmp_path / "a").card.temperature == 0.5
    assert not (tmp_path / "a" / "left-over").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match="holds something else"):
        artifact.save(tmp_path / "b", *parts, CARD)
    assert (tmp_path / "b" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_missing_and_foreign_files_are_named_in_one_line(tmp_path: Path, parts):
    with pytest.raises(ArtifactError, match="no such artifact directory"):
        Artifact.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"artifact\.json is missing"):
        Artifact.load(tmp_path)
    folder = artifact.save(tmp_path / "a", *parts, CARD).folder
    card = json.loads((folder / "artifact.json").read_text())
    for change, complaint in (
        ({"format": "other/3"}, "format"),
        ({"colour": "red"}, "colour"),
        ({"reserved_ids": "all"}, "reserved_ids"),
        ({"provenance": {"objective": "selector"}}, "provenance.recipe: field required"),
    ):
        (folder / "artifact.json").write_text(json.dumps(card | change))
        with pytest.raises(ArtifactError, match=complaint) as caught:
            Artifact.load(folder)
        assert "\n" not in str(caught.value)
    (folder / "artifact.json").write_text("{")
    with pytest.raises(ArtifactError, match="json"):
        Artifact.load(folder)


def test_a_provenance_tells_what_would_be_trained_again(tmp_path: Path):
    planned = provenance(rows={"training (x)": ("a", "b")}, settings={"distil.lora": {"targets": ["q"]}})
    done = planned.model_copy(
        update={"recipe": "other", "validation": {"spearman": float("nan")}, "begun_at_steps": (0, 4)}
    )
    done.write(tmp_path)
    read = read_provenance(tmp_path)
    assert read is not None
    assert read.begun_at_steps == (0, 4)
    assert math.isnan(read.validation["spearman"])
    assert read.has_inputs_of(planned)
    for change in ({"settings": {"distil.lora": {"targets": ["k"]}}}, {"shards": {}}, {"objective": "kd"}):
        assert not read.has_inputs_of(planned.model_copy(update=change))
    (tmp_path / "provenance.json").write_text('{"objective": 3}')
    with pytest.raises(ProvenanceError, match=r"provenance\.json: objective: "):
        read_provenance(tmp_path)
    assert read_provenance(tmp_path / "elsewhere") is None


def test_the_engine_scores_with_the_cards_bins(untrained_artifact: Path, recipe_path: Path, tmp_path: Path):
    """Bins in reverse order turn every preference round."""
    recipe, loaded = load_recipe(recipe_path), Artifact.load(untrained_artifact)
    turned = tmp_path / "turned"
    shutil.copytree(untrained_artifact, turned)
    card = loaded.card.model_copy(update={"bins": loaded.card.bins[::-1]})
    (turned / "artifact.json").write_text(card.model_dump_json())
    prefix = load_tokenizer(recipe.slm).encode("Mia has 3 pens and buys 14 more.")
    selection = Selection(-1e9, CandidateSettings(k=4, method="top_k"))
    scores = []
    for folder in (untrained_artifact, turned):
        engine = load(Hosted("s2t-local", recipe.slm, artifact=folder))
        draft = asyncio.run(engine.generate_selecting(prefix, Sampling(1), selection))
        selected = asyncio.run(engine.select(prefix, draft.decisions[0].candidates_K))
        engine.close()
        scores.append(np.array(draft.decisions[0].scores_K))
        np.testing.assert_allclose(selected.scores_K, scores[-1], atol=1e-6)
    np.testing.assert_allclose(scores[0] + scores[1], 1.0, atol=1e-6)
    assert np.ptp(scores[0]) > 1e-3
