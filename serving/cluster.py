"""The one way to a Ray cluster, for serving and every pipeline, and quiet logs on it.

`start` joins the running cluster where RAY_ADDRESS is set (a job submitted with `ray job submit` has it), and starts
one on this machine otherwise. It knows nothing of what will run there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from s2t_models.commands import debugging
from s2t_models.errors import UserError, one_line

#: Logical CPUs of a local cluster at the least. Actors here wait for each other more than they compute, and Ray Data
#: holds slots for its own reading and filtering: a cluster of two would wait for ever without a word.
LOCAL_CPUS = 8
#: Actors of Ray Data that may fail in a row while they start; each is replaced. By itself Ray Data ends at the first.
#: Processes that are killed are not among them: Ray starts these again.
FAILED_STARTS = 1
#: How many seconds `require` waits at most, where the environment has it.
WAIT = "S2T_WAIT_S"
#: What an autoscaler has for its machines: a cloud may be minutes about one, and a large image has to come to it.
GROWS_WITHIN_S = 1800.0
_PATIENCE_S = 60.0
_PROBE_S = 10.0
_REPORTS_WITHIN_S = 10.0
_GIVEN_BACK_S = 10.0
_LOOKS_EVERY_S = 0.5
_SAYS_EVERY_S = 30.0
#: What an autoscaler that only looks on calls the kinds of nodes.
_NO_KIND = re.compile(r"node_[0-9a-f]{16,}")


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


def require(bundles: Sequence[Mapping[str, float]], what: str) -> None:
    """Return when the cluster has free what `what` needs: a bundle of CPUs and GPUs for each of its actors.

    What another job holds may come free: that is waited for, a minute at most. Where an autoscaler adds nodes it is
    asked for them, and has GROWS_WITHIN_S. S2T_WAIT_S says another time for either. Lines on stderr say what is waited
    for. Raises ClusterError where the cluster is too small and does not grow, or the time is over.
    """
    needs = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    if _is_free(needs):
        return
    growing, has = grows(), _resources(needs, "cluster_resources")
    for kind, count in needs.items():
        if count > has[kind] and not growing:
            raise ClusterError(f"{what} needs {count:g} {kind}s and the cluster has {has[kind]:g}")
    patience = _patience(GROWS_WITHIN_S if growing else _PATIENCE_S)
    with _placed(bundles) if growing else contextlib.nullcontext(lambda: _is_free(needs)) as is_there:
        _wait(is_there, needs, what, patience, growing)
    deadline = time.monotonic() + _GIVEN_BACK_S  # what the group held is free a moment after its end
    while growing and not _is_free(needs) and time.monotonic() < deadline:
        time.sleep(_LOOKS_EVERY_S)


def grows() -> bool:
    """Whether an autoscaler may add nodes to the cluster that RAY_ADDRESS names.

    Ray does not say so in one place. Version 2 of its autoscaler is turned on where there is one. Version 1 runs on
    every head, and its report names types of nodes; where it only looks on, each node is a type of its own.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address.startswith("ray://"):  # a cluster of this machine; and Ray's client has no such questions
        return False
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        return True
    deadline, report = time.monotonic() + _REPORTS_WITHIN_S, None
    while report is None and time.monotonic() < deadline:
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report")
        if report is None:  # the head has just started
            time.sleep(_LOOKS_EVERY_S)
    kinds = (report or {}).get("node_type_mapping") or {}
    return any(not _NO_KIND.fullmatch(kind) for kind in kinds.values())


@contextlib.contextmanager
def _placed(bundles: Sequence[Mapping[str, float]]) -> Iterator[Callable[[], bool]]:
    """Ask the autoscaler for room for `bundles` beside all other work; yields what says whether it is there.

    It is a placement group, and not `request_resources`: that counts what others use as room, the cluster has one such
    request which every job writes over, and a driver that is killed leaves it behind.
    """
    from ray.util import placement_group, remove_placement_group

    wanted = [{kind: count for kind, count in bundle.items() if count} for bundle in bundles]
    group = placement_group([bundle for bundle in wanted if bundle], strategy="PACK")
    try:
        yield lambda: group.wait(_LOOKS_EVERY_S)
    finally:
        remove_placement_group(group)


def _wait(is_there: Callable[[], bool], needs: Mapping[str, float], what: str, patience: float, growing: bool) -> None:
    began, said, when = time.monotonic(), "", 0.0
    for_what = "an autoscaler's nodes" if growing else "other work to end"
    while not is_there():
        now = time.monotonic()
        free, has = (_resources(needs, of) for of in ("available_resources", "cluster_resources"))
        if now - began > patience:
            asked = f"{what} needs {needs['CPU']:g} CPUs and {needs['GPU']:g} GPUs"
            if growing:
                raise ClusterError(
                    f"{asked}; after {patience:g} s the cluster has {has['CPU']:g} and {has['GPU']:g}, {free['CPU']:g} "
                    f"and {free['GPU']:g} of them free: raise the autoscaler's limits, or {WAIT}, or ask for fewer "
                    "actors"
                )
            raise ClusterError(
                f"{asked}; other work leaves {free['CPU']:g} and {free['GPU']:g} free: stop it or ask for fewer actors"
            )
        text = ", ".join(f"{free[kind]:g} of {count:g} {kind}s are free" for kind, count in needs.items() if count)
        if text != said or now - when >= _SAYS_EVERY_S:
            said, when = text, now
            line = f"{what}: waiting for {for_what}: {text}, {now - began:.0f} of {patience:g} s"
            print(line, file=sys.stderr, flush=True)
        time.sleep(_LOOKS_EVERY_S)


def _is_free(needs: Mapping[str, float]) -> bool:
    free = _resources(needs, "available_resources")
    return all(count <= free[kind] for kind, count in needs.items())


def _resources(needs: Mapping[str, float], question: str) -> dict[str, float]:
    import ray

    found = getattr(ray, question)()
    return {kind: found.get(kind, 0.0) for kind in needs}


def _patience(otherwise: float) -> float:
    given = os.environ.get(WAIT)
    try:
        seconds = otherwise if given is None else float(given)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ClusterError(f"{WAIT}={given}: not a number of seconds; set for example {WAIT}=3600")
    return seconds
