"""What each call does, written as a generator: it yields `Feed`s and is sent their outcomes.

The engine runs many calls at once and packs what they feed into one forward; a call neither knows nor cares. So each
kind of call reads as the algorithm it is. Axes: _T step, _N support, _K candidate, _R reserved row, _H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from s2t_models.candidates import SUPPORT, candidates_at, reach
from s2t_models.engines.contract import (
    Decision,
    Draft,
    Finish,
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
from s2t_models.engines.penalising import Repeats
from s2t_models.engines.sampling import top
from s2t_models.engines.stopping import StopTexts
from s2t_models.noise import uniforms
from s2t_models.router import Router
from s2t_models.second_pass import mean_embedding
from s2t_models.settings import MultiplexSettings

#: Positions whose full-vocabulary log-probabilities are held at once.
STRETCH = 512
#: Tokens that the decision at a hard token shows.
SHOWN = 8

Embed = Callable[[list[int]], torch.Tensor]


@dataclass
class Step:
    """The next-token distribution after what was fed: the token picked from it, and where asked the trigger head's
    logit, or the decider's probability that the token needs a second pass.

    The support is filled for the whole batch where the feed asked for it; `look` fills it for this row alone. A step
    holds the logits of its whole batch: it is for the step after it, not for keeping."""

    token: int
    logits_BV: torch.Tensor  # of the whole batch, of which this is `row`
    row: int
    trigger: float = 0.0
    hard: float = 0.0
    top_ids_N: np.ndarray | None = None
    top_logprobs_N: np.ndarray | None = None
    entropy: float = 0.0

    @property
    def logits_V(self) -> torch.Tensor:
        return self.logits_BV[self.row]

    def look(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` most probable ids and their log-probabilities, best first, [N] each."""
        if self.top_ids_N is None or self.top_logprobs_N is None or len(self.top_ids_N) < count:
            self.top_ids_N, self.top_logprobs_N = (part.cpu().numpy() for part in top(self.logits_V, count))
        return self.top_ids_N[:count], self.top_logprobs_N[:count]


@dataclass
class Feed:
    """Run `ids` through the model behind the first `start` tokens of the row's slot.

    What comes back: with `read`, what it makes of the last `reads` fed tokens' (hidden_TH, logits_TV); else the `Step`
    after the last token, or after the leaf that `choose` picks from the reserved rows' logits [K, R]. With `second` the
    one token runs a second time (`slots.Query`), and the logits of its first pass, `first_V`, are added."""

    start: int
    ids: list[int]
    sampling: Sampling | None = None
    step: int = 0
    repeats: Repeats | None = None
    support: int = 0
    trigger: bool = False
    choose: Callable[[torch.Tensor], int] | None = None
    read: Callable[[torch.Tensor, torch.Tensor], Any] | None = None
    reads: int = 0
    embedding: torch.Tensor | None = None
    decide: bool = False
    second: list[int] | None = None
    first_V: torch.Tensor | None = None


#: A call as the engine runs it: yields what to feed, is sent what came of it, returns the answer.
Procedure = Generator[Feed, Any, Any]


@dataclass(frozen=True)
class Output:
    """When a draft ends, and who is told of its tokens as they are written."""

    end_ids: tuple[int, ...]
    stops: StopTexts
    tell: Tell | None = None


