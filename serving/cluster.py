"""The one way to a Ray cluster, for serving and every pipeline, and quiet logs on it.

`start` joins the running cluster where RAY_ADDRESS is set (a job submitted with `ray job submit` has it), and starts
one on this machine otherwise. It knows nothing of what will run there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from s2t_models.commands import debugging
from s2t_models.errors import UserError, one_line

#: Logical CPUs of a local cluster at the least. Actors here wait for each other more than they compute, and Ray Data
#: holds slots for its own reading and filtering: a cluster of two would wait for ever without a word.
LOCAL_CPUS = 8
#: Actors of Ray Data that may fail in a row while they start; each is replaced. By itself Ray Data ends at the first.
#: Processes that are killed are not among them: Ray starts these again.
FAILED_STARTS = 1
_PATIENCE_S = 60.0
_PROBE_S = 10.0


class ClusterError(UserError):
    """The cluster cannot be joined, or cannot hold what a recipe asks for; the message is one line."""


def start(cpus: float = LOCAL_CPUS) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one here with `cpus` logical CPUs at the least, unless this
    process is on one already. Returns whether it was started here. Raises ClusterError where RAY_ADDRESS names no
    cluster that can be joined."""
    # Ray's own complaints about what is meant here: actors that ask for no GPU, and more actors than cores.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(LOCAL_CPUS))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not debugging():
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray
    import ray.data

    started = False
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": debugging(), "logging_level": "INFO" if debugging() else "ERROR"}
        with contextlib.nullcontext() if debugging() else _native_stderr_closed():
            if address := os.environ.get("RAY_ADDRESS"):
                _join(address, options)
            else:
                # CPUs are Ray's bookkeeping: small engines share cores, and one's own machine need not refuse that.
                logical = max(math.ceil(cpus), os.cpu_count() or 1)
                ray.init(address="local", num_cpus=logical, include_dashboard=True, **options)
                started = True
    if not debugging():
        _quieten()
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = FAILED_STARTS
    return started


def _join(address: str, options: dict[str, Any]) -> None:
    import ray

    logging.getLogger("ray").setLevel(options["logging_level"])
    _probe(address)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(f"RAY_ADDRESS={address}: cannot be joined: {one_line(error)}") from error


def _probe(address: str) -> None:
    """Ask the cluster for its id. Left to itself, Ray tries for minutes in native code, which Ctrl-C does not reach,
    and then ends the process. Raises ClusterError where nothing answers within _PROBE_S, or a token is wanted."""
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.exceptions import AuthenticationError

    is_client = address.startswith("ray://")
    target = address.removeprefix("ray://") if is_client else _canonical(address)
    question = "/ray.rpc.RayletDriver/ClusterInfo" if is_client else "/ray.rpc.NodeInfoGcsService/GetClusterId"
    if not target:
        return None

    def ask() -> None:
        with init_grpc_channel(target, GLOBAL_GRPC_OPTIONS) as channel:
            channel.unary_unary(question)(b"", timeout=_PROBE_S)

    try:
        if "RAY_AUTH_MODE" in os.environ or is_token_auth_enabled():
            return ask()
        # Ray takes any token that lies in ~/.ray, such as one of an earlier cluster, for this one's. Where the cluster
        # has none, the driver would then refuse what its own actors tell it, and they end.
        try:
            ask()
            os.environ["RAY_AUTH_MODE"] = "disabled"
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            ask()
    except AuthenticationError:
        raise ClusterError(_wants_a_token(address)) from None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(_wants_a_token(address)) from None
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ClusterError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there; start it (ray start --head), or unset "
                "RAY_ADDRESS to start one on this machine"
            ) from None


def _canonical(address: str) -> str | None:
    """host:port of a RAY_ADDRESS such as "auto"; None where it asks for a cluster of its own ("local")."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(f"RAY_ADDRESS={address}: {one_line(error)}") from None


def _wants_a_token(address: str) -> str:
    return (
        f"RAY_ADDRESS={address}: the cluster wants a token, and the one here is missing or wrong; "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's"
    )


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Ray's native code announces its log level on stderr, whatever the level. Exceptions are not touched."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        if not isinstance(sys.exception(), KeyboardInterrupt):  # Ctrl-C has silenced the process for good
            os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _quieten() -> None:
    """Errors only, no execution plans and no nested progress bars: each pipeline shows its own line of progress."""
    import ray

    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def require(cpus: float, gpus: float, what: str) -> None:
    """Fail with one line where the cluster has not got `cpus` and `gpus` for `what`.

    What another job holds may come free: that is waited for, a minute at most. Raises ClusterError.
    """
    import ray

    needs = {"CPU": cpus, "GPU": gpus}
    has = ray.cluster_resources()
    for kind, count in needs.items():
        if count > has.get(kind, 0.0):
            raise ClusterError(f"{what} needs {count:g} {kind}s and the cluster has {has.get(kind, 0.0):g}")
    deadline = time.monotonic() + _PATIENCE_S
    while any(count > ray.available_resources().get(kind, 0.0) for kind, count in needs.items()):
        if time.monotonic() > deadline:
            free = ray.available_resources()
            raise ClusterError(
                f"{what} needs {cpus:g} CPUs and {gpus:g} GPUs; other work leaves {free.get('CPU', 0.0):g} "
                f"and {free.get('GPU', 0.0):g} free: stop it or ask for fewer actors"
            )
        time.sleep(0.5)
