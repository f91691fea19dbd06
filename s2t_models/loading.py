"""Models and tokenizers from folders, object stores, the hub, or the package (`embedded:slm`): safetensors only, no
remote code.

Weights come to the machine that runs them, and to no other: what a driver needs (configuration, tokenizer, the digest
of the weights) it has without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2t_models import chat
from s2t_models.errors import one_line
from s2t_models.node_cache import fetched, recorded_digests, sha256_of
from s2t_models.recipe import RecipeError
from s2t_models.settings import ModelSettings
from s2t_models.storage import Location, ObjectPath, is_uri, location

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


#: A model's weights, and what else is loaded of its files.
WEIGHTS = "*.safetensors"
SMALL = ("*.json", "*.jinja", "*.model", "merges.txt")
_INDEX = "model.safetensors.index.json"


def resolve(settings: ModelSettings) -> Path:
    """The folder of this machine that holds the model's files, fetched from the object store or the hub where `path`
    names it there.

    Raises RecipeError where there is no such folder or it holds no safetensors, and StorageError.
    """
    place = _place(settings)
    folder = _download(settings, (WEIGHTS, *SMALL)) if place is None else fetched(place)
    if not list(folder.glob(WEIGHTS)):
        raise _no_weights(folder)
    return folder


def _without_weights(settings: ModelSettings) -> Path:
    """The folder with the model's configuration and tokenizer; weights may be missing in it. Raises as `resolve`."""
    place = _place(settings)
    return _download(settings, SMALL) if place is None else fetched(place, lambda name: not _is_weights(name))


def pinned(settings: ModelSettings) -> ModelSettings:
    """With the commit of the hub that the revision stands for now, so that every node fetches the same files. Raises as
    `resolve` does."""
    if _place(settings) is not None:
        return settings
    return settings.model_copy(update={"revision": _without_weights(settings).name})


def _place(settings: ModelSettings) -> Location | None:
    """The folder that `path` names; None where it names a repository of the hub."""
    if settings.path.startswith("embedded:"):
        return Path(str(files("s2t_models.embedded") / "weights" / settings.path.removeprefix("embedded:")))
    if is_uri(settings.path):
        return location(settings.path)
    if Path(settings.path).is_dir():
        return Path(settings.path)
    if settings.path.startswith((".", "/", "~")) or settings.path.count("/") != 1:
        raise RecipeError(f"{settings.path}: no such model folder")
    return None


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS.removeprefix("*"))


def _no_weights(folder: Location | str) -> RecipeError:
    return RecipeError(f"{folder}: holds no *.safetensors weights; other formats are not loaded")


def _download(settings: ModelSettings, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = partial(snapshot_download, settings.path, revision=settings.revision, allow_patterns=list(patterns))
    try:
        return Path(wanted())
    except Exception as error:
        with contextlib.suppress(OSError, ValueError):  # what is here already will do where the hub does not answer
            return Path(wanted(local_files_only=True))
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

    place = _place(settings)
    folder = _without_weights(settings) if isinstance(place, ObjectPath) else place
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
        end = GenerationConfig.from_pretrained(_without_weights(settings)).eos_token_id
    except OSError:
        end = load_config(settings).eos_token_id
    return tuple(end) if isinstance(end, list) else (end,) if end is not None else ()


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    """The model's tokenizer with its chat template. Raises RecipeError where the folder holds none that can be used."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(_without_weights(settings), trust_remote_code=False)
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
    """sha256 over the sha256 of each of the model's weight files, in order of name; where there is an index, those that
    it names.

    The digests of files in an object store are those recorded when they were published, those of the hub its own;
    files of this machine are hashed once. So no weights are downloaded, but for those of a folder in an object store
    that was put there by other means."""
    place = _place(settings)
    index = _without_weights(settings) / _INDEX
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if place is None:
        found = _hub_digests(settings.path, settings.revision, frozenset(named))
    elif isinstance(place, ObjectPath) and (recorded := recorded_digests(place)):
        found = {name: digest for name, digest in recorded.items() if _is_weights(name)}
    else:
        found = {path.name: sha256_of(path) for path in fetched(place).glob(WEIGHTS)}
    names = [name for name in sorted(found) if (name in named if named else "/" not in name)]
    if not names:
        raise _no_weights(place or settings.path)
    digest = hashlib.sha256()
    for name in names:
        digest.update(bytes.fromhex(found[name]))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _hub_digests(repository: str, revision: str | None, named: frozenset[str]) -> dict[str, str]:
    """The sha256 of a repository's weight files: of those on this machine where all that are `named` are here, else as
    the hub knows them."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = [WEIGHTS, *SMALL]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=True)
        here = {path.name: path for path in Path(folder).glob(WEIGHTS)}
        if here and named <= here.keys():
            return {name: sha256_of(path) for name, path in here.items()}
    except OSError:
        pass  # nothing of it is here
    try:
        files = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    except Exception as error:
        raise _not_to_be_had(ModelSettings(path=repository, revision=revision), error) from None
    return {file.rfilename: file.lfs.sha256 for file in files if file.lfs and _is_weights(file.rfilename)}


def tokenizer_hash(settings: ModelSettings) -> str:
    """sha256 over what the tokenizer does, however its files are written: two models may work together only where this
    agrees.

    Raises RecipeError as `load_tokenizer` does."""
    small = (path for path in _without_weights(settings).iterdir() if path.is_file() and path.suffix != ".safetensors")
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
def _tokenizer_hash(settings: ModelSettings, files: _Stamps) -> str:
    meaning = _meaning(load_tokenizer(settings))
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