class _Drafting:
    """A draft under way: what was fed so far and what came of it."""

    def __init__(self, cached: int, prefix: list[int], sampling: Sampling, output: Output, **asked: Any) -> None:
        self.cached, self.prefix, self.sampling, self.output, self.asked = cached, prefix, sampling, output, asked
        self.ids: list[int] = []
        self._before = prefix[len(prefix) - sampling.first_step :]  # the output's tokens in the prefix
        self._repeats = Repeats(sampling.penalties, prefix, sampling.first_step) if sampling.penalties else None
        self.supports: list[tuple[np.ndarray, np.ndarray, float]] = []  # of each step: ids, log-probabilities, entropy
        self.decisions: list[Decision] = []
        self.usage = Usage()

    @property
    def at(self) -> int:
        """How many tokens there are, prompt and output."""
        return len(self.prefix) + len(self.ids)

    @property
    def step(self) -> int:
        """The step about to be decided, counted from the start of the output."""
        return self.sampling.first_step + len(self.ids)

    def read_prefix(self) -> Feed:
        """Feed the part of the prefix that is not cached, its last token at least."""
        start = min(self.cached, len(self.prefix) - 1)
        self.usage.prefill += len(self.prefix) - start
        return self.feed(start, self.prefix[start:])

    def read_last(self) -> Feed:
        """An ordinary decode step: feed the token just added."""
        return self.feed(self.at - 1, self.ids[-1:])

    def feed(self, start: int, ids: list[int], ahead: int = 0, **more: Any) -> Feed:
        self.usage.forwards += 1
        asked: dict[str, Any] = {"sampling": self.sampling, "step": self.step + ahead, "support": self.sampling.support}
        return Feed(start, ids, repeats=self._repeats, **(asked | self.asked | more))

    def add(self, token: int, step: Step, decision: Decision | None = None) -> Finish | None:
        self.ids.append(token)
        self.usage.decode += 1
        if self._repeats is not None:
            self._repeats.add(token)
        if self.sampling.support:
            self.supports.append((*step.look(self.sampling.support), step.entropy))
        if decision is not None:
            self.decisions.append(decision)
        if self.output.tell is not None:
            self.output.tell(Written([token], self._support(last=1), [decision] if decision else []))
        if token in self.output.end_ids:
            return "end"
        if self.output.stops and self.output.stops.reached(self._before + self.ids):
            return "stop"
        return "length" if len(self.ids) >= self.sampling.max_tokens else None

    def fires(self, step: Step, threshold: float, warmup: int) -> bool:
        """Whether the trigger head stops before the step about to be decided."""
        return step.trigger >= threshold and self.step >= warmup

    def draft(self, finish: Finish, triggered: Triggered | None = None) -> Draft:
        return Draft(self.ids, finish, self.usage, self._support(), triggered, self.decisions)

    def _support(self, last: int = 0) -> Support | None:
        """The support of all steps, or of the last ones."""
        if not self.sampling.support:
            return None
        if not self.supports:  # stopped before its first step
            empty = np.empty((0, self.sampling.support))
            return Support(empty.astype(np.int64), empty.astype(np.float32), np.empty(0, np.float32))
        ids, logprobs, entropies = zip(*self.supports[-last:], strict=True)
        return Support(np.stack(ids), np.stack(logprobs), np.array(entropies, dtype=np.float32))


def generate(cached: int, prefix: list[int], sampling: Sampling, output: Output) -> Procedure:
    """Plain decoding, up to a trigger where the sampling asks for one; returns a Draft."""
    threshold = sampling.trigger_threshold
    drafting = _Drafting(cached, prefix, sampling, output, trigger=threshold is not None)
    step = yield drafting.read_prefix()
    while True:
        if threshold is not None and drafting.fires(step, threshold, sampling.trigger_warmup):
            return drafting.draft("trigger", Triggered(step.trigger, *step.look(sampling.trigger_support)))
        if finish := drafting.add(step.token, step):
            return drafting.draft(finish)
        step = yield drafting.read_last()


def generate_selecting(
    cached: int,
    prefix: list[int],
    sampling: Sampling,
    output: Output,
    selection: Selection,
    bins_R: torch.Tensor,
) -> Procedure:
    """The S2T-Local loop: trigger, propose, score (with the reserved rows' values `bins_R`), commit. Returns a Draft.

    The scoring pass is the next decode step: the chosen leaf gives the distribution of the step that follows."""
    drafting = _Drafting(cached, prefix, sampling, output, trigger=True)
    step = yield drafting.read_prefix()
    while True:
        following: Step | None = None
        decision: Decision | None = None
        token = step.token
        if drafting.fires(step, selection.threshold, selection.warmup):
            decision, following = yield from _select(drafting, step, selection, bins_R)
            token = decision.chosen
        if finish := drafting.add(token, step, decision):
            return drafting.draft(finish)
        step = following or (yield drafting.read_last())


