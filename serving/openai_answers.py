"""The OpenAI API's answers, whole and streamed: chat and text completions, and the list of models.

The extension object `s2t` carries what a policy did and what it cost.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from typing import Any, Literal

from pydantic import BaseModel

from s2t_models.engines.contract import Decision, Finish, Usage
from serving.decoding import Ended, Piece, StepLogprobs
from serving.text import Word, with_texts

FinishReason = Literal["stop", "length"]
_REASONS: dict[Finish, FinishReason] = {"end": "stop", "stop": "stop", "length": "length"}

#: The last event of a stream.
DONE = "data: [DONE]\n\n"


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class S2T(BaseModel):
    """What the policy did. `usage` is each engine's cost summed over the choices, `seed` the first choice's (with it
    the same request gives the same answer), `seconds` the wall-clock time spent decoding, `models` the sha256 of each
    engine's weights and of those beside it (a router's, a second pass's), `samples` the texts voted over (maj@n),
    `spans` the output's [source, tokens] in order, `tokens` each token's [text, source], `ids` its token ids."""

    usage: dict[str, dict[str, int]]
    seed: int
    seconds: float
    models: dict[str, str]
    samples: list[str] = []
    decisions: list[dict[str, Any]] | None = None
    spans: list[tuple[str, int]] | None = None
    tokens: list[tuple[str, str]] | None = None
    ids: list[int] | None = None


class ChatChoice(BaseModel):
    index: int
    message: dict[str, str]
    finish_reason: FinishReason
    logprobs: dict[str, Any] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: dict[str, Any] | None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    s2t: S2T


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
    s2t: S2T


class ScoreResponse(BaseModel):
    """What a policy's scorer says of one state: the `decision`, and whether the trigger fires there, so that the policy
    would ask at all."""

    id: str
    object: Literal["s2t.score"] = "s2t.score"
    created: int
    model: str
    triggered: bool
    decision: dict[str, Any]
    usage: dict[str, dict[str, int]]


class ModelEntry(BaseModel):
    """A policy as a model. `kind` is its name without K and budget; these and `votes` are null where they mean nothing
    to it. `needs` names the engines it calls, `context` counts the tokens of prompt and answer, and `settings` are all
    that decide what it writes beside the weights: thresholds, candidates, sampling."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "s2t"
    kind: str
    k: int | None
    budget: float | None
    votes: int | None
    needs: list[str]
    context: int
    settings: dict[str, Any]


class ModelList(BaseModel):
    """`unavailable` says of each policy that is not offered here why."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    unavailable: dict[str, str] = {}


@dataclass
class Written:
    """A choice, gathered from its pieces; `finish` is there once it has ended."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[tuple[str, str]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    logprobs: list[StepLogprobs] = field(default_factory=list)
    ended: Ended | None = None

    def add(self, piece: Piece | Ended) -> None:
        if isinstance(piece, Ended):
            self.ended = piece
            return
        self.text += piece.text
        self.ids += piece.ids
        self.tokens += piece.tokens
        self.decisions += piece.decisions
        self.logprobs += piece.logprobs

    @property
    def reason(self) -> FinishReason:
        assert self.ended is not None
        return _REASONS[self.ended.finish]


@dataclass
class Answer:
    """What all answers of one request share."""

    model: str
    prompt_tokens: int
    seed: int
    models: dict[str, str]
    word: Word
    shows_decisions: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.perf_counter)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def usage(self, choices: Sequence[Written]) -> TokenUsage:
        written = sum(len(choice.ids) for choice in choices)
        return TokenUsage(
            prompt_tokens=self.prompt_tokens, completion_tokens=written, total_tokens=self.prompt_tokens + written
        )

    def s2t(self, choices: Sequence[Written], whole: bool = True) -> S2T:
        """`whole` shows decisions, spans and tokens where they were asked for."""
        ended = [choice.ended for choice in choices if choice.ended is not None]
        shown = choices[0] if whole and self.shows_decisions else None
        return S2T(
            usage=usage_by_engine([end.usage for end in ended]),
            seed=self.seed,
            seconds=time.perf_counter() - self.began,
            models=self.models,
            samples=[sample for end in ended for sample in end.samples],
            decisions=[as_decision(decision, self.word) for decision in shown.decisions] if shown else None,
            spans=as_spans(shown.tokens) if shown else None,
            tokens=shown.tokens if shown else None,
            ids=shown.ids if shown else None,
        )

    def shown(self, piece: Piece) -> dict[str, Any]:
        """A streamed piece's part of the extension."""
        if not self.shows_decisions or not (piece.tokens or piece.decisions):
            return {}
        decisions = [as_decision(decision, self.word) for decision in piece.decisions]
        return {"s2t": {"tokens": piece.tokens, "decisions": decisions}}


