"""What engines take of a cluster, on a cluster of pretended GPUs: nobody reserves four and uses one."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve._private.config import DeploymentConfig

from s2t_models.hosting import host
from s2t_models.recipe import RecipeError, load_recipe
from s2t_models.settings import ModelSettings
from serving.app import build
from serving.keys import Keys
from serving.placement import GATEWAY_REQUESTS, actor_options, bundles, replica_options

pytestmark = pytest.mark.cluster


def vllm(**settings: object) -> ModelSettings:
    return ModelSettings.model_validate({"path": "m", "engine": "vllm", "device": "cuda"} | settings)


def test_a_parallel_engine_asks_for_a_bundle_a_gpu():
    model = vllm(num_cpus=2, vllm={"tensor_parallel": 2, "pipeline_parallel": 2})
    assert model.gpus == 4
    options = replica_options(model)
    assert options["placement_group_bundles"] == [{"CPU": 2, "GPU": 1}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}]
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}


@pytest.mark.parametrize(
    ("model", "gpus"),
    [
        (vllm(), 1),
        (vllm(device="cpu"), 0),
        (ModelSettings(path="m", num_gpus=0.5), 0.5),
    ],
)
def test_an_engine_on_one_gpu_or_none_is_one_actor(model, gpus):
    assert bundles(model, 1) is None
    assert replica_options(model)["ray_actor_options"]["num_gpus"] == gpus
    with actor_options(model, 1.0, model.num_gpus) as options:
        assert options["num_gpus"] == gpus


def test_replicas_scale_with_the_load_where_the_recipe_says_so():
    options = replica_options(vllm(num_replicas=2, max_replicas=8, slots=16))
    assert options["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 16}
    assert "num_replicas" not in options


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["slm.engine=vllm", "slm.num_gpus=1"], "num_gpus: leave it out with engine vllm"),
        (["slm.engine=vllm", "collect.rollout.num_gpus=1"], "collect.rollout.num_gpus: leave it out"),
        (["slm.num_replicas=3", "slm.max_replicas=2"], "max_replicas = 2 is below num_replicas = 3"),
    ],
)
def test_resources_that_contradict_each_other_are_refused(recipe_path, settings, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe_path, settings)


def on_pretended_gpus(script: str) -> Any:
    """What the script prints, in a process and on a cluster of its own with 8 GPUs. The actors stand in for engines of
    `model`, which takes 4; Ray and its groups are real."""
    begin = textwrap.dedent("""
        import json, sys, time, ray
        from pathlib import Path
        from ray.data import ActorPoolStrategy
        from ray.util import get_current_placement_group
        from ray.util.placement_group import placement_group_table
        from serving.placement import actor_options, remote_options, replica_options
        from s2t_models.settings import ModelSettings

        ray.init(address="local", num_cpus=8, num_gpus=8, log_to_driver=False, logging_level="ERROR")
        model = ModelSettings.model_validate(
            {"path": "m", "engine": "vllm", "device": "cuda", "vllm": {"tensor_parallel": 4}}
        )

        def group():
            table = placement_group_table(get_current_placement_group())
            return sorted(bundle.get("GPU", 0) for bundle in table["bundles"].values()), table["state"]

        def free():
            deadline = time.monotonic() + 30
            while (gpus := ray.available_resources().get("GPU", 0)) < 8 and time.monotonic() < deadline:
                time.sleep(0.1)
            return gpus
    """)
    command = [sys.executable, "-W", "ignore", "-c", begin + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow  # those of pools are in the default tests
def test_serve_data_and_tasks_get_the_placement_groups():
    served, beside, actor, task, free = on_pretended_gpus("""
        from ray import serve

        @serve.deployment(**replica_options(model))
        class Replica:
            def __call__(self):
                return group()

        class Actor:
            def __call__(self, batch):
                return {"group": [json.dumps(group())]}

        served = serve.run(Replica.bind()).remote().result()
        beside = ray.available_resources().get("GPU", 0)
        serve.shutdown()
        with actor_options(model, 1.0, 0.0) as options:
            rows = ray.data.range(1).map_batches(
                Actor, compute=ActorPoolStrategy(size=1), batch_size=1, **options
            ).take_all()
        with remote_options(model, model.num_cpus, model.num_gpus) as options:
            task = ray.get(ray.remote(**options)(group).remote())
        print(json.dumps([served, beside, json.loads(rows[0]["group"]), task, free()]))
    """)
    assert served == actor == task == [[1, 1, 1, 1], "CREATED"]
    assert (beside, free) == (4, 8)


def test_pools_give_back_their_gpus_and_those_of_actors_that_died_as_they_started(tmp_path: Path):
    """Each of two pools takes all GPUs, and one actor of the first has to be replaced."""
    used = on_pretended_gpus(f"""
        folder = Path({str(tmp_path)!r})

        class Actor:
            def __init__(self):
                try:
                    (folder / "one has died").touch(exist_ok=False)
                except FileExistsError:
                    return
                raise RuntimeError("a model that does not load at once")

            def __call__(self, batch):
                (folder / ray.get_runtime_context().get_actor_id()).touch()
                deadline = time.monotonic() + 60
                while len(list(folder.iterdir())) < 3 and time.monotonic() < deadline:  # until both have come
                    time.sleep(0.1)
                return batch

        ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = 1
        used = []
        for _ in range(2):
            with actor_options(model, 1.0, 0.0) as options:
                data = ray.data.range(4, override_num_blocks=4).map_batches(
                    Actor, compute=ActorPoolStrategy(size=2), batch_size=1, **options
                )
                rows = data.count()
            used.append([rows, len(list(folder.iterdir())) - 1, free()])
        print(json.dumps(used))
    """)
    assert used[0] == [4, 2, 8]
    assert used[1][::2] == [4, 8]


def test_the_gateway_and_the_teacher_scale_with_the_load_where_the_recipe_says_so(recipe_path):
    def options(*settings: str) -> dict[str, DeploymentConfig]:
        hosting = host(load_recipe(recipe_path, settings))
        built = build_app(build(hosting, Keys()), name="s2t", default_runtime_env={})
        return {deployment.name: deployment._deployment_config for deployment in built.deployments}

    fixed = options("serving.gateway_replicas=2", "teacher.num_replicas=3", "serving.drain_s=7")
    assert (fixed["gateway"].num_replicas, fixed["teacher"].num_replicas, fixed["slm"].num_replicas) == (2, 3, 1)
    assert all(config.autoscaling_config is None for config in fixed.values())
    assert {config.graceful_shutdown_timeout_s for config in fixed.values()} == {7}
    scaled = options("serving.gateway_max_replicas=5", "teacher.max_replicas=4", "teacher.slots=6")
    for name, least, most, requests in (("gateway", 1, 5, GATEWAY_REQUESTS), ("teacher", 1, 4, 6)):
        scaling = scaled[name].autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (least, most, requests)
    assert scaled["slm"].autoscaling_config is None
    with pytest.raises(RecipeError, match="gateway_max_replicas = 1 is below gateway_replicas = 2"):
        options("serving.gateway_replicas=2", "serving.gateway_max_replicas=1")
