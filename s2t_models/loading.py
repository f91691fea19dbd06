"""Models and tokenizers from folders, the hub, or the package (`embedded:slm`): safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2t_models import chat
from s2t_models.errors import one_line
from s2t_models.recipe import RecipeError
from s2t_models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


def resolve(settings: ModelSettings) -> Path:
    """The folder that holds the model's files, downloaded from the hub where `path` names a repository.

    Raises RecipeError where there is no such folder or it holds no safetensors.
    """
    folder = _local(settings) or _download(settings)
    if not list(folder.glob("*.safetensors")):
        raise RecipeError(f"{folder}: holds no *.safetensors weights; other formats are not loaded")
    return folder


def _local(settings: ModelSettings) -> Path | None:
    """The folder that `path` names; None where it names a repository of the hub."""
    if settings.path.startswith("embedded:"):
        return Path(str(files("s2t_models.embedded") / "weights" / settings.path.removeprefix("embedded:")))
    if Path(settings.path).is_dir():
        return Path(settings.path)
    if settings.path.startswith((".", "/", "~")) or settings.path.count("/") != 1:
        raise RecipeError(f"{settings.path}: no such model folder")
    return None


def _download(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except Exception as error:
        raise _not_to_be_had(settings, error) from None


def _not_to_be_had(settings: ModelSettings, error: Exception) -> RecipeError:
    return RecipeError(f"{settings.path}: neither a folder here nor to be had from the hub: {one_line(error, 200)}")


def device_of(settings: ModelSettings) -> str:
    """The torch device a model goes to; "auto" is the GPU where there is one."""
    import torch

    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's configuration; of a repository of the hub nothing else is downloaded. Raises RecipeError where it is
    not that of a decoder-only language model that transformers has."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = _local(settings)
    try:
        config = AutoConfig.from_pretrained(
            folder or settings.path, revision=settings.revision, trust_remote_code=False
        )
    except (ValueError, OSError) as error:
        if folder is None and isinstance(error, OSError):
            raise _not_to_be_had(settings, error) from None
        raise RecipeError(f"{settings.path}: its config.json cannot be used: {one_line(error, 200)}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise RecipeError(f"{settings.path}: {config.model_type} is no decoder-only language model of transformers'")
    if config.get_text_config() is not config:
        raise RecipeError(f"{settings.path}: {config.model_type} is a multimodal model; only text models are loaded")
    return config


def load_model(settings: ModelSettings, attention: str | None = None) -> PreTrainedModel:
    """The causal language model, in eval mode, on its device. `attention` is transformers' implementation; None: the
    fastest that computes what the model asks for. Raises RecipeError as `load_config` does."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = load_config(settings)
    if getattr(config, "attn_logit_softcapping", None):  # which transformers' faster ones leave out without a word
        attention = attention or "eager"
    model = AutoModelForCausalLM.from_pretrained(
        resolve(settings),
        config=config,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.to(device_of(settings)).eval()  # type: ignore[arg-type]  # its decorator hides the signature


def end_ids(settings: ModelSettings) -> tuple[int, ...]:
    """The tokens that end a text: those of the model's generation configuration, else of its configuration."""
    from transformers import GenerationConfig

    try:
        end = GenerationConfig.from_pretrained(resolve(settings)).eos_token_id
    except OSError:
        end = load_config(settings).eos_token_id
    return tuple(end) if isinstance(end, list) else (end,) if end is not None else ()


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    """The model's tokenizer with its chat template. Raises RecipeError where the folder holds none that can be used."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(settings), trust_remote_code=False)
    except RecipeError:
        raise
    except Exception as error:  # anything, from the many formats of tokenizer files
        raise RecipeError(f"{settings.path}: its tokenizer cannot be loaded: {one_line(error, 200)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RecipeError(f"{settings.path}: {type(tokenizer).__name__} has no fast form; add a tokenizer.json")
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # what transformers makes of missing files
        raise RecipeError(f"{settings.path}: holds no tokenizer; add its tokenizer.json")
    return tokenizer


def decoder(settings: ModelSettings) -> Callable[[list[int]], str]:
    """From token ids to text, without special tokens. Raises RecipeError as `load_tokenizer` does."""
    return partial(chat.decode, load_tokenizer(settings))


def weights_hash(settings: ModelSettings) -> str:
    """sha256 over the model's weight files in order of name."""
    return _weights_hash(_stamps(sorted(resolve(settings).glob("*.safetensors"))))


def tokenizer_hash(settings: ModelSettings) -> str:
    """sha256 over what the tokenizer does, however its files are written: two models may work together only where this
    agrees.

    Raises RecipeError as `load_tokenizer` does."""
    small = (path for path in resolve(settings).iterdir() if path.is_file() and path.suffix != ".safetensors")
    return _tokenizer_hash(ModelSettings(path=settings.path, revision=settings.revision), _stamps(sorted(small)))


def tokenizer_difference(one: ModelSettings, other: ModelSettings) -> str | None:
    """In a few words, how the tokenizers of two models differ; None where they are the same."""
    if tokenizer_hash(one) == tokenizer_hash(other):
        return None
    first, second = _meaning(load_tokenizer(one)), _meaning(load_tokenizer(other))
    different = [name for name in first if first[name] != second[name]]
    if "tokens" not in different:
        return f"they differ in {', '.join(different)}"
    tokens, others = first["tokens"], second["tokens"]
    if len(tokens) != len(others):
        return f"one has {len(tokens)} tokens, the other {len(others)}"
    token = min((token for token in tokens if tokens[token] != others.get(token)), key=lambda token: tokens[token])
    return f"token {tokens[token]} is {token!r} in one of them alone"


def _meaning(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the tokenizer does, part by part. How it was saved (versions, order, settings left out because they are the
    default) is gone, since this is what the library makes of it now; padding and truncation are a matter of calls."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole.pop("model")
    vocabulary = model.pop("vocab")
    return {
        "tokens": tokenizer.get_vocab(),
        "scores": vocabulary if isinstance(vocabulary, list) else None,  # a unigram model's
        "merges": model.pop("merges", None),
        "model": {key: value for key, value in model.items() if value},
        "special tokens": sorted(whole["added_tokens"], key=lambda token: token["id"]),
        **{
            name.replace("_", "-"): whole[name] for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        },
    }


_Stamps = tuple[tuple[Path, int, int], ...]


def _stamps(paths: Iterable[Path]) -> _Stamps:
    """Files as they are now: a hash holds as long as they do not change."""
    return tuple((path, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in paths)


@lru_cache(maxsize=64)
def _weights_hash(files: _Stamps) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _tokenizer_hash(settings: ModelSettings, files: _Stamps) -> str:
    meaning = _meaning(load_tokenizer(settings))
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
