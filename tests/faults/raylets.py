"""A Ray cluster of several raylets on this machine, each with resources of its own, as machines of a real one have."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from typing import Any

import psutil

#: A raylet that was killed is taken for dead within some seconds, where Ray's defaults take half a minute.
SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_maximum_startup_concurrency": "4",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
    # A driver would take a token that this machine happens to have, and refuse what raylets without one tell it.
    "RAY_AUTH_MODE": "disabled",
}
MIB = 1024**2
STARTS_WITHIN_S = 120
#: Children of a raylet that are none of the workers of the job that is tried.
NO_WORKERS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::Filler")


class Raylets:
    """A head with one CPU, where the drivers are, and `nodes` others with `cpus` each; `store_mib` is the size of each
    one's object store."""

    def __init__(self, nodes: int = 2, cpus: int = 4, store_mib: int = 100, dashboard: bool = False) -> None:
        os.environ.update(SETTINGS)
        from ray.cluster_utils import Cluster

        self.store_mib = store_mib
        self._options: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": store_mib * MIB}
        self._wanted = nodes
        self._folder = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")  # sockets have short paths
        self._nodes: list[Any] = []
        head: dict[str, Any] = {"num_cpus": 1, "object_store_memory": store_mib * MIB, "include_dashboard": dashboard}
        if dashboard:
            head |= {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.restore()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def dashboard(self) -> str:
        return f"http://{self._cluster.webui_url}"

    def join(self) -> None:
        """One more node."""
        from ray._private.services import wait_for_node

        # Each has a folder of its own, as machines have: nodes that shared one would delete each other's working
        # directories of jobs.
        own = tempfile.mkdtemp(prefix="ray-", dir=self._folder)
        node = self._cluster.add_node(wait=False, temp_dir=own, **self._options)
        self._nodes.append(node)
        wait_for_node(node.gcs_address, node.plasma_store_socket_name, STARTS_WITHIN_S)

    def leave(self, draw: random.Random) -> None:
        """A node goes for good, with all that runs on it. Where it is the last, another comes first."""
        if len(self._alive()) == 1:
            self.join()
        self._remove(draw.choice(self._alive()))

    def kill_raylet(self, draw: random.Random) -> None:
        """SIGKILL a node's raylet; its workers notice and end."""
        self._raylet(draw.choice(self._alive())).kill()

    def restore(self) -> None:
        """The nodes there were in the beginning, with those that died replaced."""
        for node in [node for node in self._nodes if node not in self._alive()]:
            self._remove(node)
        while len(self._nodes) > self._wanted:
            self._remove(self._nodes[-1])
        while len(self._nodes) < self._wanted:
            self.join()

    def workers(self, *names: str) -> list[psutil.Process]:
        """The Ray workers at work, on all nodes; with `names` those whose title holds one of them."""
        found = []
        for node in [self._cluster.head_node, *self._nodes]:
            with suppress(psutil.Error):
                for child in psutil.Process(self._raylet(node).pid).children():
                    with suppress(psutil.Error):
                        title = " ".join(child.cmdline())
                        is_wanted = any(name in title for name in names or ("",))
                        if title.startswith("ray::") and is_wanted and not title.startswith(NO_WORKERS):
                            found.append(child)
        return found

    def close(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _alive(self) -> list[Any]:
        return [node for node in self._nodes if self._raylet(node).poll() is None]

    def _remove(self, node: Any) -> None:
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    @staticmethod
    def _raylet(node: Any) -> subprocess.Popen[bytes]:
        (raylet,) = node.all_processes["raylet"]
        return raylet.process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
