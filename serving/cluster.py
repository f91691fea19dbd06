"""The one way to a Ray cluster, for serving and every pipeline, and quiet logs on it.

`start` joins the running cluster where RAY_ADDRESS is set (a job submitted with `ray job submit` has it), and
starts one on this machine otherwise. It knows nothing of what will run there.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from s2t_models.commands import debugging
from s2t_models.errors import UserError

#: Logical CPUs of a local cluster at the least. Actors here wait for each other more than they compute, and
#: Ray Data holds slots for its own reading and filtering: a cluster of two would wait for ever without a
#: word.
LOCAL_CPUS = 8
_PATIENCE_S = 60.0


class ClusterError(UserError):
    """The cluster cannot hold what a recipe asks for; the message is one line."""


def start(cpus: float = LOCAL_CPUS) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start one here with `cpus` logical CPUs at the least, unless this process is on
    one already. Returns whether it was started here."""
    # Ray's own complaints about what is meant here: actors that ask for no GPU, and more actors than cores.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(LOCAL_CPUS))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    started = False
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": debugging(), "logging_level": "ERROR"}
        with _native_stderr_closed():
            if os.environ.get("RAY_ADDRESS"):
                ray.init(**quiet)
            else:
                # CPUs are Ray's bookkeeping: small engines share cores, and one's own machine need not refuse that.
                logical = max(math.ceil(cpus), os.cpu_count() or 1)
                ray.init(address="local", num_cpus=logical, include_dashboard=True, **quiet)
                started = True
    _quieten()
    return started


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Ray's native code announces its log level on stderr, whatever the level. Exceptions are not touched."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _quieten() -> None:
    """Errors only, no execution plans and no nested progress bars: each pipeline shows its own line of
    progress."""
    import ray.data

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
