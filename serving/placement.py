"""What one engine takes of a Ray cluster: the same for a Serve replica, an actor of a collection and a task.

An engine on one GPU or none is one actor with its resources. One on several GPUs (vLLM, tensor or pipeline parallel) is
an actor with a placement group, a bundle a GPU: vLLM starts its workers in the group that its actor is in.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from s2t_models.settings import ModelSettings, ServingSettings

#: Bundles on as few nodes as can be: tensor parallelism wants one.
STRATEGY = "PACK"
#: Requests at once that one replica of the gateway is meant to have, where their number follows the load.
GATEWAY_REQUESTS = 64


def bundles(model: ModelSettings, num_cpus: float) -> list[dict[str, float]] | None:
    """The placement group of an engine whose actor takes `num_cpus`; None where it needs none."""
    if model.gpus <= 1 or model.engine != "vllm":
        return None
    return [{"CPU": num_cpus, "GPU": 1.0}, *({"GPU": 1.0} for _ in range(int(model.gpus) - 1))]


def replica_options(model: ModelSettings) -> dict[str, Any]:
    """Arguments of `serve.deployment` for the replicas of an engine."""
    group = bundles(model, model.num_cpus)
    options: dict[str, Any] = {
        # The GPUs of a group are the workers'.
        "ray_actor_options": {"num_cpus": model.num_cpus, "num_gpus": 0 if group else model.gpus}
    }
    if group:
        options |= {"placement_group_bundles": group, "placement_group_strategy": STRATEGY}
    if model.max_replicas is None:
        return options | {"num_replicas": model.num_replicas}
    scaling = {
        "min_replicas": model.num_replicas,
        "max_replicas": model.max_replicas,
        "target_ongoing_requests": model.slots,
    }
    return options | {"autoscaling_config": scaling}


def gateway_options(serving: ServingSettings) -> dict[str, Any]:
    """Arguments of `serve.deployment` for the replicas of the gateway, which computes little."""
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}}
    if serving.gateway_max_replicas is None:
        return options | {"num_replicas": serving.gateway_replicas}
    scaling = {
        "min_replicas": serving.gateway_replicas,
        "max_replicas": serving.gateway_max_replicas,
        "target_ongoing_requests": GATEWAY_REQUESTS,
    }
    return options | {"autoscaling_config": scaling}


def gateways(serving: ServingSettings) -> int:
    """How many replicas of the gateway there may be."""
    return serving.gateway_max_replicas or serving.gateway_replicas


def places(model: ModelSettings) -> int:
    """How many decodes the engine's replicas hold at once, all together."""
    held = (model.vllm.max_num_seqs if model.engine == "vllm" else None) or model.slots
    return held * (model.max_replicas or model.num_replicas)


@contextmanager
def actor_options(model: ModelSettings, num_cpus: float, num_gpus: float) -> Iterator[dict[str, Any]]:
    """Arguments of `map_batches` for actors that hold an engine, `num_gpus` each where it is not vLLM's.

    Their placement groups are removed at the end: each would live as long as the driver, whose next stage needs the
    GPUs."""
    group = bundles(model, num_cpus)
    if group is None:
        yield {"num_cpus": num_cpus, "num_gpus": gpus(model, num_gpus)}
        return
    made: dict[str, Any] = {}
    try:
        yield {"num_cpus": num_cpus, "ray_remote_args_fn": _in_a_group_of_its_own(group, made)}
    finally:
        _give_back(made, set(made))


@contextmanager
def remote_options(model: ModelSettings, num_cpus: float, num_gpus: float) -> Iterator[dict[str, Any]]:
    """Arguments of `ray.remote` for a task or an actor that holds an engine, `num_gpus` where it is not vLLM's. A
    placement group is removed at the end."""
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = bundles(model, num_cpus)
    if group is None:
        yield {"num_cpus": num_cpus, "num_gpus": gpus(model, num_gpus)}
        return
    placed = placement_group(group, strategy=STRATEGY)
    try:
        where = PlacementGroupSchedulingStrategy(placed, placement_group_capture_child_tasks=True)
        yield {"num_cpus": num_cpus, "scheduling_strategy": where}
    finally:
        remove_placement_group(placed)


def _in_a_group_of_its_own(group: list[dict[str, float]], made: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """What Ray Data calls for each actor before it starts it, in the driver. `made` are the groups there are, by the
    name of the actor that each is for."""

    def options() -> dict[str, Any]:
        from ray.util import list_named_actors, placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # This one may replace an actor that died as it started, whose group holds the GPUs that it needs. Names of dead
        # actors are not listed; `ray.get_actor` finds them while there is a handle.
        _give_back(made, made.keys() - set(list_named_actors()))
        name = f"engine-{uuid.uuid4().hex}"
        made[name] = placed = placement_group(group, strategy=STRATEGY)
        return {
            "name": name,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(placed, placement_group_capture_child_tasks=True),
        }

    return options


def _give_back(made: dict[str, Any], names: set[str]) -> None:
    from ray.util import remove_placement_group

    for name in names:
        remove_placement_group(made.pop(name))


def actor_bundles(model: ModelSettings, num_cpus: float, num_gpus: float) -> list[dict[str, float]]:
    """What one actor with an engine takes of the cluster, `num_gpus` where it is not vLLM's."""
    return bundles(model, num_cpus) or [{"CPU": num_cpus, "GPU": gpus(model, num_gpus)}]


def gpus(model: ModelSettings, num_gpus: float) -> float:
    """GPUs that one actor with an engine takes in all, `num_gpus` where it is not vLLM's."""
    return model.gpus if model.engine == "vllm" else num_gpus
