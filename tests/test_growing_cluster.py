"""A cluster that an autoscaler adds nodes to: what a stage asks for comes, and what cannot come is refused in time. The
nodes are raylets that Ray's own provider for tests starts on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faults.raylets import SETTINGS
from processes import end, free_port, start, wait_until
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from s2t_models.hosting import host
from s2t_models.recipe import RecipeError, load_recipe
from serving import app, cluster

pytestmark = pytest.mark.cluster

#: What the head, its nodes and the drivers have in their environment.
QUICK = SETTINGS | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "S2T_WAIT_S": "200"}
#: What Ray's second autoscaler, which `kuberay/cluster.yaml` has, and the provider for tests want of a head.
VERSION_2 = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
STAGE = """
import os
import ray
from ray.util import placement_group_table
from serving import cluster

def asked_for():
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())

@ray.remote(num_cpus=2)
class Holds:
    def answer(self): return True

cluster.start()
cluster.require([{"CPU": 2, "GPU": 0}], "the first")
print("CPUs", ray.cluster_resources()["CPU"])
held = Holds.remote()
ray.get(held.answer.remote())
cluster.require([{"CPU": 1}, {"CPU": 1}], "the second")
print("CPUs", ray.cluster_resources()["CPU"])
os.environ["S2T_WAIT_S"] = "1"
try:
    cluster.require([{"GPU": 1}], "the third")
except cluster.ClusterError as error:
    print(error)
print("groups", asked_for())
"""


TOO_MUCH = """
from serving import cluster

cluster.start()
cluster.require([{"CPU": 2}], "a stage")
"""


@contextmanager
def head(*options: str, **environment: str) -> Iterator[str]:
    """The address of a head without CPUs; FOLDER in `options` is a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="grows-", dir="/tmp"))  # sockets have short paths
    port = free_port()
    (folder / "autoscaling.json").write_text(json.dumps(autoscaling(port)))
    process = start(
        *("-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"),
        *("--num-cpus=0", "--object-store-memory=100000000", f"--temp-dir={folder}", "--include-dashboard=false"),
        *(option.replace("FOLDER", str(folder)) for option in options),
        **QUICK | environment,
    )
    try:
        wait_until(lambda: answers(port), process)
        yield f"127.0.0.1:{port}"
    finally:
        for entry in Path("/proc").glob("[0-9]*"):  # nodes that the autoscaler started are of its session
            with suppress(OSError):
                if os.getsid(int(entry.name)) == process.pid:
                    os.kill(int(entry.name), signal.SIGKILL)
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def autoscaling(port: int) -> dict[str, Any]:
    """An autoscaler that may add two nodes of two CPUs."""
    from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG

    return BASE_READONLY_CONFIG | {
        "max_workers": 2,
        "idle_timeout_minutes": 10,
        "provider": BASE_READONLY_CONFIG["provider"]
        | {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "two": {"resources": {"CPU": 2, "object_store_memory": 10**8}, "node_config": {}, "max_workers": 2},
        },
    }


def answers(port: int) -> bool:
    try:
        cluster._probe(f"127.0.0.1:{port}")
    except cluster.ClusterError:
        return False
    return True


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_cluster_grows_for_a_stage_and_beside_other_work(version: int) -> None:
    of_version = VERSION_2 if version == 2 else {}
    with head("--autoscaling-config=FOLDER/autoscaling.json", **of_version) as address:
        status, said, shown = end(start("-c", STAGE, RAY_ADDRESS=address, **QUICK), 300)
    assert status == 0, said + shown
    first, second, third, groups = said.splitlines()
    assert (first, second) == ("CPUs 2.0", "CPUs 4.0")
    assert third.startswith(
        "the third needs 0 CPUs and 1 GPUs; after 1 s the cluster has 4 and 0, 2 and 0 of them free"
    )
    assert groups == "groups 0", "what was asked for is taken back, also after an error"
    assert "the first: waiting for an autoscaler's nodes: 0 of 2 CPUs are free, 0 of 200 s" in shown


def test_a_cluster_that_does_not_grow_refuses_at_once() -> None:
    """Ray's autoscaler runs there too, and only looks on."""
    with head() as address:
        status, said, shown = end(start("-c", TOO_MUCH, RAY_ADDRESS=address, **QUICK), 300)
    assert status == 1
    assert "ClusterError: a stage needs 2 CPUs and the cluster has 0" in said + shown
    assert "waiting" not in said + shown


def test_an_endpoint_waits_for_what_its_engines_take(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle for each GPU of a tensor parallel teacher, and one for each other replica."""
    teacher = ["teacher.engine=vllm", "teacher.vllm.tensor_parallel=2", "teacher.device=cuda"]
    recipe = load_recipe(recipe_path, [*teacher, "slm.num_replicas=2", "slm.num_gpus=0.5", "slm.num_cpus=3"])
    asked: list[tuple[list[dict[str, float]], str]] = []
    monkeypatch.setattr(cluster, "start", lambda cpus: False)
    monkeypatch.setattr(cluster, "require", lambda bundles, what: asked.append((bundles, what)))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(cluster, "grows", lambda: False)
    with pytest.raises(RecipeError, match="and the cluster has 1"):
        app._join(host(recipe))
    monkeypatch.setattr(cluster, "grows", lambda: True)
    app._join(host(recipe))
    ((bundles, what),) = asked
    assert what == f"{recipe.name}: the endpoint's engines"
    teachers = [{"CPU": recipe.teacher.num_cpus, "GPU": 1}, {"GPU": 1}]
    assert bundles == [*2 * [{"CPU": 3, "GPU": 0.5}], *teachers]


def test_a_time_to_wait_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("soon", "-1", "nan"):
        monkeypatch.setenv(cluster.WAIT, given)
        with pytest.raises(cluster.ClusterError, match=f"S2T_WAIT_S={given}: not a number of seconds; set for"):
            cluster._patience(60)
    monkeypatch.setenv(cluster.WAIT, "90")
    assert cluster._patience(60) == 90