def _select(
    drafting: _Drafting, step: Step, selection: Selection, bins_R: torch.Tensor
) -> Generator[Feed, Any, tuple[Decision, Step]]:
    ids_N, logprobs_N = step.look(reach(selection.candidates))
    candidates_K, logprobs_K = candidates_at(
        ids_N, logprobs_N, selection.candidates, drafting.sampling.seed, drafting.step
    )
    decision = Decision(drafting.step, step.trigger, candidates_K, logprobs_K.tolist(), [], [], -1)

    def choose(reserved_KR: torch.Tensor) -> int:
        scores_K = _scores(reserved_KR, bins_R)
        preferences_K = selection.preferences(scores_K, logprobs_K)
        leaf = int(preferences_K.argmax())
        decision.scores_K, decision.preferences_K = scores_K.tolist(), preferences_K.tolist()
        decision.chosen = candidates_K[leaf]
        return leaf

    drafting.usage.leaves += len(candidates_K)
    following = yield drafting.feed(drafting.at, candidates_K, ahead=1, choose=choose)
    return decision, following


def _scores(reserved_KR: torch.Tensor, bins_R: torch.Tensor) -> np.ndarray:
    """v . softmax(z[R]) of each candidate, [K] (Eq. 5)."""
    return (reserved_KR.float().softmax(-1).cpu() @ bins_R).numpy()


def generate_multiplex(
    cached: int,
    prefix: list[int],
    sampling: Sampling,
    output: Output,
    multiplex: MultiplexSettings,
    embed: Embed,
) -> Procedure:
    """Multiplex Thinking: draw `width` tokens with replacement, record the first, feed the mean of their embeddings,
    weighted by probability or not; ordinary sampling once the entropy stayed low for `patience` steps."""
    drafting = _Drafting(cached, prefix, sampling, output, support=sampling.support or SUPPORT)
    step = yield drafting.read_prefix()
    certain = 0
    while True:
        certain = certain + 1 if step.entropy < multiplex.entropy else 0
        if certain >= multiplex.patience:
            break
        logprobs_V = (step.logits_V.double() / multiplex.temperature).log_softmax(-1)
        noise_K = uniforms(sampling.seed, drafting.step, multiplex.width, "multiplex")
        cumulative_V = logprobs_V.exp().cumsum(-1).cpu().numpy()
        drawn_K = np.searchsorted(cumulative_V, noise_K * cumulative_V[-1], side="right")
        weights_K = logprobs_V[drawn_K].exp() if multiplex.weighted else torch.ones(len(drawn_K))
        mean_H = (weights_K / weights_K.sum()).to(step.logits_V) @ embed(drawn_K.tolist()).to(step.logits_V)
        if finish := drafting.add(int(drawn_K[0]), step):
            return drafting.draft(finish)
        step = yield drafting.feed(drafting.at - 1, drafting.ids[-1:], embedding=mean_H)
    while not (finish := drafting.add(step.token, step)):
        step = yield drafting.read_last()
    return drafting.draft(finish)


