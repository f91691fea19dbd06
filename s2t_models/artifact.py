"""The artifact: a trained S2T-Local model as a directory, on a file system or in an object store.

    model/                     the merged transformers checkpoint (safetensors) with its tokenizer
    trigger_head.safetensors   the trigger head
    adapter/                   the LoRA before it was merged, for peft on the base model
    ranking_head.safetensors   the auxiliary ranking head, where the model has no reserved rows (D.1)
    artifact.json              reserved ids, bins, thresholds and provenance (`Card`)

Reserved rows live in the model's output embedding, so loading needs transformers alone. The module does not know
how an engine uses any of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from s2t_models.errors import UserError, first_problem
from s2t_models.provenance import Provenance
from s2t_models.settings import ModelSettings
from s2t_models.storage import DIGESTS, Location, ObjectPath, location, whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from s2t_models.trigger import TriggerHead

CARD, HEAD, MODEL = "artifact.json", "trigger_head.safetensors", "model"
RANKING_HEAD, ADAPTER = "ranking_head.safetensors", "adapter"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: What tells a plain checkpoint directory.
CHECKPOINT = "config.json"


class ArtifactError(UserError):
    """A directory that is not a usable artifact; the message is one line."""


class Card(BaseModel):
    """What artifact.json holds.

    `bins` are the values v of the R rows that score (Eq. 5); `reserved_ids` is empty where these are an auxiliary
    head's. `temperature` and `prior_weight` are those of decoding, `trained_prior_weight` the one of training.
    `thresholds` maps a trigger ("head", on its logit; "kl" and "entropy", in nats) to budget -> threshold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["s2t-local/1"] = "s2t-local/1"
    reserved_ids: tuple[int, ...]
    bins: tuple[float, ...]
    temperature: float
    prior_weight: float
    trained_prior_weight: float
    thresholds: dict[str, dict[float, float]]
    provenance: Provenance

    @model_validator(mode="after")
    def _one_bin_a_row(self) -> Card:
        if self.reserved_ids and len(self.reserved_ids) != len(self.bins):
            raise ValueError(f"{len(self.reserved_ids)} reserved_ids, but {len(self.bins)} bins")
        return self


@dataclass(frozen=True)
class Adapter:
    """A LoRA in peft's own terms: what `adapter_config.json` holds, and the factors by name."""

    config: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / ADAPTER_WEIGHTS)
        # peft's sets are lists in its file as well
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in self.config.items()}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, default=str) + "\n")


@dataclass(frozen=True)
class Artifact:
    """An artifact directory that was read and checked."""

    folder: Location
    card: Card

    @classmethod
    def load(cls, folder: str | Location) -> Artifact:
        """Read and check a directory; weights are not read yet. Raises ArtifactError, and StorageError where an object
        store cannot be reached."""
        folder = location(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such artifact directory; `python -m pipelines.distil` makes one")
        for name in (CARD, HEAD, MODEL):
            if not (folder / name).exists():
                raise ArtifactError(f"{folder}: not an S2T-Local artifact, {name} is missing")
        try:
            card = Card.model_validate_json((folder / CARD).read_text())
        except ValidationError as error:
            raise ArtifactError(f"{folder / CARD}: {first_problem(error)}") from None
        has_head = (folder / RANKING_HEAD).exists()
        if not card.reserved_ids and not has_head:
            raise ArtifactError(f"{folder}: {CARD} names no reserved rows, and {RANKING_HEAD} is missing")
        if card.reserved_ids and has_head:
            raise ArtifactError(
                f"{folder}: scores are read from the reserved rows that {CARD} names or from {RANKING_HEAD}, not from "
                "both; distil it again"
            )
        return cls(folder, card)

    def model(self, base: ModelSettings) -> ModelSettings:
        """The settings to load the merged model with: `base` (the recipe's SLM) with this artifact's weights."""
        return base.model_copy(update={"path": str((self.folder / MODEL).resolve()), "revision": None})

    def head(self) -> TriggerHead:
        """The trigger head in eval mode, on the CPU."""
        from safetensors.torch import load

        from s2t_models.trigger import TriggerHead

        tensors = load((self.folder / HEAD).read_bytes())
        try:
            head = TriggerHead(tensors["first.weight"].shape[1], tensors["first.weight"].shape[0])
            head.load_state_dict(tensors)
        except (KeyError, RuntimeError):
            raise ArtifactError(f"{self.folder / HEAD}: does not hold a trigger head") from None
        return head.eval()

    def ranking_head(self) -> torch.Tensor | None:
        """The auxiliary ranking head's weight, [R, H], on the CPU; None where reserved rows do its work."""
        from safetensors.torch import load

        if self.card.reserved_ids:
            return None
        weight_RH = load((self.folder / RANKING_HEAD).read_bytes()).get("weight")
        if weight_RH is None or weight_RH.shape[:1] != (len(self.card.bins),):
            raise ArtifactError(f"{self.folder / RANKING_HEAD}: does not hold a ranking head of {len(self.card.bins)}")
        return weight_RH


def save(
    folder: str | Location,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: TriggerHead,
    card: Card,
    ranking_head: torch.Tensor | None = None,
    adapter: Adapter | None = None,
) -> Artifact:
    """Write an artifact; one that is already there is replaced as a whole. Raises ArtifactError where `folder` holds
    something else."""
    from safetensors.torch import save_file

    with replacing(folder, CARD) as parts:
        _save_model(parts / MODEL, model, tokenizer)
        save_file({name: value.contiguous().cpu() for name, value in head.state_dict().items()}, parts / HEAD)
        if adapter is not None:
            adapter.write(parts / ADAPTER)
        if ranking_head is not None:
            save_file({"weight": ranking_head.contiguous().cpu()}, parts / RANKING_HEAD)
        (parts / CARD).write_text(card.model_dump_json(indent=2) + "\n")
    return Artifact.load(folder)


def save_checkpoint(
    folder: str | Location, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, provenance: Provenance
) -> None:
    """Write a plain transformers checkpoint with its provenance; one that is already there is replaced as a whole.
    Raises ArtifactError where `folder` holds something else."""
    with replacing(folder, CHECKPOINT) as parts:
        _save_model(parts, model, tokenizer)
        provenance.write(parts)


def read_provenance(folder: str | Location) -> Provenance | None:
    """Where an artifact, a checkpoint or a router comes from; None for what was not distilled here. Raises
    ArtifactError or ProvenanceError where the file cannot be read."""
    folder = location(folder)
    if (folder / CARD).is_file():
        return Artifact.load(folder).card.provenance
    return Provenance.read(folder)


def _save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def refuse_foreign(folder: str | Location, mark: str) -> None:
    """Raise ArtifactError where `folder` holds anything but what may be replaced: a directory with the file `mark`,
    one whose publishing was broken off, or nothing."""
    folder = location(folder)
    marks = (mark, DIGESTS) if isinstance(folder, ObjectPath) else (mark,)
    if any((folder / name).is_file() for name in marks):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: exists and holds something else; give another --output")


@contextmanager
def replacing(folder: str | Location, mark: str) -> Iterator[Path]:
    """An empty folder of this machine that takes the place of `folder` at the end, so that `folder` is never half of
    anything. Raises ArtifactError as `refuse_foreign` does."""
    folder = location(folder)
    refuse_foreign(folder, mark)
    with whole(folder, mark) as part:
        part.mkdir(parents=True)
        yield part
