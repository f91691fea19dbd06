"""The artifact: a trained S2T-Local model as a directory.

    model/                     the merged transformers checkpoint (safetensors) with its tokenizer
    trigger_head.safetensors   the trigger head
    artifact.json              reserved ids, bins, thresholds and where it all came from (`Card`)

The reserved rows live in the model's output embedding, so loading needs transformers alone. The module does not know how
an engine uses any of it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from s2t_models.loading import TOKENIZER_FILES
from s2t_models.recipe import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from s2t_models.trigger import TriggerHead

CARD, HEAD, MODEL = "artifact.json", "trigger_head.safetensors", "model"
#: What tells a plain checkpoint directory.
CHECKPOINT = "config.json"


class ArtifactError(ValueError):
    """A directory that is not a usable artifact; the message is one line."""


class Card(BaseModel):
    """What artifact.json holds.

    `prior_weight` is the one for decoding, `trained_prior_weight` the one of training; `thresholds` maps a trigger ("head",
    on its logit; "kl" and "entropy", in nats) to budget -> threshold; `budget` is the one to use unless told otherwise.
    `provenance`: recipe digest, base weights hash, shard hashes, seeds, validation metrics.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["s2t-local/1"] = "s2t-local/1"
    reserved_ids: tuple[int, ...]
    bins: tuple[float, ...]
    k: int
    method: Literal["top_k", "multinomial"]
    temperature: float
    prior_weight: float
    trained_prior_weight: float
    thresholds: dict[str, dict[str, float]]
    budget: float
    provenance: dict[str, Any]

    def threshold(self, budget: float | None = None, trigger: str = "head") -> float:
        """The threshold at a budget (None: the card's own). Raises ArtifactError where it was not calibrated."""
        wanted = self.budget if budget is None else budget
        calibrated = self.thresholds.get(trigger, {})
        for tau, threshold in calibrated.items():
            if abs(float(tau) - wanted) < 1e-9:
                return threshold
        known = ", ".join(calibrated) or "none"
        raise ArtifactError(
            f"the artifact has no {trigger} threshold for budget {wanted:g}; calibrated budgets: {known}"
        )


@dataclass(frozen=True)
class Artifact:
    """An artifact directory that was read and checked."""

    folder: Path
    card: Card

    @classmethod
    def load(cls, folder: str | Path) -> Artifact:
        """Read and check a directory; weights are not read yet. Raises ArtifactError."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: no such artifact directory; `python -m pipelines.distil` makes one")
        for name in (CARD, HEAD, MODEL):
            if not (folder / name).exists():
                raise ArtifactError(f"{folder}: not an S2T-Local artifact, {name} is missing")
        try:
            card = Card.model_validate_json((folder / CARD).read_text())
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ArtifactError(f"{folder / CARD}: {key}: {first['msg'].lower()}") from None
        return cls(folder, card)

    def model(self, base: Model) -> Model:
        """The settings to load the merged model with: `base` (the recipe's SLM) with this artifact's weights."""
        return base.model_copy(update={"path": str((self.folder / MODEL).resolve()), "revision": None})

    def head(self) -> TriggerHead:
        """The trigger head in eval mode, on the CPU."""
        from safetensors.torch import load_file

        from s2t_models.trigger import TriggerHead

        tensors = load_file(self.folder / HEAD)
        try:
            head = TriggerHead(tensors["first.weight"].shape[1], tensors["first.weight"].shape[0])
            head.load_state_dict(tensors)
        except (KeyError, RuntimeError):
            raise ArtifactError(f"{self.folder / HEAD}: does not hold a trigger head") from None
        return head.eval()


def save(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, head: TriggerHead, card: Card
) -> Artifact:
    """Write an artifact; one that is already there is replaced as a whole. Raises ArtifactError where `folder` holds
    something else."""
    from safetensors.torch import save_file

    folder = Path(folder)
    parts = _fresh(folder, CARD)
    _save_model(parts / MODEL, model, tokenizer)
    save_file({name: value.contiguous().cpu() for name, value in head.state_dict().items()}, parts / HEAD)
    (parts / CARD).write_text(card.model_dump_json(indent=2) + "\n")
    _put_in_place(parts, folder)
    return Artifact.load(folder)


def save_checkpoint(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a plain merged checkpoint (the `kd` control); one that is already there is replaced as a whole."""
    folder = Path(folder)
    parts = _fresh(folder, CHECKPOINT)
    _save_model(parts, model, tokenizer)
    _put_in_place(parts, folder)
    return folder


def _save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The very files, not ones that mean the same: models that work together are told by their tokenizers' hash.
    origin = Path(tokenizer.name_or_path)
    if any((origin / name).is_file() for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
            if (origin / name).is_file():
                shutil.copy(origin / name, folder / name)


def refuse_foreign(folder: str | Path, mark: str) -> None:
    """Raise ArtifactError where `folder` holds anything but what may be replaced: a directory with the file `mark` (CARD or
    CHECKPOINT), or nothing."""
    folder = Path(folder)
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: exists and holds something else; give another --output")


def _fresh(folder: Path, mark: str) -> Path:
    """An empty folder beside `folder` to write into, so that `folder` is never half an artifact."""
    refuse_foreign(folder, mark)
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def _put_in_place(beside: Path, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
