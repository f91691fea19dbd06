"""A decode's calls go to one replica of an engine, and decodes are spread evenly."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from asgi import ask
from gateway_alone import Alone
from ray.serve._private.build_app import build_app
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.request_router import ReplicaID

from s2t_models.hosting import host
from s2t_models.recipe import load_recipe
from serving.app import build
from serving.decode_routing import DecodeRouter
from serving.decodes import Decode
from serving.keys import Keys


def replicas(*numbers: int) -> list[Any]:
    return [SimpleNamespace(replica_id=ReplicaID(str(number), DeploymentID("slm", "s2t"))) for number in numbers]


@pytest.fixture
def router() -> DecodeRouter:
    async def made() -> DecodeRouter:
        return DecodeRouter(DeploymentID("slm", "s2t"), DeploymentHandleSource.REPLICA)

    return asyncio.run(made())


@pytest.fixture
def begin() -> Iterator[Callable[[], Decode]]:
    """Begins a decode, which runs to the end of the test."""
    with ExitStack() as running:
        yield lambda: running.enter_context(Decode())


def asked(router: DecodeRouter, there: list[Any], session: str) -> list[str]:
    """The ids of the replicas that a call of the session may go to."""
    request: Any = SimpleNamespace(
        metadata=SimpleNamespace(session_id=session), routing_context=SimpleNamespace(should_backoff=False)
    )
    ((*chosen,),) = asyncio.run(router.choose_replicas(there, request))
    return [replica.replica_id.unique_id for replica in chosen]


def test_a_decode_keeps_its_replica_and_decodes_are_spread(router: DecodeRouter, begin: Callable[[], Decode]):
    there = replicas(1, 2, 3)
    decodes = [begin() for _ in range(12)]
    first = [asked(router, there, decode.id) for decode in decodes]
    assert set(Counter(chosen for (chosen,) in first).values()) == {4}
    assert [asked(router, there[::-1], decode.id) for decode in decodes] == first


def test_a_new_replica_takes_what_comes_next(router: DecodeRouter, begin: Callable[[], Decode]):
    for _ in range(4):
        asked(router, replicas(1, 2), begin().id)
    later = [begin() for _ in range(2)]
    assert [asked(router, replicas(1, 2, 3), decode.id) for decode in later] == [["3"], ["3"]]


def test_decodes_that_ended_do_not_count(router: DecodeRouter, begin: Callable[[], Decode]):
    with Decode() as one, Decode() as other:
        assert [asked(router, replicas(1), ended.id) for ended in (one, other)] == [["1"], ["1"]]
        assert asked(router, replicas(2), begin().id) == ["2"]
    assert asked(router, replicas(1, 2), begin().id) == ["1"]


def test_a_lost_replica_is_not_asked_again_while_there_is_another(router: DecodeRouter, begin: Callable[[], Decode]):
    there, decode = replicas(1, 2), begin()
    (lost,) = asked(router, there, decode.id)
    decode.lose("slm")
    (other,) = asked(router, there, decode.id)
    assert {lost, other} == {"1", "2"}
    decode.lose("slm")
    assert asked(router, there, decode.id)[0] in {"1", "2"}, "with no other one it is asked all the same"


def test_a_call_of_no_decode_may_go_to_either_of_two(router: DecodeRouter):
    assert len(set(asked(router, replicas(1, 2, 3), ""))) == 2
    assert asked(router, replicas(7), "") == ["7"]


def test_a_replica_goes_to_a_call_of_the_decode_that_it_was_chosen_for(router: DecodeRouter):
    """All calls of a request have its id: by that alone one would take the other's replica, and one wait for ever."""

    async def matched() -> list[str]:
        metadata = [SimpleNamespace(session_id=session, internal_request_id="same") for session in "ab"]
        waiting: list[Any] = [SimpleNamespace(metadata=of, future=asyncio.Future()) for of in metadata]
        router._pending_requests_to_fulfill.extend(waiting)
        found: list[Any] = [router._get_pending_request_matching_metadata(of) for of in metadata]  # type: ignore[arg-type]
        waiting[0].future.set_result(None)
        assert router._get_pending_request_matching_metadata(metadata[0]) is None  # type: ignore[arg-type]
        return [pending.metadata.session_id for pending in found]

    assert asyncio.run(matched()) == ["a", "b"]


def test_each_decode_of_a_request_has_a_session_of_its_own(recipe_path: Path, monkeypatch: pytest.MonkeyPatch):
    alone = Alone(host(load_recipe(recipe_path)), monkeypatch)
    body = {"model": "maj@8", "messages": [{"role": "user", "content": "1+1?"}], "max_tokens": 4, "seed": 1}
    assert ask(alone.app, json=body).status_code == 200
    sessions = alone.handles["slm"].sessions
    assert len(set(sessions)) == len(sessions) == 8
    assert all(sessions)


def test_engines_are_deployed_with_this_router(recipe_path: Path):
    built = build_app(build(host(load_recipe(recipe_path)), Keys()), name="s2t", default_runtime_env={})
    routers = {
        deployment.name: deployment._deployment_config.request_router_config.get_request_router_class().__name__
        for deployment in built.deployments
    }
    assert {name: routers[name] for name in ("slm", "teacher")} == {"slm": "DecodeRouter", "teacher": "DecodeRouter"}
