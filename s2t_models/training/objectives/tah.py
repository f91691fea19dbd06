"""Think-at-Hard: a LoRA for the second pass of hard tokens, and the decider that finds them.

Hard are the states where the base's own choice is not the teacher's. There the second pass is run in the same forward
as the trajectory, behind it, under the duo-causal mask: it sees the first pass up to its own token and the second
passes before it, and the LoRA acts on it alone. The base is frozen, so the other states say what they said.

Axes: _B row, _L packed token, _S decoding state, _N hard state, _V text vocabulary, _H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from s2t_models import second_pass
from s2t_models.artifact import replacing
from s2t_models.provenance import Provenance
from s2t_models.second_pass import Card, mean_embedding
from s2t_models.storage import Location
from s2t_models.training import losses
from s2t_models.training.batches import Batch
from s2t_models.training.decider import train_decider
from s2t_models.training.objectives.base import Objective, Outputs, Term
from s2t_models.training.per_state import per_state
from s2t_models.training.products import Merged
from s2t_models.training.selector import Selector
from s2t_models.training.tree import TreeBatch
from s2t_models.training.tree_attention import Sight
from s2t_models.training_settings import LoraSettings


@dataclass(frozen=True, kw_only=True)
class BothPasses(Outputs):
    """The tuned model's states are those of the second passes, where `hard_S`; its logits are the sum of both passes'
    there, and the base's elsewhere."""

    base_SH: torch.Tensor
    hard_S: torch.Tensor

    def drift(self) -> torch.Tensor:
        def drift(tuned_SV: torch.Tensor, base_SH: torch.Tensor) -> torch.Tensor:
            return losses.stability(self._base(base_SH), tuned_SV)

        return self.at(torch.arange(len(self.hard_S), device=self.hard_S.device), drift, self.base_SH)

    def at(self, state_G: torch.Tensor, function: Callable[..., torch.Tensor], *given_G: torch.Tensor) -> torch.Tensor:
        def of_both(second_GH: torch.Tensor, base_GH: torch.Tensor, hard_G: torch.Tensor, *given: Any) -> torch.Tensor:
            first_GV = self._base(base_GH)
            both_GV = torch.where(hard_G[:, None], first_GV + self.text_logits(second_GH), first_GV)
            return function(both_GV, *given)

        rows = (rows_S[state_G] for rows_S in (self.tuned_SH, self.base_SH, self.hard_S))
        return per_state(of_both, self.vocabulary, *rows, *given_G)

    @torch.no_grad()
    def _base(self, base_SH: torch.Tensor) -> torch.Tensor:
        return self.text_logits(base_SH)


class TahObjective(Objective):
    """Cross-entropy of the teacher's choice under the summed logits at hard states, per state of the trajectories. Its
    product is a second pass (`s2t_models.second_pass`)."""

    mark = second_pass.CARD
    keeps_lora_apart: ClassVar[bool] = True
    trains_after: ClassVar[str | None] = "decider"

    @property
    def lora(self) -> LoraSettings:
        return self.settings.tah.lora

    def outputs(self, batch: Batch, base_SH: torch.Tensor | None, selector: Selector, model: nn.Module) -> BothPasses:
        assert base_SH is not None
        logits, packed = selector.text_logits, batch.packed
        with torch.no_grad():
            hard_S = hard_states(base_SH, batch.teacher_S, logits, selector.vocabulary)
            (hard_N,) = hard_S.nonzero(as_tuple=True)
            support = support_of(self.settings.tah.support, selector.vocabulary, selector.reserved_ids)
            embed = selector.model.get_input_embeddings()

            def mean(base_NH: torch.Tensor) -> torch.Tensor:
                return mean_embedding(logits(base_NH), support, embed)

            means_NH = per_state(mean, selector.vocabulary, base_SH[hard_N])
            inputs, where_N = second_passes(packed, hard_N, means_NH, embed)
        tuned_NH = model(**inputs)[where_N]
        tuned_SH = tuned_NH.new_zeros(base_SH.shape).index_put((hard_N,), tuned_NH)
        no_scores_GK = base_SH.new_zeros(len(packed.row_G), 0)
        return BothPasses(
            base_SH=base_SH,
            tuned_SH=tuned_SH,
            scores_GK=no_scores_GK,
            text_logits=logits,
            vocabulary=selector.vocabulary,
            hard_S=hard_S,
        )

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        assert isinstance(outputs, BothPasses)
        (hard_N,) = outputs.hard_S.nonzero(as_tuple=True)
        surprisal_N = outputs.surprisal(hard_N, batch.teacher_S[hard_N])
        return [Term("second_pass_loss", surprisal_N.sum() / max(len(outputs.hard_S), 1), 1.0, per="states")]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.text_choice(batch.packed.state_G, batch.candidates_GK)

    def save(self, merged: Merged, output: Location) -> Provenance:
        config, settings = merged.model.config, self.settings.tah
        card = Card(
            layers=tuple(sorted({round(depth * config.num_hidden_layers) for depth in settings.depths})),
            support=support_of(settings.support, config.vocab_size, merged.reserved_ids),
        )
        decider, figures = train_decider(merged, card)
        provenance = merged.provenance.model_copy(update={"decider": figures})
        with replacing(output, second_pass.CARD) as parts:
            second_pass.save(parts, merged.adapter, decider, card, provenance)
        return provenance


def second_passes(
    packed: TreeBatch, hard_N: torch.Tensor, means_NH: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """The arguments of `Selector.forward` for the trajectories with the second passes of some of their states behind
    them, and where these lie (row, column). `means_NH` are their inputs."""
    row_N, position_N = packed.row_S[hard_N], packed.column_S[hard_N]
    rows, trunk = packed.ids_BL.shape[0], packed.trunk
    count_B = torch.bincount(row_N, minlength=rows)
    first_B = count_B.cumsum(0) - count_B  # states stand row after row
    column_N = trunk + torch.arange(len(row_N), device=row_N.device) - first_B[row_N]
    length = trunk + int(count_B.max())
    where_N = row_N, column_N

    def extended(values_BL: torch.Tensor, second_N: torch.Tensor) -> torch.Tensor:
        out = values_BL.new_zeros(rows, length, *values_BL.shape[2:])
        out[:, :trunk] = values_BL[:, :trunk]
        return out.index_put(where_N, second_N.to(out.dtype))

    at_L = torch.arange(length, device=row_N.device)
    sight = Sight(
        seen_BL=extended(packed.seen_BL, position_N + 1),
        positions_BL=extended(packed.positions_BL, position_N),
        since_BL=at_L.clamp(max=trunk).expand(rows, length),
    )
    inputs = {
        "inputs_embeds": extended(embed(packed.ids_BL[:, :trunk]), means_NH),
        "sight": sight,
        "lora_BL": torch.zeros(rows, length, dtype=torch.bool, device=row_N.device).index_fill(1, at_L[trunk:], True),
    }
    return inputs, where_N


def hard_states(
    base_SH: torch.Tensor,
    teacher_S: torch.Tensor,
    text_logits: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
) -> torch.Tensor:
    """Where the base would not write what the teacher would, bool [S]."""
    return per_state(lambda rows_SH: text_logits(rows_SH).argmax(-1), vocabulary, base_SH) != teacher_S


def support_of(asked: int, vocabulary: int, reserved_ids: Sequence[int]) -> int:
    """How many of the likeliest tokens are read: as many as asked for, where there are so many that texts have."""
    return min(asked, vocabulary - len(reserved_ids))
