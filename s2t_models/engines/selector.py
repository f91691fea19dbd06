"""What an artifact adds to its model, as every engine holds it: the trigger head, and where scores are read from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from s2t_models.artifact import Artifact


@dataclass(frozen=True)
class Selector:
    """The trigger head; the rows of the vocabulary that score, `reserved_R`, or in their place a ranking head [R, H]
    (D.1); the values of either, `bins_R` (Eq. 5)."""

    head: torch.nn.Module
    reserved_R: torch.Tensor
    bins_R: torch.Tensor
    ranking_head_RH: torch.Tensor | None = None

    @classmethod
    def of(cls, artifact: Artifact, device: torch.device) -> Selector:
        """That of an artifact, on `device`. Raises ArtifactError where its files do not hold what they should."""
        card = artifact.card
        read = cls(artifact.head(), torch.tensor(card.reserved_ids), torch.tensor(card.bins), artifact.ranking_head())
        return read.on(device)

    def on(self, device: torch.device) -> Selector:
        """The same on another device, to be used and not trained."""
        ranking_head = self.ranking_head_RH
        return replace(
            self,
            head=self.head.to(device).eval(),
            reserved_R=self.reserved_R.long().to(device),
            bins_R=self.bins_R.float().to(device),
            ranking_head_RH=None if ranking_head is None else ranking_head.float().to(device),
        )
