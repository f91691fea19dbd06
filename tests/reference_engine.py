"""The engine contract written as plainly as it can be, and a tiny random pair to try it on: the reference of exactness tests.

Every step is one transformers forward over the whole sequence: no cache, no batch, no packing, float32. It shares with the
package the contract's types, the noise and the candidates, which have tests of their own.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from s2t_models.candidates import propose
from s2t_models.engines.contract import (
    Decision,
    Draft,
    ModelCard,
    Multiplex,
    Sampling,
    Scores,
    Selection,
    Usage,
)
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.noise import uniforms
from s2t_models.policies.base import Decoded, Engines, Policy, Request, gather

END = 0
#: What the tiny pair can write: id i + 1 is character i. The ids above are unused, then come the reserved rows.
ALPHABET = "0123456789 .=+-ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\\{}\n<>|_/?:;,()'"
TEXT_ROWS = len(ALPHABET) + 1
RESERVED = tuple(range(96, 112))


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) + 1 for character in text]


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[token - 1] if 0 < token < TEXT_ROWS else "" for token in ids)


def card(name: str, has_selector: bool = False, context: int = 512) -> ModelCard:
    return ModelCard(name, "weights", "tokenizer", 112, context, (END,), RESERVED, has_selector)


@dataclass
class TinyPair:
    """Two random Qwen2 models that disagree moderately: the teacher is the SLM with its weights shaken."""

    slm: Qwen2ForCausalLM
    teacher: Qwen2ForCausalLM
    head: torch.nn.Module


def tiny_pair() -> TinyPair:
    config = Qwen2Config(
        vocab_size=112,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.25,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(10)
        slm = Qwen2ForCausalLM(config).float().eval()
        # Peaked like a trained model, and unused rows are hardly ever written.
        with torch.no_grad():
            slm.lm_head.weight *= 3
            slm.lm_head.weight[TEXT_ROWS : RESERVED[0]] = 0.0
        teacher = copy.deepcopy(slm)
        with torch.no_grad():
            for weight in teacher.parameters():
                weight.add_(torch.randn_like(weight) * weight.std().nan_to_num() * 0.12)
        head = torch.nn.Sequential(torch.nn.Linear(32, 1), torch.nn.Flatten(0)).eval()
    return TinyPair(slm, teacher, head)


class ReferenceEngine:
    """The contract over one model, a forward at a time. `calls` counts the calls by name."""

    def __init__(self, model: Qwen2ForCausalLM, card: ModelCard, head: torch.nn.Module | None = None) -> None:
        self.model, self._card, self.head = model, card, head
        self.calls: dict[str, int] = {}
        self._known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    async def card(self) -> ModelCard:
        return self._card

    @torch.no_grad()
    def after(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden state [H] and raw logits [V] after `tokens`."""
        key = tuple(tokens)
        if key not in self._known:
            out = self.model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
            self._known[key] = out.hidden_states[-1][0, -1], out.logits[0, -1]
        return self._known[key]

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        return self._masked(self.after(tokens)[1]).log_softmax(-1)

    def _masked(self, logits_V: torch.Tensor) -> torch.Tensor:
        logits_V = logits_V.clone()
        logits_V[list(self._card.reserved_ids)] = -torch.inf
        return logits_V

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    async def generate(self, prefix: list[int], sampling: Sampling) -> Draft:
        self._count("generate")
        return self._generate(prefix, sampling, None)

    async def generate_selecting(self, prefix: list[int], sampling: Sampling, selection: Selection) -> Draft:
        self._count("generate_selecting")
        return self._generate(prefix, sampling, selection)

    def _generate(self, prefix: list[int], sampling: Sampling, selection: Selection | None) -> Draft:
        ids: list[int] = []
        rows, decisions, usage = [], [], Usage(prefill=len(prefix))
        while len(ids) < sampling.max_tokens and ids[-1:] != [END]:
            step = sampling.first_step + len(ids)
            hidden_H, _ = self.after(prefix + ids)
            logprobs_V = self.logprobs(prefix + ids)
            order = logprobs_V.argsort(descending=True, stable=True)
            top = order[: sampling.support or 1]
            entropy = float(-sum(p * p.log() for p in logprobs_V.exp() if p > 0))
            rows.append((top.numpy(), logprobs_V[top].numpy(), entropy))
            token = draw(logprobs_V, sampling, float(uniforms(sampling.seed, step, 1)[0]))
            if selection is not None and self.head is not None:
                value = self.head(hidden_H[None])[0].item()
                if value >= selection.threshold and step >= selection.warmup:
                    decision = self._select(prefix + ids, logprobs_V, order[:64], step, value, selection, sampling)
                    decisions.append(decision)
                    token = decision.chosen
            ids.append(token)
            usage += Usage(decode=1, forwards=1)
        return Draft(
            ids,
            "end" if ids[-1] == END else "length",
            usage,
            np.array([row[2] for row in rows]),
            np.stack([row[0] for row in rows]),
            np.stack([row[1] for row in rows]),
            decisions,
        )

    def _select(self, state, logprobs_V, top_N, step, value, selection, sampling) -> Decision:
        logprobs_N = logprobs_V[top_N].numpy()
        noise = uniforms(sampling.seed, step, selection.k, "candidates")
        chosen = propose(logprobs_N, selection.k, selection.method, selection.ratio, noise)
        candidates = [int(token) for token in top_N[torch.from_numpy(chosen)]]
        scores = []
        for candidate in candidates:
            z_R = self.after([*state, candidate])[1][list(self._card.reserved_ids)]
            scores.append(float(z_R.softmax(-1) @ torch.linspace(0, 1, len(z_R))))
        total = np.array(scores) / selection.temperature + selection.prior_weight * logprobs_N[chosen]
        best = candidates[int(np.argmax(total))]
        return Decision(step, value, candidates, logprobs_N[chosen].tolist(), scores, best)

    async def generate_multiplex(self, prefix: list[int], sampling: Sampling, multiplex: Multiplex) -> Draft:
        self._count("generate_multiplex")
        embed = self.model.get_input_embeddings()
        inputs = [embed(torch.tensor(token)) for token in prefix]
        ids: list[int] = []
        low = 0
        while len(ids) < sampling.max_tokens and ids[-1:] != [END]:
            step = sampling.first_step + len(ids)
            with torch.no_grad():
                logits_V = self._masked(self.model(inputs_embeds=torch.stack(inputs)[None]).logits[0, -1])
            p_V = logits_V.double().softmax(-1)
            low = low + 1 if float(-(p_V * p_V.clamp_min(1e-300).log()).sum()) < multiplex.entropy else 0
            if low >= multiplex.patience or multiplex.patience < 0:
                multiplex = Multiplex(patience=-1)
                token = draw(logits_V.log_softmax(-1), sampling, float(uniforms(sampling.seed, step, 1)[0]))
                ids.append(token)
                inputs.append(embed(torch.tensor(token)))
                continue
            p_V = (logits_V.double() / multiplex.temperature).softmax(-1)
            noise = uniforms(sampling.seed, step, multiplex.width, "multiplex")
            drawn = [int((p_V.cumsum(-1) <= u * p_V.sum()).sum()) for u in noise]
            weights = p_V[drawn] if multiplex.weighted else torch.ones(len(drawn)).double()
            mean = ((weights / weights.sum())[:, None] * embed(torch.tensor(drawn))).sum(0)
            ids.append(drawn[0])
            inputs.append(mean.float())
        return Draft(ids, "end" if ids[-1] == END else "length", Usage(len(prefix), len(ids), 0, len(ids)), np.empty(0))

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray) -> Scores:
        self._count("score")
        assert 1 <= start <= start + len(ids_TN) - 1 <= len(tokens)
        rows = [self.logprobs(tokens[: start + t]) for t in range(len(ids_TN))]
        logprobs_TN = np.stack([row[torch.from_numpy(ids)].numpy() for row, ids in zip(rows, ids_TN, strict=True)])
        argmax_T = np.array([int(row.argmax()) for row in rows])
        return Scores(logprobs_TN, argmax_T, Usage(prefill=len(ids_TN), forwards=1))

    async def select(self, prefix: list[int], candidates_K: list[int]) -> np.ndarray:
        self._count("select")
        rows = list(self._card.reserved_ids)
        return np.stack([self.after([*prefix, candidate])[1][rows].numpy() for candidate in candidates_K])

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        self._count("features")
        rows = []
        for at in range(start, len(tokens)):
            hidden_H, logits_V = self.after(tokens[:at])
            embedding_H = self.model.get_input_embeddings().weight[tokens[at]].detach()
            top_N = self._masked(logits_V).sort(descending=True).values[:support]
            rows.append(torch.cat([hidden_H, embedding_H, top_N]).numpy())
        return np.stack(rows).astype(np.float32)


