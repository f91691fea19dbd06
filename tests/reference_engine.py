"""The engine contract written as plainly as it can be, and a tiny random pair to try it on: the reference of exactness
tests.

Every step is one transformers forward over the whole sequence: no cache, no batch, no packing, float32. It shares with
the package the contract's types, the noise and the candidates, which have tests of their own.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from made_up import provenance
from transformers import Qwen2Config, Qwen2ForCausalLM

from s2t_models.artifact import Card, save
from s2t_models.candidates import propose
from s2t_models.engines.contract import (
    Capability,
    ContextOverflow,
    Decision,
    Draft,
    ModelCard,
    Penalties,
    Routed,
    Sampling,
    Scores,
    Selected,
    Selection,
    Support,
    Tell,
    Triggered,
    Usage,
    Written,
)
from s2t_models.engines.selector import Selector
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.noise import uniforms
from s2t_models.policies.base import Decoded, Engines, Policy, Request, gather
from s2t_models.reserved import bins
from s2t_models.router import Router
from s2t_models.settings import ModelSettings, MultiplexSettings
from s2t_models.trigger import TriggerHead

END = 0
#: What the tiny pair can write: id i + 1 is character i. The ids above are unused, then come the reserved rows.
ALPHABET = "0123456789 .=+-ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\\{}\n<>|_/?:;,()'"
TEXT_ROWS = len(ALPHABET) + 1
RESERVED = tuple(range(96, 112))


def encode(text: str) -> list[int]:
    return [ALPHABET.index(character) + 1 for character in text]


PROMPT = encode("Ada has 12 ")


def decode(ids: list[int]) -> str:
    return "".join(ALPHABET[token - 1] if 0 < token < TEXT_ROWS else "" for token in ids)


def card(name: str, *more: Capability, context: int = 512) -> ModelCard:
    """A card of the tiny pair, with what both engines can do and `more`."""
    plain: tuple[Capability, ...] = ("entropy", "seeded_noise", "multiplex", "features")
    return ModelCard(
        name, "weights", "tokenizer", 112, context, (END,), RESERVED, capabilities=frozenset({*plain, *more})
    )


@dataclass
class TinyPair:
    """Two random Qwen2 models that disagree moderately: the teacher is the SLM with its weights shaken."""

    slm: Qwen2ForCausalLM
    teacher: Qwen2ForCausalLM
    head: TriggerHead


def tiny_pair() -> TinyPair:
    config = Qwen2Config(
        vocab_size=112,
        hidden_size=64,
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
        head = _linear_head(torch.nn.Linear(64, 1))
    return TinyPair(slm, teacher, head)


def _linear_head(linear: torch.nn.Linear) -> TriggerHead:
    """x as relu(x) - relu(-x)."""
    head = TriggerHead(linear.in_features, 2).eval()
    weights = {"first.weight": torch.cat([linear.weight, -linear.weight]), "second.weight": torch.tensor([[1.0, -1.0]])}
    biases = {"first.bias": torch.cat([linear.bias, -linear.bias]), "second.bias": torch.zeros(1)}
    head.load_state_dict(weights | biases)
    return head


class ReferenceEngine:
    """The contract over one model, a forward at a time. `calls` counts the calls by name."""

    def __init__(
        self,
        model: Qwen2ForCausalLM,
        card: ModelCard,
        head: torch.nn.Module | None = None,
        router: Router | None = None,
    ) -> None:
        self.model, self._card, self.head, self.router = model, card, head, router
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
        logits_V[list(self._card.masked_ids)] = -torch.inf
        return logits_V

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def close(self) -> None:
        self._known.clear()

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        self._count("generate")
        if len(prefix) + sampling.max_tokens > self._card.context:
            raise ContextOverflow("the prefix and what is to be generated do not fit")
        return self._told(self._generate(prefix, sampling, None), tell)

    async def generate_selecting(
        self, prefix: list[int], sampling: Sampling, selection: Selection, tell: Tell | None = None
    ) -> Draft:
        self._count("generate_selecting")
        return self._told(self._generate(prefix, sampling, selection), tell)

    def _told(self, draft: Draft, tell: Tell | None) -> Draft:
        if tell is not None and draft.ids:
            tell(Written(draft.ids, draft.support, draft.decisions))
        return draft

    def _generate(self, prefix: list[int], sampling: Sampling, selection: Selection | None) -> Draft:
        if sampling.penalties and (selection is not None or sampling.trigger_threshold is not None):
            raise ValueError("penalties go with plain decoding alone")
        ids: list[int] = []
        rows, decisions, usage, triggered = [], [], Usage(prefill=len(prefix)), None
        before = prefix[len(prefix) - sampling.first_step :]
        while len(ids) < sampling.max_tokens and ids[-1:] != [END] and not self._stopped(before + ids, sampling.stop):
            step = sampling.first_step + len(ids)
            hidden_H, _ = self.after(prefix + ids)
            logprobs_V = self.logprobs(prefix + ids)
            order = logprobs_V.argsort(descending=True, stable=True)
            value = self.head(hidden_H[None])[0].item() if self.head is not None else -np.inf
            stop = sampling.trigger_threshold
            if stop is not None and value >= stop and step >= sampling.trigger_warmup:
                top = order[: sampling.trigger_support]
                triggered = Triggered(value, top.numpy(), logprobs_V[top].numpy())
                break
            raw_V, penalties = self._masked(self.after(prefix + ids)[1]), sampling.penalties
            picked_V = penalise(raw_V, prefix[: len(prefix) - len(before)], before + ids, penalties)
            token = draw(picked_V.log_softmax(-1), sampling, float(uniforms(sampling.seed, step, 1)[0]))
            if selection is not None and value >= selection.threshold and step >= selection.warmup:
                decision = self._select(prefix + ids, logprobs_V, order[:64], step, value, selection, sampling)
                decisions.append(decision)
                usage += Usage(leaves=len(decision.candidates_K))
                token = decision.chosen
            top = order[: sampling.support]
            entropy = float(-sum(p * p.log() for p in logprobs_V.exp() if p > 0))
            rows.append((top.numpy(), logprobs_V[top].numpy(), entropy))
            ids.append(token)
            usage += Usage(decode=1, forwards=1)
        support = None
        if sampling.support:
            columns = list(zip(*rows, strict=True)) or [np.empty((0, sampling.support))] * 2 + [np.empty(0)]
            support = Support(*(np.array(column) for column in columns))
        stopped = "stop" if self._stopped(before + ids, sampling.stop) else "length"
        finish = "trigger" if triggered else "end" if ids[-1] == END else stopped
        return Draft(ids, finish, usage, support, triggered, decisions)

    def _stopped(self, output: list[int], stop: tuple[str, ...]) -> bool:
        return any(text in decode(output) for text in stop)

    def _select(self, state, logprobs_V, top_N, step, value, selection, sampling) -> Decision:
        settings, logprobs_N = selection.candidates, logprobs_V[top_N].numpy()
        noise = uniforms(sampling.seed, step, settings.k, "candidates")
        chosen = propose(logprobs_N, settings.k, settings.method, settings.ratio, noise)
        candidates = [int(token) for token in top_N[torch.from_numpy(chosen)]]
        scores = [self._score(state, candidate) for candidate in candidates]
        total = np.array(scores) / selection.temperature + selection.prior_weight * logprobs_N[chosen]
        best = candidates[int(np.argmax(total))]
        return Decision(step, value, candidates, logprobs_N[chosen].tolist(), scores, total.tolist(), best)

    async def generate_multiplex(
        self, prefix: list[int], sampling: Sampling, multiplex: MultiplexSettings, tell: Tell | None = None
    ) -> Draft:
        self._count("generate_multiplex")
        if sampling.penalties:
            raise ValueError("penalties go with plain decoding alone")
        embed = self.model.get_input_embeddings()
        inputs = [embed(torch.tensor(token)) for token in prefix]
        ids: list[int] = []
        low, certain = 0, False
        while len(ids) < sampling.max_tokens and ids[-1:] != [END]:
            step = sampling.first_step + len(ids)
            with torch.no_grad():
                logits_V = self._masked(self.model(inputs_embeds=torch.stack(inputs)[None]).logits[0, -1])
            p_V = logits_V.double().softmax(-1)
            low = low + 1 if float(-(p_V * p_V.clamp_min(1e-300).log()).sum()) < multiplex.entropy else 0
            certain = certain or low >= multiplex.patience
            if certain:
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
        draft = Draft(ids, "end" if ids[-1] == END else "length", Usage(len(prefix), len(ids), 0, len(ids)))
        return self._told(draft, tell)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        self._count("score")
        assert 1 <= start <= start + len(ids_TN) - 1 <= len(tokens)
        rows = [self.logprobs(tokens[: start + t]) for t in range(len(ids_TN))]
        logprobs_TN = np.stack([row[torch.from_numpy(ids)].numpy() for row, ids in zip(rows, ids_TN, strict=True)])
        argmax_T = np.array([int(row.argmax()) for row in rows])
        best = [row.topk(support) for row in rows]
        top = Support(
            *(torch.stack(column).numpy() for column in ([b.indices for b in best], [b.values for b in best]))
        )
        return Scores(logprobs_TN, argmax_T, Usage(prefill=len(ids_TN), forwards=1), top if support else None)

    async def select(self, prefix: list[int], candidates_K: list[int]) -> Selected:
        self._count("select")
        scores_K = np.array([self._score(prefix, candidate) for candidate in candidates_K])
        return Selected(scores_K, Usage(leaves=len(candidates_K), forwards=1))

    def _score(self, prefix: list[int], candidate: int) -> float:
        z_R = self.after([*prefix, candidate])[1][list(RESERVED)]
        return float(z_R.softmax(-1) @ torch.linspace(0, 1, len(z_R)))

    async def route(self, tokens: list[int], start: int) -> Routed:
        assert self.router is not None
        inputs_TF = await self.features(tokens, start, self.router.settings.support)
        return Routed(self.router.probabilities(inputs_TF), Usage(prefill=len(inputs_TF), forwards=1))

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        self._count("features")
        rows = []
        for at in range(start, len(tokens)):
            hidden_H, logits_V = self.after(tokens[:at])
            embedding_H = self.model.get_input_embeddings().weight[tokens[at]].detach()
            top_N = self._masked(logits_V).sort(descending=True).values[:support]
            rows.append(torch.cat([hidden_H, embedding_H, top_N]).numpy())
        return np.stack(rows).astype(np.float32)


def penalise(logits_V: torch.Tensor, prompt: list[int], output: list[int], penalties: Penalties) -> torch.Tensor:
    """The logits [V] with what each token of the text costs, one token after the other."""
    penalised_V = logits_V.clone()
    for token in set(prompt + output):
        if penalties.repetition != 1.0:
            positive = bool(penalised_V[token] > 0)
            penalised_V[token] *= 1 / penalties.repetition if positive else penalties.repetition
        if token in output:
            penalised_V[token] -= penalties.presence + output.count(token) * penalties.frequency
    return penalised_V


def draw(logprobs_V: torch.Tensor, sampling: Sampling, u: float) -> int:
    """Temperature, then top-k, then top-p, then the token whose stretch of the unit interval holds u, most likely
    first."""
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
    kept = [token for token in kept if p_V[token] >= sampling.min_p * p_V[kept[0]]]
    mass = sum(float(p_V[token]) / total for token in kept)
    below = 0.0
    for token in kept:
        below += float(p_V[token]) / total
        if u * mass < below:
            return token
    return kept[-1]


def reference_engines(pair: TinyPair, *local: Capability) -> Engines:
    """The pair, and the SLM as an artifact, behind reference engines; `local` is what the artifact's lists (both ways
    to select)."""
    slm, teacher = ReferenceEngine(pair.slm, card("slm")), ReferenceEngine(pair.teacher, card("teacher"))
    artifact = ReferenceEngine(pair.slm, card("s2t-local", *(local or ("select", "fused_select"))), pair.head)
    return Engines({"slm": slm, "teacher": teacher, "s2t-local": artifact}, decode, encode)


@contextmanager
def torch_engines(pair: TinyPair, slots: int = 8) -> Iterator[Engines]:
    """The same behind torch engines, on copies: an engine changes its model's attention."""
    running = {
        "slm": TorchEngine(copy.deepcopy(pair.slm), card("slm"), slots, decode=decode),
        "teacher": TorchEngine(copy.deepcopy(pair.teacher), card("teacher"), slots, decode=decode),
        "s2t-local": TorchEngine(
            copy.deepcopy(pair.slm),
            card("s2t-local", "select", "fused_select"),
            slots,
            Selector(pair.head, torch.tensor(RESERVED), bins(len(RESERVED))),
            decode=decode,
        ),
    }
    try:
        yield Engines(running, decode, encode)
    finally:
        for engine in running.values():
            engine.close()


