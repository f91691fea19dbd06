"""S2T's part of a vLLM worker process: vLLM mixes `S2TWorker` into its own worker class (`worker_extension_cls`).

`s2t_prepare` puts the sampler and the labelling in the place of vLLM's, once, before the first call; nothing of the
model's own code is touched, so every architecture that vLLM runs works as it is, with tensor parallelism too. It is
written for vLLM's model runner V1, on GPU and CPU alike: V2 needs Triton, and has no way yet to label along a prompt
and name the argmax.

Axes: _T position, _N id, _V vocabulary, _H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors

from s2t_models.artifact import Artifact
from s2t_models.engines.selector import Selector
from s2t_models.engines.vllm.requests import Labelling, unpack
from s2t_models.engines.vllm.sampler import Row, S2TSampler

#: Positions whose full-vocabulary log-probabilities are held at once.
STRETCH = 512


class S2TWorker:
    """Methods that the engine calls in every worker, by name. `model_runner` is vLLM's."""

    def s2t_prepare(self, masked_ids: list[int], end_id: int, artifact: str | None) -> None:
        """Serve S2T's requests from now on. `artifact` is the folder of the artifact whose model this is."""
        runner = self.model_runner  # type: ignore[attr-defined]
        selector = Selector.of(Artifact.load(artifact), runner.device) if artifact else None
        _Prepared(runner, masked_ids, end_id, selector)


class _Prepared:
    """A model runner whose sampler and prompt log-probabilities are ours. It lives as long as the runner."""

    def __init__(self, runner: Any, masked_ids: list[int], end_id: int, selector: Selector | None) -> None:
        self._runner = runner
        self._compute_logits = runner.model.compute_logits
        self._hidden_BH = torch.empty(0)
        self._labels: dict[str, _Labels] = {}
        self._sampler = S2TSampler(self._rows, lambda: self._hidden_BH, masked_ids, end_id, selector)
        runner.sampler = self._sampler
        runner.model.compute_logits = self._note_hidden
        runner._get_prompt_logprobs_dict = self._label

    def _note_hidden(self, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor | None:
        """The model's own `compute_logits`; the sampler, which runs next, needs what it was given."""
        self._hidden_BH = hidden_states
        logits: torch.Tensor | None = self._compute_logits(hidden_states, *arguments, **named)
        return logits

    def _rows(self) -> list[Row]:
        rows = []
        for request_id in self._runner.input_batch.req_ids:
            request = self._runner.requests[request_id]
            asked = unpack(request.sampling_params.extra_args)
            rows.append(Row(asked, request.prompt_token_ids, request.output_token_ids))
        return rows

    def _label(self, hidden_TH: torch.Tensor, scheduled: dict[str, int]) -> dict[str, LogprobsTensors | None]:
        """In the place of vLLM's prompt log-probabilities: those of the ids that each labelling asks for, from the
        positions of its prompt that were run in this step; whole once the prompt is."""
        answers: dict[str, LogprobsTensors | None] = {}
        for request_id in list(self._runner.num_prompt_logprobs):
            count = scheduled.get(request_id)
            if count is None:  # preempted
                continue
            request = self._runner.requests[request_id]
            asked = unpack(request.sampling_params.extra_args)
            if not isinstance(asked, Labelling):  # vLLM's own warm-up
                continue
            labels = self._labels.setdefault(request_id, _Labels(asked))
            first = request.num_computed_tokens
            offset = int(self._runner.query_start_loc.np[self._runner.input_batch.req_id_to_index[request_id]])
            labels.add(first, hidden_TH[offset : offset + count], self._text_logits)
            if first + count >= len(request.prompt_token_ids):
                answers[request_id] = labels.tensors()
                del self._runner.num_prompt_logprobs[request_id]
                del self._labels[request_id]
        gone = self._labels.keys() - self._runner.requests.keys()  # cancelled half-way
        for request_id in gone:
            del self._labels[request_id]
        return answers

    def _text_logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return self._sampler.mask(self._compute_logits(hidden_TH))


class _Labels:
    """A labelling under way. Rows of positions that vLLM did not run, because it found them in its prefix cache, stay
    NaN; the engine asks again without the cache."""

    def __init__(self, asked: Labelling) -> None:
        self._first = asked.start - 1  # the position whose hidden state predicts the token at `start`
        self._ids_TN = torch.from_numpy(asked.ids_TN.astype("int64"))
        rows, ids = self._ids_TN.shape
        self._argmax_T = torch.zeros(rows, dtype=torch.int32)
        self._values_TN = torch.full((rows, ids), torch.nan)
        self._top_ids_TN = torch.zeros(rows, asked.support, dtype=torch.int32)
        self._top_TN = torch.zeros(rows, asked.support)

    def add(self, first: int, hidden_TH: torch.Tensor, text_logits: Any) -> None:
        """Positions `first` to `first` + T of the prompt."""
        begin = max(first, self._first)
        end = min(first + len(hidden_TH), self._first + len(self._argmax_T))
        for at in range(begin, end, STRETCH):
            to = min(at + STRETCH, end)
            logits_TV = text_logits(hidden_TH[at - first : to - first])
            rows = slice(at - self._first, to - self._first)
            wanted_TN = self._ids_TN[rows].to(logits_TV.device)
            logprobs_TV = logits_TV.log_softmax(-1)
            self._argmax_T[rows] = logits_TV.argmax(-1).int().cpu()
            self._values_TN[rows] = logprobs_TV.gather(-1, wanted_TN).cpu()
            if count := self._top_TN.shape[1]:
                top_TN, top_ids_TN = logprobs_TV.topk(count, dim=-1)
                self._top_TN[rows], self._top_ids_TN[rows] = top_TN.cpu(), top_ids_TN.int().cpu()

    def tensors(self) -> LogprobsTensors:
        rows = len(self._argmax_T)
        ids_TW = torch.cat([self._argmax_T[:, None], self._ids_TN.int(), self._top_ids_TN], dim=1)
        values_TW = torch.cat([torch.zeros(rows, 1), self._values_TN, self._top_TN], dim=1)
        return LogprobsTensors(ids_TW, values_TW, torch.zeros(rows, dtype=torch.int32))
