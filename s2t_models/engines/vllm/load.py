"""From what a recipe hosts to a running vLLM engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

from s2t_models import loading
from s2t_models.artifact import Artifact
from s2t_models.commands import debugging
from s2t_models.engines.contract import Engine, ModelCard
from s2t_models.engines.load import card_of
from s2t_models.errors import one_line
from s2t_models.hosting import Hosted
from s2t_models.recipe import RecipeError
from s2t_models.settings import ModelSettings
from s2t_models.storage import Location

#: Tokens of a block of the paged cache on a CPU. vLLM's own default there, 128, is what a call reads again of a prefix
#: that another has read: half of that on average, for each candidate that is scored.
CPU_BLOCK = 32

_ENVIRONMENT = {
    # V2 cannot label along a prompt and name the argmax; see `worker`.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # A text that fills the context is read to its end, and one token more is drawn, which is not read.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Engines of one machine share its cores; bound to the first ones, they would share only those.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def load(hosted: Hosted) -> Engine:
    """An engine over a model, or over the merged model of an artifact with its trigger head. Raises RecipeError where
    vLLM is not installed, or cannot load the model or hold its cache."""
    check(hosted)
    artifact = Artifact.load(hosted.artifact) if hosted.artifact else None
    settings = artifact.model(hosted.settings) if artifact else hosted.settings
    config = loading.load_config(settings)
    reserved = artifact.card.reserved_ids if artifact else ()
    context = settings.context or int(config.max_position_embeddings)
    card = card_of(hosted, settings, reserved, int(config.vocab_size), context)
    return start(settings, card, artifact.folder if artifact else None, loading.decoder(hosted.settings))


def start(
    settings: ModelSettings,
    card: ModelCard,
    artifact: Location | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> Engine:
    """Start vLLM's processes for the model of `settings`, known by `card`; it is that of the artifact in the folder
    `artifact`, if one is given. `decode` is the tokenizer's. Raises RecipeError as `load` does."""
    if not card.end_ids:
        raise RecipeError(f"{settings.path}: its configuration names no token that ends a text (eos_token_id)")
    if _on_cpu(settings):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(settings.num_cpus)))
        # Engines share cores here: threads that wait leave theirs to the next one, instead of spinning on it.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    engine_arguments = _engine_arguments()
    from s2t_models.engines.vllm.engine import VllmEngine

    try:
        arguments = engine_arguments(**_arguments(settings, card.context))
        return VllmEngine(arguments, card, str(artifact) if artifact else None, decode)
    except Exception as error:  # of many kinds, from many places; what they say is what a user can act on
        raise RecipeError(
            f"{card.name}: vLLM does not load {settings.path}: {one_line(error)} (S2T_DEBUG=1 shows vLLM's own log)"
        ) from error


def check(hosted: Hosted) -> None:
    """Raise RecipeError where vLLM is not installed, has no such engine argument, or is asked for what it has not
    got."""
    where = "teacher" if hosted.name == "teacher" else "slm"
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            f"{where}.engine: vLLM is not installed here; `pip install -e .[vllm]` on a GPU machine, or set "
            f"{where}.engine=torch"
        )
    if hosted.router:
        raise RecipeError(f"router.path: R2R's router runs on the torch engine alone; set {where}.engine=torch")
    if hosted.second_pass:
        raise RecipeError(f"tah: Think-at-Hard's second passes run on the torch engine alone; set {where}.engine=torch")
    known = {field.name for field in dataclasses.fields(_engine_arguments())}
    if unknown := sorted(hosted.settings.vllm.extra.keys() - known):
        raise RecipeError(f"{where}.vllm.extra: vLLM has no engine argument {', '.join(unknown)}")


def _engine_arguments() -> Any:
    """vLLM's class of engine arguments, imported without its warnings. What is set in the environment goes to its
    processes too."""
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if debugging() else "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "default" if debugging() else "ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm import AsyncEngineArgs
    return AsyncEngineArgs


def _on_cpu(settings: ModelSettings) -> bool:
    return loading.device_of(settings) == "cpu"


def _arguments(settings: ModelSettings, context: int) -> dict[str, Any]:
    """vLLM's engine arguments."""
    vllm = settings.vllm
    requests = vllm.max_num_seqs or settings.slots
    arguments: dict[str, Any] = {
        "model": str(loading.resolve(settings)),
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "max_model_len": context + 1,
        "max_num_seqs": requests,
        "max_logprobs": -1,
        "generation_config": "vllm",
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "quantization": vllm.quantisation,
        "tensor_parallel_size": vllm.tensor_parallel,
        "pipeline_parallel_size": vllm.pipeline_parallel,
        "enable_prefix_caching": True,
        # The sampler reads the tokens of the step before.
        "async_scheduling": False,
        "disable_log_stats": True,
        "worker_extension_cls": "s2t_models.engines.vllm.worker.S2TWorker",
    }
    if vllm.tensor_parallel * vllm.pipeline_parallel > 1 and not _on_cpu(settings):
        arguments["distributed_executor_backend"] = "ray"  # in the placement group of the actor, on any of its nodes
    if _on_cpu(settings):
        arguments |= {
            "block_size": CPU_BLOCK,
            "enforce_eager": True,  # compiling takes minutes, and gains little where the arithmetic is what takes time
            "kv_cache_memory_bytes": _cache_bytes(settings, context, requests),
        }
    else:
        arguments["gpu_memory_utilization"] = vllm.gpu_memory_utilisation
    return arguments | vllm.extra


def _cache_bytes(settings: ModelSettings, context: int, requests: int) -> int:
    """What `requests` whole contexts take."""
    config: Any = loading.load_config(settings)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[settings.dtype]
    blocks = requests * (-(-(context + 1) // CPU_BLOCK) + 1)
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * width * CPU_BLOCK * blocks)
