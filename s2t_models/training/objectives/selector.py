"""The selector of S2T-Local (Eqs. 5-8, 13, 14): choose the teacher's best candidate by scores on reserved rows."""

from __future__ import annotations

import torch

from s2t_models import artifact
from s2t_models.provenance import Provenance
from s2t_models.storage import Location
from s2t_models.training import losses
from s2t_models.training.batches import Batch
from s2t_models.training.objectives.base import Objective, Outputs, Term
from s2t_models.training.products import Merged, save_artifact


class SelectorObjective(Objective):
    """Selection + `margin` x pairwise hinge + `beta` x KL to the base. It trains LoRA and reserved rows, and its
    product is an artifact with a trigger head."""

    needs_leaves = True
    mark = artifact.CARD

    def trains(self, parameter: str) -> bool:
        return True

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        return [
            *self.ranking(batch, outputs),
            Term("kl_loss", outputs.drift().mean(), self.settings.beta, per="states"),
        ]

    def ranking(self, batch: Batch, outputs: Outputs) -> list[Term]:
        """What teaches the teacher's ranking of the candidates; the ablations of D.4 put others in its place."""
        settings, scores_GK = self.settings, outputs.scores_GK
        preference_GK = self.preference(batch, outputs)
        selection = losses.selection(preference_GK, batch.target_G, batch.valid_GK)
        margin = losses.margin(
            preference_GK, scores_GK, batch.target_G, batch.valid_GK, settings.temperature, settings.margin_spread
        )
        return [
            Term("selection_loss", selection, 1.0, per="groups"),
            Term("margin_loss", margin, settings.margin, per="groups"),
        ]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        preference_GK = self.preference(batch, outputs)
        best_G1 = preference_GK.masked_fill(~batch.valid_GK, losses.EXCLUDED).argmax(-1, keepdim=True)
        return preference_GK, batch.candidates_GK.gather(1, best_G1)[:, 0]

    def preference(self, batch: Batch, outputs: Outputs) -> torch.Tensor:
        """What training maximises for the teacher's best candidate, [G, K]. The prior is that of the model that is
        trained, as at decoding: of the frozen base, which the KL holds it to. Where the SLM that was labelled is that
        base, it is what the labels say of the SLM."""
        settings, prior_GK = self.settings, outputs.prior(batch.packed.state_G, batch.candidates_GK)
        return losses.preference(outputs.scores_GK, prior_GK, settings.temperature, settings.prior_weight)

    def save(self, merged: Merged, output: Location) -> Provenance:
        return save_artifact(merged, output)