def draw(logprobs_V: torch.Tensor, sampling: Sampling, u: float) -> int:
    """Temperature, then top-k, then top-p, then the token whose stretch of the unit interval holds u, most likely first."""
    if sampling.temperature == 0:
        return int(logprobs_V.argmax())
    p_V = (logprobs_V.double() / sampling.temperature).softmax(-1)
    order = p_V.argsort(descending=True, stable=True).tolist()
    kept, mass = [], 0.0
    total = sum(float(p_V[token]) for token in order[: sampling.top_k or None])
    for token in order[: sampling.top_k or None]:
        if kept and mass >= sampling.top_p:
            break
        kept.append(token)
        mass += float(p_V[token]) / total
    below = 0.0
    for token in kept:
        below += float(p_V[token]) / total
        if u * mass < below:
            return token
    return kept[-1]


def reference_engines(pair: TinyPair) -> Engines:
    """The pair, and the SLM as an artifact, behind reference engines."""
    slm, teacher = ReferenceEngine(pair.slm, card("slm")), ReferenceEngine(pair.teacher, card("teacher"))
    local = ReferenceEngine(pair.slm, card("s2t-local", has_selector=True), pair.head)
    return Engines({"slm": slm, "teacher": teacher, "s2t-local": local}, decode, encode)


@contextmanager
def torch_engines(pair: TinyPair, slots: int = 8) -> Iterator[Engines]:
    """The same behind torch engines, on copies: an engine changes its model's attention."""
    running = {
        "slm": TorchEngine(copy.deepcopy(pair.slm), card("slm"), slots),
        "teacher": TorchEngine(copy.deepcopy(pair.teacher), card("teacher"), slots),
        "s2t-local": TorchEngine(copy.deepcopy(pair.slm), card("s2t-local", has_selector=True), slots, pair.head),
    }
    try:
        yield Engines(running, decode, encode)
    finally:
        for engine in running.values():
            engine.close()


def run(policy: Policy, engines: Engines, request: Request) -> Decoded:
    return asyncio.run(gather(policy.decode(engines, request)))
