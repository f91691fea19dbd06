"""From the best trained tensors to what the objective produces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from s2t_models.loading import load_tokenizer
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from s2t_models.training.batches import Trajectory, split_by_prompt
from s2t_models.training.objectives import objective
from s2t_models.training.products import Merged, Report
from s2t_models.training.trainer import load_selector


def build(
    recipe: Recipe,
    trained: Mapping[str, torch.Tensor],
    data: Sequence[Trajectory],
    calibration: Sequence[Trajectory] | None,
    provenance: Provenance,
    output: Location,
    report: Report = lambda share, figures: None,
) -> Provenance:
    """Put what `Selector.trained` gave into the recipe's SLM and write the objective's product to `output`; returns
    its provenance as written. Without `calibration`, thresholds are set on the held-out prompts' trajectories.
    `report` hears how far what takes long is."""
    chosen = objective(provenance.objective, recipe.distil)
    selector = load_selector(recipe, chosen)
    selector.load_trained(trained)
    adapter = selector.adapter(recipe.slm.path)
    training, held_out = split_by_prompt(data, recipe.distil.validation, recipe.seed)
    model = selector.base() if chosen.keeps_lora_apart else selector.merge()
    merged = Merged(
        recipe=recipe,
        model=model.eval(),
        tokenizer=load_tokenizer(recipe.slm),
        reserved_ids=selector.reserved_ids,
        bins=tuple(selector.bins_R.tolist()),
        ranking_head=selector.ranking_head,
        adapter=adapter,
        training=training,
        calibration=held_out if calibration is None else calibration,
        provenance=provenance,
        report=report,
    )
    return chosen.save(merged, output)
