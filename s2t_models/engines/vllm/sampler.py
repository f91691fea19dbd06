"""The sampler of S2T inside a vLLM worker: masks, the trigger head, noise by (seed, step), supports and scores.

It takes the place of vLLM's own for every request, so requests of all kinds share a batch. vLLM's would not let them:
there a request that asks for given ids costs the others in its batch their top log-probabilities.

Axes: _B request of the batch, _T position, _R reserved row, _V vocabulary, _N support, _W column, _H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from s2t_models.engines.contract import Penalties
from s2t_models.engines.penalising import Repeats, penalised
from s2t_models.engines.sampling import pick, support, top
from s2t_models.engines.selector import Selector
from s2t_models.engines.vllm.requests import Decoding, Leaf, told_apart
from s2t_models.noise import uniforms


@dataclass(frozen=True)
class Row:
    """A request of the batch: what it asked for, its prompt, and what was written behind that."""

    asked: Any
    prompt: list[int]
    written: list[int]

    @property
    def step(self) -> int:
        """The step it is at, counted from its `first_step`."""
        return len(self.written) + (self.asked.first_step if isinstance(self.asked, Decoding) else 0)

    @property
    def repeats(self) -> Repeats | None:
        """What its penalties bear on; None where it has none."""
        if not isinstance(self.asked, Decoding) or not self.asked.penalties:
            return None
        return Repeats(Penalties(*self.asked.penalties), self.prompt + self.written, self.step)


class S2TSampler(Sampler):
    """`rows` says what the requests of the batch at hand asked for, `hidden` are their last hidden states [B, H].
    `end_id` is a token that ends a text: a request whose trigger head fires is given it too, so that vLLM stops, and
    the answer's second id says which of the two it was."""

    def __init__(
        self,
        rows: Callable[[], list[Row]],
        hidden: Callable[[], torch.Tensor],
        masked_ids: list[int],
        end_id: int,
        selector: Selector | None,
    ) -> None:
        super().__init__()
        self._rows, self._hidden = rows, hidden
        self._masked_ids, self._end_id, self._selector = masked_ids, end_id, selector

    def mask(self, logits_TV: torch.Tensor) -> torch.Tensor:
        """Text logits, float32: what is masked is never generated and has no probability."""
        text_TV = logits_TV.to(torch.float32, copy=True)
        if self._masked_ids:
            text_TV[:, self._masked_ids] = -torch.inf
        return text_TV

    def forward(self, logits: torch.Tensor, *_: Any, **__: Any) -> SamplerOutput:
        rows = self._rows()[: len(logits)]
        text_BV = self.mask(logits)
        tokens = self._pick(text_BV, rows)
        table = _Table(len(logits), max((row.asked.columns for row in rows if row.asked), default=0))
        if self._selector is not None:
            self._score(self._selector, logits, rows, table)
        fired = self._fire(self._selector, rows, table) if self._selector is not None else set()
        tokens = [self._end_id if i in fired else token for i, token in enumerate(tokens)]
        self._support(text_BV, fired, rows, table)
        return SamplerOutput(
            sampled_token_ids=torch.tensor(tokens, dtype=torch.int32, device=logits.device)[:, None],
            logprobs_tensors=table.tensors(tokens, logits.shape[1]),
        )

    def _pick(self, text_BV: torch.Tensor, rows: list[Row]) -> list[int]:
        samplings = [row.asked if isinstance(row.asked, Decoding) else _GREEDY for row in rows]
        noise = [
            float(uniforms(sampling.seed, row.step, 1)[0]) if sampling.temperature else 0.0
            for sampling, row in zip(samplings, rows, strict=True)
        ]
        return pick(
            penalised(text_BV, {i: repeats for i, row in enumerate(rows) if (repeats := row.repeats) is not None}),
            [sampling.temperature for sampling in samplings],
            [sampling.top_p for sampling in samplings],
            [sampling.top_k for sampling in samplings],
            [sampling.min_p for sampling in samplings],
            noise,
        )

    def _fire(self, selector: Selector, rows: list[Row], table: _Table) -> set[int]:
        """The requests that stop here, before this step."""
        asking = [
            i for i, row in enumerate(rows) if isinstance(row.asked, Decoding) and row.asked.threshold is not None
        ]
        if not asking:
            return set()
        values = selector.head(self._hidden()[asking]).tolist()
        for i, value in zip(asking, values, strict=True):
            table.put(i, 0, [0], [value])
        return {
            i
            for i, value in zip(asking, values, strict=True)
            if value >= rows[i].asked.threshold and rows[i].step >= rows[i].asked.warmup
        }

    def _score(self, selector: Selector, logits_BV: torch.Tensor, rows: list[Row], table: _Table) -> None:
        leaves = [i for i, row in enumerate(rows) if isinstance(row.asked, Leaf)]
        if leaves:
            scores_B = _scores(selector, self._hidden()[leaves], logits_BV[leaves])
            for i, score in zip(leaves, scores_B.tolist(), strict=True):
                table.put(i, 0, [0], [score])

    def _support(self, text_BV: torch.Tensor, fired: set[int], rows: list[Row], table: _Table) -> None:
        """The most probable tokens of the steps that ask for them: of all, or of those that triggered."""
        wanted = {
            i: row.asked.trigger_support if i in fired else row.asked.support
            for i, row in enumerate(rows)
            if isinstance(row.asked, Decoding)
        }
        looked = [i for i, count in wanted.items() if count]
        if not looked:
            return
        if any(rows[i].asked.support for i in looked):
            ids_BN, logprobs_BN, entropy_B = support(text_BV[looked], max(wanted.values()))
            entropies = entropy_B.tolist()
        else:
            ids_BN, logprobs_BN = top(text_BV[looked], max(wanted.values()))
            entropies = [0.0] * len(looked)
        for i, ids_N, logprobs_N, entropy in zip(looked, ids_BN.tolist(), logprobs_BN.tolist(), entropies, strict=True):
            ids = [int(i in fired), *ids_N[: wanted[i]]]
            table.put(i, 1, ids, [entropy, *logprobs_N[: wanted[i]]])