@contextmanager
def vllm_engines(pair: TinyPair, folder: Path) -> Iterator[Engines]:
    """The SLM as an artifact, saved in `folder`, behind a vLLM engine: as the SLM too, whose weights are the same, for
    a start takes most of a minute."""
    from s2t_models.engines.vllm.load import start

    reserved = Card(
        reserved_ids=RESERVED,
        bins=tuple(torch.linspace(0, 1, len(RESERVED)).tolist()),
        temperature=0.1,
        prior_weight=0.5,
        trained_prior_weight=0.5,
        thresholds={},
        provenance=provenance(),
    )
    artifact = save(folder / "artifact", pair.slm, _NoTokenizer(), pair.head, reserved)
    settings = ModelSettings(
        path=str(artifact.folder / "model"), engine="vllm", device="cpu", dtype="float32", slots=16, context=512
    )
    known = replace(card("s2t-local"), capabilities=frozenset({"entropy", "seeded_noise", "select"}))
    engine = start(settings, known, artifact.folder, decode)
    try:
        yield Engines({"slm": engine, "s2t-local": engine}, decode, encode)
    finally:
        engine.close()


class _NoTokenizer:
    """The tiny pair's text is not read by any tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def run(policy: Policy, engines: Engines, request: Request) -> Decoded:
    return asyncio.run(gather(policy.decode(engines, request)))