def generate_thinking(
    cached: int,
    prefix: list[int],
    sampling: Sampling,
    output: Output,
    threshold: float,
    support: int,
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> Procedure:
    """Think-at-Hard: where the decider finds a token hard, it runs once more on the mean embedding of its `support`
    likeliest next tokens, with the LoRA, and the logits of both passes add. Returns a Draft, with a decision for each
    hard token: the first pass's likeliest next tokens, scored by their probabilities after both.

    The prompt takes one pass; its last token, which decides the first step, may take two."""
    drafting = _Drafting(cached, prefix, sampling, output, decide=True)
    step = yield drafting.read_prefix()
    second: list[int] = []
    while True:
        decision = None
        if step.hard > threshold:
            first, at = step, drafting.at - 1
            second.append(at)
            mean_H = mean_embedding(first.logits_V[None], support, embed)[0]
            token = (prefix + drafting.ids)[-1:]
            step = yield drafting.feed(
                at, token, embedding=mean_H, second=list(second), first_V=first.logits_V, decide=False
            )
            decision = _both_passes(first, step, drafting.step)
        if finish := drafting.add(step.token, step, decision):
            return drafting.draft(finish)
        step = yield drafting.read_last()


def _both_passes(first: Step, both: Step, step: int) -> Decision:
    """What a second pass made of the first one's likeliest next tokens."""
    ids_K, logprobs_K = first.look(SHOWN)
    preferences_K = both.logits_V.float().log_softmax(-1)[ids_K.tolist()].cpu().numpy()
    scores_K = np.exp(preferences_K)
    return Decision(
        step, first.hard, ids_K.tolist(), logprobs_K.tolist(), scores_K.tolist(), preferences_K.tolist(), both.token
    )


def score(cached: int, tokens: list[int], start: int, ids_TN: np.ndarray, support: int) -> Procedure:
    """Log-probabilities of given ids along given tokens, and the most probable ones there; returns Scores."""
    count = len(ids_TN)
    first = min(cached, start - 1)
    fed = tokens[first : start + count - 1]
    ids = torch.as_tensor(ids_TN.astype(np.int64))

    def read(_: torch.Tensor, logits_TV: torch.Tensor) -> tuple[np.ndarray, np.ndarray, Support | None]:
        wanted, best_ids, best = [], [], []
        for logits, rows in zip(logits_TV.split(STRETCH), ids.split(STRETCH), strict=True):
            logprobs = logits.float().log_softmax(-1)
            wanted.append(logprobs.gather(-1, rows.to(logits.device)).cpu())
            if support:
                top_N, ids_N = logprobs.topk(min(support, logits.shape[-1]), dim=-1)
                best_ids.append(ids_N.cpu())
                best.append(top_N.cpu())
        top = Support(torch.cat(best_ids).numpy(), torch.cat(best).numpy()) if support else None
        return torch.cat(wanted).numpy(), logits_TV.argmax(-1).cpu().numpy(), top

    logprobs_TN, argmax_T, top = yield Feed(first, fed, read=read, reads=count)
    return Scores(logprobs_TN, argmax_T, Usage(prefill=len(fed), forwards=1), top)


def select(cached: int, prefix: list[int], candidates_K: list[int], bins_R: torch.Tensor) -> Procedure:
    """The scores after each candidate; returns Selected."""
    usage = Usage(leaves=len(candidates_K), forwards=1)
    if cached < len(prefix):
        usage += Usage(prefill=len(prefix) - cached, forwards=1)
        yield Feed(cached, prefix[cached:], read=lambda hidden_TH, logits_TV: None)
    seen: list[np.ndarray] = []

    def choose(reserved_KR: torch.Tensor) -> int:
        seen.append(_scores(reserved_KR, bins_R))
        return 0

    yield Feed(len(prefix), candidates_K, choose=choose)
    return Selected(seen[0], usage)


def features(cached: int, tokens: list[int], start: int, count: int, embed: Embed) -> Procedure:
    """R2R's router inputs for the steps that wrote tokens[start:]: [T, H + H + count] float32."""
    return (yield _features(cached, tokens, start, count, embed, lambda inputs_TF: inputs_TF.cpu().numpy()))


def route(cached: int, tokens: list[int], start: int, router: Router, embed: Embed) -> Procedure:
    """The router's probability that each of tokens[start:] makes the text diverge; returns Routed."""
    feed = _features(cached, tokens, start, router.settings.support, embed, router.probabilities)
    return Routed((yield feed), Usage(prefill=len(feed.ids), forwards=1))


def _features(
    cached: int, tokens: list[int], start: int, count: int, embed: Embed, use: Callable[[torch.Tensor], np.ndarray]
) -> Feed:
    """Read the tokens and hand the router's inputs [T, F], on the model's device, to `use`."""
    first = min(cached, start - 1)

    def read(hidden_TH: torch.Tensor, logits_TV: torch.Tensor) -> np.ndarray:
        top_TN = logits_TV.topk(count, dim=-1).values
        return use(torch.cat([part.float() for part in (hidden_TH, embed(tokens[start:]), top_TN)], dim=-1))

    return Feed(first, tokens[first:-1], read=read, reads=len(tokens) - start)