def _scores(selector: Selector, hidden_BH: torch.Tensor, raw_BV: torch.Tensor) -> torch.Tensor:
    """v . softmax(z[R]), [B] (Eq. 5)."""
    if selector.ranking_head_RH is not None:
        logits_BR = torch.nn.functional.linear(hidden_BH.float(), selector.ranking_head_RH)
    else:
        logits_BR = raw_BV[:, selector.reserved_R].float()
    return logits_BR.softmax(-1) @ selector.bins_R


class _Table:
    """The answer of a step, [B, W]: see `requests`."""

    def __init__(self, requests: int, columns: int) -> None:
        self._ids_BW = torch.zeros(requests, columns, dtype=torch.int32)
        self._values_BW = torch.zeros(requests, columns)

    def put(self, row: int, column: int, ids: list[int], values: list[float]) -> None:
        end = column + len(values)
        self._ids_BW[row, column:end] = torch.tensor(ids, dtype=torch.int32)
        self._values_BW[row, column:end] = torch.tensor(values)

    def tensors(self, tokens: list[int], vocabulary: int) -> LogprobsTensors | None:
        if not self._values_BW.shape[1]:
            return None
        self._ids_BW[:, 0] = torch.tensor(tokens, dtype=torch.int32)
        ids_BW = torch.from_numpy(told_apart(self._ids_BW.numpy(), vocabulary)).int()
        return LogprobsTensors(ids_BW, self._values_BW, torch.zeros(len(tokens), dtype=torch.int32))


_GREEDY = Decoding(0, 0, 0.0, 1.0, 0, 0.0, (), 0, None, 0, 0)
