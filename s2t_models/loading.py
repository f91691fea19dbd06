"""Models and tokenizers from folders, the hub, or the package (`embedded:slm`): safetensors only, no remote code."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from s2t_models.recipe import Model, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def resolve(settings: Model) -> Path:
    """The folder that holds the model's files, downloaded from the hub where `path` names a repository.

    Raises RecipeError where there is no such folder or it holds no safetensors.
    """
    if settings.path.startswith("embedded:"):
        folder = Path(str(files("s2t_models.embedded") / "weights" / settings.path.removeprefix("embedded:")))
    elif Path(settings.path).is_dir():
        folder = Path(settings.path)
    elif settings.path.startswith((".", "/", "~")) or settings.path.count("/") != 1:
        raise RecipeError(f"{settings.path}: no such model folder")
    else:
        folder = _download(settings)
    if not list(folder.glob("*.safetensors")):
        raise RecipeError(f"{folder}: holds no *.safetensors weights; other formats are not loaded")
    return folder


def _download(settings: Model) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"{settings.path}: neither a folder here nor to be had from the hub: {reason}") from None


def device_of(settings: Model) -> str:
    """The torch device a model goes to; "auto" is the GPU where there is one."""
    import torch

    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def load_model(settings: Model, attention: str = "sdpa") -> PreTrainedModel:
    """The causal language model, in eval mode, on its device, with transformers' `attention` implementation."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        resolve(settings),
        dtype=getattr(torch, settings.dtype),
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.to(device_of(settings)).eval()  # type: ignore[arg-type]  # its decorator hides the signature


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve(settings), trust_remote_code=False)


def weights_hash(settings: Model) -> str:
    """sha256 over the model's weight files in order of name."""
    return _hash(tuple(sorted(resolve(settings).glob("*.safetensors"))))


def tokenizer_hash(settings: Model) -> str:
    """sha256 over the tokenizer's files: two models may work together only where this agrees."""
    folder = resolve(settings)
    return _hash(tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()))


def file_hash(path: Path) -> str:
    """sha256 of one file."""
    return _hash((path,))


def _hash(paths: tuple[Path, ...]) -> str:
    return _hash_as_of(tuple((path, path.stat().st_mtime_ns) for path in paths))


@lru_cache(maxsize=64)
def _hash_as_of(paths: tuple[tuple[Path, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _ in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
