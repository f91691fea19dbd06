"""Records that tests need and nobody made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2t_models.artifact import ADAPTER, Card
from s2t_models.calibration import Calibration
from s2t_models.loading import weights_hash
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.reserved import bins, reserved_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What a decider that nobody trained reads.
LAYERS, SUPPORT = (0, 2), 20
#: Settings that differ from the embedded recipe's, of an artifact that is served beside another.
OTHER = ("reserved.count=8", "policies.local.prior_weight=0.5", "distil.temperature=0.2")


def provenance(**changes: Any) -> Provenance:
    """Of a training that never was."""
    record = {
        "objective": "selector",
        "recipe": "abc",
        "base_weights": "base",
        "teacher_weights": "teacher",
        "tokenizer": "tokenizer",
        "divergence": "KL(SLM || teacher), top 64, bucket",
        "shards": {"training": "def"},
        "rows": {},
        "seeds": {"training": 0},
        "settings": {"distil.steps": 20},
    }
    return Provenance(**record | changes)


def card(recipe: Recipe, thresholds: dict[str, dict[float, float]]) -> Card:
    """Of an artifact of the recipe that nobody trained."""
    reserved = reserved_rows(recipe)
    return Card(
        reserved_ids=reserved,
        bins=tuple(bins(len(reserved)).tolist()),
        temperature=recipe.distil.temperature,
        prior_weight=recipe.policies.local.prior_weight,
        trained_prior_weight=recipe.distil.prior_weight,
        thresholds=thresholds,
        provenance=provenance(
            base_weights=weights_hash(recipe.slm),
            teacher_weights=weights_hash(recipe.teacher),
            divergence=str(recipe.divergence),
        ),
    )


def calibration(**changes: Any) -> Calibration:
    """Of a collection that never was."""
    record = {
        "kl": {0.1: 0.25},
        "entropy": {0.1: 0.5},
        "steps": 100,
        "rows": (),
        "task": "embedded-calibration",
        "slm": "base",
        "teacher": "teacher",
        "tokenizer": "tokenizer",
        "divergence": "KL(SLM || teacher), top 64, bucket",
    }
    return Calibration(**record | changes)


def second_pass(model: PreTrainedModel, folder: Path, **changes: Any) -> Path:
    """A second pass that nobody trained: its LoRA moves logits by about what they spread."""
    import copy

    import torch
    from peft import get_peft_model

    from s2t_models import second_pass
    from s2t_models.router import Router, RouterConfig, save_router
    from s2t_models.training.selector import lora_config
    from s2t_models.training_settings import LoraSettings

    torch.manual_seed(1)
    config = lora_config(model, LoraSettings(rank=4, alpha=8, dropout=0))
    config.init_lora_weights = False
    get_peft_model(copy.deepcopy(model), config).save_pretrained(folder / ADAPTER)
    sizes = RouterConfig(model.config.hidden_size, SUPPORT, width=16, blocks=2, states=len(LAYERS))
    save_router(Router(sizes), folder / second_pass.DECIDER)
    provenance(objective="tah", **changes).write(folder)
    card = second_pass.Card(layers=LAYERS, support=SUPPORT)
    (folder / second_pass.CARD).write_text(card.model_dump_json())
    return folder
