"""The gateway as an ASGI application without Ray: its engines recite what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from s2t_models import loading
from s2t_models.engines.contract import Draft, ModelCard, Sampling, Usage, Written
from s2t_models.hosting import Hosted, Hosting
from serving.gateway import Gateway
from serving.keys import Keys

#: What one of its engines does instead of answering, if anything.
Fault = Callable[[], Coroutine[Any, Any, Any]]


class Parts:
    """A streamed draft that is told in one part."""

    def __init__(self, draft: asyncio.Task[Draft]) -> None:
        self._draft = draft

    async def __aiter__(self) -> AsyncIterator[Written | Draft]:
        draft = await self._draft
        yield Written(draft.ids)
        yield draft

    def cancel(self) -> None:
        self._draft.cancel()


class Reciting:
    """A deployment handle of an engine that writes its prompt again. `fault` is called first; `sessions` are those of
    the drafts asked for."""

    def __init__(self, hosted: Hosted) -> None:
        tokenizer = loading.load_tokenizer(hosted.settings)
        self.fault: Fault | None = None
        self.sessions: list[str] = []
        self.deployment_name = hosted.name
        self._card = ModelCard(hosted.name, "w", "t", len(tokenizer), 1024, (tokenizer.eos_token_id,))
        self.answering = SimpleNamespace(remote=lambda: self._call("card"))

    def options(self, method_name: str | None = None, session_id: str = "", **_: Any) -> Any:
        if method_name is None:
            return self

        def remote(method: str, arguments: tuple[Any, ...]) -> asyncio.Task[Any] | Parts:
            if method == "generate":
                self.sessions.append(session_id)
            asked = self._call(method, *arguments)
            return Parts(asked) if method_name == "stream" else asked

        return SimpleNamespace(remote=remote)

    def _call(self, method: str, *arguments: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self._answer(method, *arguments))

    async def _answer(self, method: str, *arguments: Any) -> Any:
        if self.fault:
            await self.fault()
        if method == "card":
            return self._card
        assert method == "generate", "this engine generates, and nothing else"
        return self._generate(*arguments)

    def _generate(self, prefix: list[int], sampling: Sampling) -> Draft:
        ids = prefix[: sampling.max_tokens]
        return Draft(ids, "length", Usage(prefill=len(prefix), decode=len(ids), forwards=len(ids)))


class _Gateway(Gateway):
    """Serve's gateway has an asynchronous destructor, which Serve awaits."""

    def __del__(self) -> None:
        pass


class Alone:
    """The gateway's application (`app`), its parts, and the handles of its engines by name."""

    def __init__(self, hosting: Hosting, patch: pytest.MonkeyPatch, keys: Keys = Keys()) -> None:  # noqa: B008
        self.handles = {name: Reciting(hosted) for name, hosted in hosting.engines.items()}
        self.gateway: Any = _Gateway.__new__(_Gateway)
        asyncio.run(self.gateway.__init__(hosting, self.handles, keys))
        self.app = self.gateway.app
        self.app.middleware_stack = None  # which knows the gateway of the test before
        context = SimpleNamespace(
            servable_object=self.gateway, replica_tag="alone", deployment="gateway", app_name="s2t"
        )
        patch.setattr(serve, "get_replica_context", lambda: context)
        others = SimpleNamespace(broadcast=lambda method: SimpleNamespace(results_async=self._no_others))
        patch.setattr(serve, "get_deployment_handle", lambda *_: others)

    async def _no_others(self, **_: Any) -> list[Any]:
        return []
