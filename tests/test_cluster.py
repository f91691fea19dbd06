"""Clusters and stores that are not there, and proxies that must not come between us and what is near: said in seconds,
in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
from processes import REPOSITORY

from s2t_models.recipe import RecipeError
from s2t_models.settings import ServingSettings
from serving import cluster, http, port, store

ADDRESS = "127.0.0.1:{}"


@contextmanager
def listener() -> Iterator[int]:
    """A port where something takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Cluster(grpc.GenericRpcHandler):
    """Answers every call with nothing, or ends it with the same status, as a cluster that wants a token does. It keeps
    the names of the metadata that calls brought."""

    def __init__(self, code: grpc.StatusCode | None = None) -> None:
        self.code = code
        self.brought: list[set[str]] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.brought.append({name for name, _ in details.invocation_metadata})

        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.code:
                context.abort(self.code, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(call)


class WantsToken(Cluster):
    """Ends the calls that bring no token."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        handler = super().service(details)
        self.code = None if "authorization" in self.brought[-1] else grpc.StatusCode.UNAUTHENTICATED
        return handler


@contextmanager
def grpc_server(code: grpc.StatusCode) -> Iterator[int]:
    with serving(Cluster(code)) as port:
        yield port


@contextmanager
def serving(handler: Cluster) -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("0.0.0.0:0")  # Ray takes 127.0.0.1 for this machine's own address
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(store, "_PROBE_S", 1)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no-such-host.invalid:6379"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    with pytest.raises(cluster.ClusterError, match=f"RAY_ADDRESS={address}: no Ray cluster answers there; start it"):
        cluster._probe(address)


def test_an_address_where_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_PROBE_S", 0.5)
    with listener() as port, pytest.raises(cluster.ClusterError, match="no Ray cluster answers there"):
        cluster._probe(ADDRESS.format(port))


@pytest.mark.parametrize("kind", ["", "ray://"])
def test_a_cluster_that_wants_a_token(kind: str) -> None:
    """What a real head started with RAY_AUTH_MODE=token says to a client without the token."""
    with (
        grpc_server(grpc.StatusCode.UNAUTHENTICATED) as port,
        pytest.raises(cluster.ClusterError, match=r"wants a token.* set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
    ):
        cluster._probe(kind + ADDRESS.format(port))


PROBE = """
import os, sys
from serving import cluster

cluster._probe(sys.argv[1])
print(os.environ["RAY_AUTH_MODE"])
"""


@pytest.mark.parametrize(("wants", "mode"), [(False, "disabled"), (True, "token")])
def test_a_token_that_lies_about_is_for_a_cluster_that_wants_one(wants: bool, mode: str, tmp_path: Path) -> None:
    """Ray leaves one in ~/.ray wherever it has started a cluster, and would bring it to all others."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef" * 4)
    handler = WantsToken() if wants else Cluster()
    with serving(handler) as port:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        shown = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE, ADDRESS.format(port)],
            env=environment | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
    assert shown.stdout.split() == [mode], shown.stderr
    assert ["authorization" in brought for brought in handler.brought] == [False, True][: 1 + wants]


def test_an_address_that_is_none() -> None:
    with pytest.raises(cluster.ClusterError, match="RAY_ADDRESS=nonsense: Invalid address"):
        cluster._probe("nonsense")


def test_a_cluster_that_is_there(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_AUTH_MODE")
    cluster._probe(ray.get_runtime_context().gcs_address)


def test_a_store_that_is_not_there() -> None:
    for uri in ("http://127.0.0.1:9", "postgresql://user@127.0.0.1:9/mlflow", "http://127.0.0.1:port"):
        with pytest.raises(store.StoreError, match=f"MLflow store {uri}: cannot be used") as refused:
            store.use_store(uri)
        assert "\n" not in str(refused.value)


def test_a_store_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with listener() as port, pytest.raises(store.StoreError, match="cannot be used"):
        store.use_store(f"http://127.0.0.1:{port}")
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77", "its own patience again"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize(
    ("url", "is_near"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://10.1.2.3:8000", True),
        ("http://192.168.0.7", True),
        ("http://169.254.1.1", True),
        ("http://8.8.8.8", False),
        ("https://no-such-host.invalid", False),
        ("http://", False),
        ("http://[", False),
        ("no address", False),
    ],
)
def test_what_is_near(url: str, is_near: bool) -> None:
    assert http.is_near(url) is is_near


