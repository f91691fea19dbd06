"""Serve's one port on a cluster: free, taken, or Serve's already; starting Serve on it; and the address at which it is
reached."""

from __future__ import annotations

import socket
from typing import Any

import httpx

from s2t_models.errors import one_line
from s2t_models.recipe import RecipeError
from s2t_models.settings import ServingSettings
from serving.http import is_loopback

#: A free port may be taken by another between the look and the use; not three times in a row.
TRIES = 3
#: What a server listens at that is to be reached from anywhere.
ANYWHERE = ("0.0.0.0", "::")
#: Where Serve has its proxies, in its words.
_PROXIES = {"head": "HeadOnly", "every node": "EveryNode"}
#: Without it two proxies may share a port, and each would get some of the other's requests.
EXCLUSIVE = {"SERVE_SOCKET_REUSE_PORT_ENABLED": "0"}


def check_is_free(serving: ServingSettings) -> None:
    """Raise RecipeError where the recipe's port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise RecipeError(
                f"serving.port: {serving.host}:{serving.port} cannot be had ({error.strerror}); choose another with "
                "--set serving.port=PORT"
            ) from None


def check_is_serves(serving: ServingSettings) -> None:
    """Raise RecipeError where Serve, which runs, does not answer at the recipe's port: it has one port a cluster."""
    address = f"{serving.host}:{serving.port}"
    try:
        answers = httpx.get(f"http://{address}/-/healthz", timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        answers = False
    if not answers:
        raise RecipeError(f"serving.port: Serve runs on this cluster already, and not at {address}; give its port")


def start_serve(serving: ServingSettings, logging: dict[str, Any]) -> ServingSettings:
    """Start Serve where the recipe says; returns the settings. Raises RecipeError where that cannot be."""
    check_is_free(serving)
    _start(serving, logging)
    return serving


def start_serve_anywhere(serving: ServingSettings, logging: dict[str, Any]) -> ServingSettings:
    """Start Serve on a free port of this machine; returns the settings with it. Raises RecipeError where that cannot
    be."""
    from ray import serve

    for left in reversed(range(TRIES)):
        chosen = serving.model_copy(update={"host": "127.0.0.1", "port": _free_port()})
        try:
            _start(chosen, logging, **EXCLUSIVE)
        except RecipeError:  # it was free a moment ago
            serve.shutdown()
            if not left:
                raise
        else:
            return chosen
    raise AssertionError("unreachable: the last try returns or raises")


def for_any_node(serving: ServingSettings) -> ServingSettings:
    """The settings of an endpoint that a job's workers ask from whatever node they are on. On a cluster of several
    nodes it listens at every address, for localhost is another machine on each; nobody but the job has a key to it."""
    if len(_nodes()) > 1 and is_loopback(serving.host):
        return serving.model_copy(update={"host": ANYWHERE[0]})
    return serving


def reached_at(serving: ServingSettings) -> str:
    """The host and port by which clients on any node reach Serve: of a server that listens at every address, the head
    node's own where there are several nodes."""
    host = serving.host
    if host in ANYWHERE:
        nodes = _nodes()
        heads = [node for node in nodes if _HEAD in node["Resources"]]
        host = heads[0]["NodeManagerAddress"] if heads and len(nodes) > 1 else "127.0.0.1"
    return f"{host}:{serving.port}"


def serves_own(serving: ServingSettings) -> ServingSettings:
    """The settings with the address at which Serve, which runs on this cluster, listens. Raises RecipeError where a
    job's workers would not reach it."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    host = client.http_config.host
    if len(_nodes()) > 1 and is_loopback(host):
        raise RecipeError(
            f"serving.host: Serve runs on this cluster already, and listens at {host} of one node alone, where workers "
            "on other nodes do not reach it; start it with serving.host=0.0.0.0, or give the job another --endpoint"
        )
    return serving.model_copy(update={"host": host, "port": client.http_config.port})


#: The resource that the head node alone has.
_HEAD = "node:__internal_head__"


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(serving: ServingSettings, logging: dict[str, Any], **environment: str) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from serving.proxy import ENVIRONMENT

    try:
        serve.start(
            proxy_location=_PROXIES[serving.proxies],
            http_options={"host": serving.host, "port": serving.port},
            logging_config=logging,
            controller_options={"runtime_env": {"env_vars": ENVIRONMENT | environment}},
        )
    except (RayError, RuntimeError, TimeoutError) as error:  # of the proxy
        raise RecipeError(f"serving.port: Serve does not start: {one_line(error)}") from error
