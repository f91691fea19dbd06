"""S2T-Local decoding for plain transformers: nothing else is needed.

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=512)

The model decodes greedily. Where its trigger head fires, it proposes its own K most likely tokens (or draws K of them),
runs each of them one step ahead, and goes on with the one whose score is best. A score is the mean bin value under the
softmax over the model's reserved rows, or over the rows of its ranking head. This file comes with the exported model
and reads `s2t.json`, `trigger_head.safetensors` and, where there is one, `ranking_head.safetensors` beside it.

Axes: _K candidate, _R row that scores, _V vocabulary, _H hidden.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.utils import cached_file

#: Candidates that are drawn come from this many of the likeliest tokens.
SUPPORT = 64
CANDIDATES_STREAM = 1
#: Arguments of `generate` that ask for what happens anyway, beside None, False and the empty list.
WITHOUT_EFFECT: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
#: Tokenizers return it, and no causal language model decodes differently for it.
IGNORED = {"token_type_ids"}


@torch.inference_mode()
def generate(
    model: Any,
    inputs: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: Any = None,
    streamer: Any = None,
    max_new_tokens: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    budget: float | None = None,
    threshold: float | None = None,
    prior_weight: float | None = None,
    seed: int = 0,
    **others: Any,
) -> torch.Tensor:
    """The prompts with what follows them, [B, L] ids, padded on the right.

    `budget` is the share of steps that may trigger, one of those in s2t.json (default: the recipe's); `threshold`, on
    the trigger head's logit, takes its place. `prior_weight` is that of the model's own ranking beside the score.
    `seed` is for candidates that are drawn. `streamer` is given the prompt, then token by token, of one prompt alone.
    Raises ValueError for arguments of `generate` that this decoding has not.
    """
    _refuse(others)
    if generation_config is not None:
        _refuse({name: getattr(generation_config, name, None) for name in ("do_sample", "num_beams")})
    ids = input_ids if input_ids is not None else inputs
    if ids is None:
        raise ValueError("give input_ids")
    if streamer is not None and len(ids) > 1:
        raise ValueError("streamer: works with one prompt at a time")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask

    def setting(name: str, given: Any) -> Any:
        """What was given, else what the generation config given says, else what the model's does."""
        configs = (getattr(config, name, None) for config in (generation_config, model.generation_config))
        return next((value for value in (given, *configs) if value is not None), None)

    limit = setting("max_new_tokens", max_new_tokens)
    limit = 256 if limit is None else limit
    if limit < 1:
        raise ValueError(f"max_new_tokens = {limit}: at least 1")
    parts = _load(model)
    if threshold is None:
        threshold = _threshold(parts, budget)
    weight = parts.prior_weight if prior_weight is None else prior_weight
    end = setting("eos_token_id", eos_token_id)
    ends = end if isinstance(end, list) else [end]
    texts = []
    for row_ids, row_mask in zip(ids, mask):  # noqa: B905  # one length each
        prompt = row_ids[row_mask.bool()]
        texts.append(_decode(model, parts, prompt, limit, threshold, weight, seed, ends, streamer))
    pad = setting("pad_token_id", pad_token_id)
    pad = (ends[0] or 0) if pad is None else pad
    longest = max(len(text) for text in texts)
    padded = [text + [pad] * (longest - len(text)) for text in texts]
    return torch.cat([ids, torch.tensor(padded, dtype=ids.dtype, device=ids.device)], dim=1)


def _decode(
    model: Any,
    parts: Any,
    prompt: torch.Tensor,
    limit: int,
    threshold: float,
    weight: float,
    seed: int,
    ends: list[int | None],
    streamer: Any,
) -> list[int]:
    """The ids that follow one prompt."""
    cache = DynamicCache(config=model.config)
    hidden_H, logits_V, _ = _forward(model, parts, prompt[None], cache)
    written: list[int] = []
    if streamer is not None:  # which may skip what it is given first
        streamer.put(prompt.cpu())
    while True:
        token, following = int(logits_V.argmax()), None
        if len(written) >= parts.warmup and float(parts.trigger(hidden_H)) >= threshold:
            logprobs_V = logits_V.log_softmax(-1)
            candidates_K = _candidates(logprobs_V, parts, seed, len(written))
            leaves = torch.tensor(candidates_K, device=model.device)
            cache.batch_repeat_interleave(len(candidates_K))
            hidden_KH, logits_KV, rows_KR = _forward(model, parts, leaves[:, None], cache, every_row=True)
            scores_K = (rows_KR.float().softmax(-1) @ parts.bins_R).cpu().numpy()
            own_K = logprobs_V[leaves].cpu().numpy()
            leaf = int((scores_K / parts.temperature + weight * own_K).argmax())
            cache.batch_select_indices(torch.tensor([leaf], device=model.device))
            token, following = candidates_K[leaf], (hidden_KH[leaf], logits_KV[leaf])
        written.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        if token in ends or len(written) == limit:
            break
        if following is None:
            hidden_H, logits_V, _ = _forward(model, parts, torch.tensor([[token]], device=model.device), cache)
        else:
            hidden_H, logits_V = following
    if streamer is not None:
        streamer.end()
    return written


def _forward(
    model: Any, parts: Any, ids: torch.Tensor, cache: DynamicCache, every_row: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the last token: the hidden state after the last norm, text logits, and the logits that scores are read from;
    of the first row, or of every row."""
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    hidden_BH, logits_BV = output.hidden_states[-1][:, -1], output.logits[:, -1].float()
    if parts.ranking_head_RH is None:
        rows_BR = logits_BV[:, parts.reserved]
        logits_BV = logits_BV.index_fill(1, parts.reserved, -torch.inf)
    else:
        rows_BR = hidden_BH.float() @ parts.ranking_head_RH.T
    return (hidden_BH, logits_BV, rows_BR) if every_row else (hidden_BH[0], logits_BV[0], rows_BR[0])


def _candidates(logprobs_V: torch.Tensor, parts: Any, seed: int, step: int) -> list[int]:
    """Up to K of the model's own likeliest tokens, best first, or drawn without replacement in proportion to their
    probabilities; noise depends on (seed, step) alone."""
    k, ratio, drawn = parts.candidates["k"], parts.candidates["ratio"], parts.candidates["method"] == "multinomial"
    temperature, top_p = parts.candidates["temperature"], parts.candidates["top_p"]
    top = logprobs_V.topk(min(SUPPORT if drawn or ratio or top_p < 1 else k, len(logprobs_V)))
    logprobs_N, ids_N = top.values.cpu().numpy().astype(np.float64), top.indices.tolist()
    weights_N = np.exp((logprobs_N - logprobs_N.max()) / temperature)
    k = min(k, int(np.isfinite(logprobs_N).sum()))
    if top_p < 1:
        cumulative_N = weights_N.cumsum()
        nucleus = int(np.searchsorted(cumulative_N, top_p * cumulative_N[-1])) + 1
        weights_N[nucleus:] = 0.0
        k = min(k, nucleus)
    chosen_K = np.arange(k)
    if drawn:
        key = np.array([seed & 0xFFFFFFFFFFFFFFFF, 0x5325], dtype=np.uint64)
        counter = np.array([0, 0, CANDIDATES_STREAM, step], dtype=np.uint64)
        noise_K = np.random.Generator(np.random.Philox(counter=counter, key=key)).random(parts.candidates["k"])
        chosen_K = np.sort(_draw(weights_N, noise_K[:k]))
    if ratio > 0:
        chosen_K = chosen_K[logprobs_N[chosen_K] >= logprobs_N[0] + np.log(ratio)]
        chosen_K = chosen_K if len(chosen_K) else np.zeros(1, dtype=int)
    return [ids_N[index] for index in chosen_K]


def _draw(weights_N: np.ndarray, noise_K: np.ndarray) -> np.ndarray:
    """Indices drawn without replacement in proportion to the weights, one number in [0, 1) a draw."""
    drawn = np.empty(len(noise_K), dtype=int)
    for draw, u in enumerate(noise_K):
        cumulative_N = weights_N.cumsum()
        drawn[draw] = min(np.searchsorted(cumulative_N, u * cumulative_N[-1], side="right"), len(weights_N) - 1)
        if weights_N[drawn[draw]] == 0.0:
            drawn[draw] = weights_N.argmax()
        weights_N[drawn[draw]] = 0.0
    return drawn


def _load(model: Any) -> Any:
    """What s2t.json and the two heads' files say, on the model's device; read once a model and device."""
    device = model.device
    known = getattr(model, "_s2t_parts", None)
    if known is not None and known.device == device:
        return known

    def beside(name: str) -> str:
        return str(cached_file(model.name_or_path, name, revision=getattr(model.config, "_commit_hash", None)))

    with open(beside("s2t.json"), encoding="utf-8") as file:
        settings = json.load(file)
    head = {name: value.to(device) for name, value in load_file(beside("trigger_head.safetensors")).items()}
    ranking = None if settings["reserved_ids"] else load_file(beside("ranking_head.safetensors"))["weight"]

    def trigger(hidden_H: torch.Tensor) -> torch.Tensor:
        first = torch.nn.functional.linear(hidden_H.float(), head["first.weight"], head["first.bias"]).relu()
        return torch.nn.functional.linear(first, head["second.weight"], head["second.bias"])

    model._s2t_parts = SimpleNamespace(
        device=device,
        trigger=trigger,
        ranking_head_RH=None if ranking is None else ranking.float().to(device),
        reserved=torch.tensor(settings["reserved_ids"], dtype=torch.long, device=device),
        bins_R=torch.tensor(settings["bins"], device=device),
        temperature=settings["temperature"],
        prior_weight=settings["prior_weight"],
        candidates=settings["candidates"],
        warmup=settings["warmup"],
        budget=settings["budget"],
        threshold=settings["threshold"],
        thresholds={float(share): value for share, value in settings["thresholds"].items()},
    )
    return model._s2t_parts


def _threshold(parts: Any, budget: float | None) -> float:
    """The one calibrated for the budget; without one, the recipe's fixed threshold or the one of its budget."""
    if budget is None and parts.threshold is not None:
        return float(parts.threshold)
    budget = parts.budget if budget is None else budget
    if budget not in parts.thresholds:
        known = ", ".join(f"{share:g}" for share in sorted(parts.thresholds))
        raise ValueError(f"budget = {budget}: thresholds are known for {known}; give one of them, or `threshold`")
    return float(parts.thresholds[budget])


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        empty = value is None or value is False or (isinstance(value, (list, tuple)) and not value)
        asks_nothing = name in WITHOUT_EFFECT and isinstance(value, int) and value == WITHOUT_EFFECT[name]
        if not (empty or asks_nothing or name in IGNORED):
            raise ValueError(f"{name}: S2T-Local decoding has no such setting; leave it out")