def test_near_hosts_are_reached_directly_and_far_ones_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_server(("127.0.0.1", 0)) as near:

        def answer(server: socket.socket) -> None:
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(4096).split(b"\r\n")[0])
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for server, url in ((near, f"http://127.0.0.1:{near.getsockname()[1]}/x"), (proxy, "http://8.8.8.8/x")):
            thread = threading.Thread(target=answer, args=(server,), daemon=True)
            thread.start()
            with http.client(url, timeout=10) as client:
                assert client.get(url).text == "ok"
            thread.join()
    assert asked == [b"GET /x HTTP/1.1", b"GET http://8.8.8.8/x HTTP/1.1"]


ENGINE_CALL = """
import sys
import grpc
from serving.engine_deployment import RemoteEngine

class Handle:
    def options(self, **settings): return self

{construct}
with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        channel.unary_unary("/x/y")(b"", timeout=10)
    except grpc.RpcError as error:
        print(error.code().name)
"""


@pytest.mark.parametrize(("construct", "code"), [("RemoteEngine(Handle())", "ABORTED"), ("", "UNAVAILABLE")])
def test_engine_calls_go_past_the_proxy(construct: str, code: str) -> None:
    """A replica's gRPC, to a server on this machine, with a proxy in the environment where nothing listens."""
    with grpc_server(grpc.StatusCode.ABORTED) as port:
        shown = subprocess.run(
            [sys.executable, "-c", ENGINE_CALL.format(construct=construct), ADDRESS.format(port)],
            env={name: value for name, value in os.environ.items() if name.lower() not in ("no_proxy", "grpc_proxy")}
            | {"http_proxy": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
        )
    assert shown.stdout.strip() == code


def test_the_timeouts_of_a_client_are_the_callers() -> None:
    with (
        listener() as port,
        http.client(f"http://127.0.0.1:{port}", timeout=0.2) as client,
        pytest.raises(httpx.TimeoutException),
    ):
        client.get(f"http://127.0.0.1:{port}")


def test_a_jobs_endpoint_is_reached_from_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one node localhost; on several the head's own address, for which Serve listens at all of them."""
    head = {"Alive": True, "Resources": {"node:__internal_head__": 1.0}, "NodeManagerAddress": "10.0.0.7"}
    other = {"Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerAddress": "10.0.0.8"}
    serving = ServingSettings()
    for nodes, host, address in (
        ([head], "127.0.0.1", "127.0.0.1:8000"),
        ([head, other | {"Alive": False}], "127.0.0.1", "127.0.0.1:8000"),
        ([other, head], "0.0.0.0", "10.0.0.7:8000"),
    ):
        monkeypatch.setattr("ray.nodes", lambda nodes=nodes: nodes)
        chosen = port.for_any_node(serving)
        assert chosen.host == host
        assert port.reached_at(chosen) == address
    named = ServingSettings(host="10.0.0.9", port=81)
    assert port.for_any_node(named) == named
    assert port.reached_at(named) == "10.0.0.9:81"


def test_a_serve_that_listens_at_localhost_is_no_endpoint_for_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def client(host: str) -> SimpleNamespace:
        return SimpleNamespace(http_config=SimpleNamespace(host=host, port=8123))

    nodes = [{"Alive": True, "Resources": {}, "NodeManagerAddress": f"10.0.0.{n}"} for n in (7, 8)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client("0.0.0.0"))
    assert port.serves_own(ServingSettings()).port == 8123
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client("127.0.0.1"))
    with pytest.raises(RecipeError, match=r"listens at 127.0.0.1 of one node alone"):
        port.serves_own(ServingSettings())
    nodes.pop()
    assert port.serves_own(ServingSettings()).host == "127.0.0.1"