def chat_response(answer: Answer, choices: Sequence[Written], top: int | None) -> ChatResponse:
    return ChatResponse(
        id=f"chatcmpl-{answer.id}",
        created=answer.created,
        model=answer.model,
        choices=[
            ChatChoice(
                index=i,
                message={"role": "assistant", "content": choice.text},
                finish_reason=choice.reason,
                logprobs=None if top is None else chat_logprobs(choice.logprobs, answer.word),
            )
            for i, choice in enumerate(choices)
        ],
        usage=answer.usage(choices),
        s2t=answer.s2t(choices),
    )


def completion_response(answer: Answer, choices: Sequence[Written], top: int | None) -> CompletionResponse:
    return CompletionResponse(
        id=f"cmpl-{answer.id}",
        created=answer.created,
        model=answer.model,
        choices=[
            CompletionChoice(
                index=i,
                text=choice.text,
                finish_reason=choice.reason,
                logprobs=None if top is None else text_logprobs(choice.logprobs, answer.word),
            )
            for i, choice in enumerate(choices)
        ],
        usage=answer.usage(choices),
        s2t=answer.s2t(choices),
    )


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def chat_logprobs(steps: Sequence[StepLogprobs], word: Word) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = word(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            entry(step.token, step.logprob) | {"top_logprobs": [entry(token, value) for token, value in step.top]}
            for step in steps
        ],
        "refusal": None,
    }


def text_logprobs(steps: Sequence[StepLogprobs], word: Word, before: int = 0) -> dict[str, Any]:
    """The older form, of text completions; the tokens before these steps have `before` characters. Where two of the
    most probable tokens have the same text, the more probable one's is shown."""
    words = [word(step.token) for step in steps]
    offsets = list(accumulate(map(len, words[:-1]), initial=before))[: len(words)]
    return {
        "tokens": words,
        "token_logprobs": [step.logprob for step in steps],
        "top_logprobs": [
            None if step.logprob is None else {word(token): value for token, value in reversed(step.top)}
            for step in steps
        ],
        "text_offset": offsets,
    }


@dataclass(frozen=True)
class Streaming:
    """How chat or text completions are streamed: chunks of `kind` with ids that begin with `prefix`; `begun`, `text`
    and `ended` are what a choice holds at its beginning, with a piece of text, and at its end; `logprobs` is given
    steps, and how many characters the tokens before them have."""

    kind: str
    prefix: str
    begun: dict[str, Any]
    text: Callable[[str], dict[str, Any]]
    ended: dict[str, Any]
    logprobs: Callable[[Sequence[StepLogprobs], Word, int], dict[str, Any]]

    def chunk(
        self, answer: Answer, number: int, top: int | None, piece: Piece | FinishReason | None, before: int = 0
    ) -> dict[str, Any]:
        """A piece of a choice, with so many characters of tokens `before`; its beginning (None), or its end."""
        if not isinstance(piece, Piece):
            content = self.begun if piece is None else self.ended
            return self._with(answer, [{"index": number, **content, "logprobs": None, "finish_reason": piece}])
        has_logprobs = top is not None and piece.logprobs
        logprobs = self.logprobs(piece.logprobs, answer.word, before) if has_logprobs else None
        content = self.text(piece.text)
        choice = {"index": number, **content, "logprobs": logprobs, "finish_reason": None}
        return self._with(answer, [choice]) | answer.shown(piece)

    def usage(self, answer: Answer, choices: Sequence[Written]) -> dict[str, Any]:
        """The last chunk of a stream with `include_usage`."""
        return self._with(answer, []) | {
            "usage": answer.usage(choices).model_dump(),
            "s2t": answer.s2t(choices, whole=False).model_dump(exclude_none=True),
        }

    def _with(self, answer: Answer, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{answer.id}",
            "object": self.kind,
            "created": answer.created,
            "model": answer.model,
            "choices": choices,
        }


CHAT = Streaming(
    kind="chat.completion.chunk",
    prefix="chatcmpl",
    begun={"delta": {"role": "assistant", "content": ""}},
    text=lambda text: {"delta": {"content": text}},
    ended={"delta": {}},
    logprobs=lambda steps, word, before: chat_logprobs(steps, word),
)
TEXT = Streaming(
    kind="text_completion",
    prefix="cmpl",
    begun={"text": ""},
    text=lambda text: {"text": text},
    ended={"text": ""},
    logprobs=text_logprobs,
)


def summed(usages: Sequence[dict[str, Usage]]) -> dict[str, Usage]:
    """Each engine's costs, all together."""
    total: dict[str, Usage] = {}
    for usage in usages:
        for engine, cost in usage.items():
            total[engine] = total.get(engine, Usage()) + cost
    return total


def usage_by_engine(usages: Sequence[dict[str, Usage]]) -> dict[str, dict[str, int]]:
    """Each engine's costs, summed over the choices."""
    return {engine: asdict(cost) for engine, cost in summed(usages).items()}


def as_decision(decision: Decision, word: Word) -> dict[str, Any]:
    """A decision with its tokens' texts."""
    return with_texts(asdict(decision), word)


def as_spans(tokens: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Runs of tokens of one source."""
    return [(source, len(list(run))) for source, run in groupby(source for _, source in tokens)]
