"""Serve a recipe: its engines and the gateway, on a running Ray cluster or one started here.

    python -m serving.app --recipe cluster/recipes/embedded.yaml --set serving.port=8080
    python -m serving.app models:/embedded-selector/2 models:/embedded-selector/1

`app` is the builder for Serve configuration files and KubeRay's RayService. A recipe that cannot be served is refused
before anything is deployed. Training and benchmarks are not known here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from s2t_models.commands import debugging, run_command
from s2t_models.errors import one_line
from s2t_models.recipe import Recipe, RecipeError, load_recipe
from s2t_models.settings import ServingSettings
from serving import cluster, http, port
from serving.keys import VARIABLE, Keys, is_readable_by_others, read_keys
from serving.placement import actor_bundles, gateway_options, replica_options

if TYPE_CHECKING:
    from ray.serve import Application

    from s2t_models.hosting import Hosted, Hosting

#: The application that answers at the root; one of another name answers below it.
NAME = "s2t"
# Batching is the engine's business: Serve passes every call on at once and holds none back.
MAX_ONGOING_REQUESTS = 4096
#: An engine whose processes have ended is replaced within about this time; one that is there and does not answer three
#: checks in a row, within three times the time-out.
HEALTH_CHECK_PERIOD_S = 3.0
HEALTH_CHECK_TIMEOUT_S = 5.0
#: How often a replica that ends looks whether its last request has ended.
SHUTDOWN_LOOKS_S = 0.5
LOGGING: dict[str, Any] = {"log_level": "INFO" if debugging() else "WARNING", "enable_access_log": debugging()}


def build(hosting: Hosting, keys: Keys, board: Any = None, spare: bool = False) -> Application:
    """What a recipe hosts as a Serve application, for those who have one of the `keys`. The engines tell the `board`
    what they have written (`serving.written`). Deployed again, an engine is replaced by one that is started beside it
    where the cluster has resources to `spare`, and else after it has ended: requests wait meanwhile."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from serving.decode_routing import ROUTING
    from serving.engine_deployment import EngineDeployment
    from serving.gateway import Gateway
    from serving.lifecycle import GATEWAY

    quiet = LoggingConfig(**LOGGING)

    def deployment(actor: type, name: str, options: dict[str, Any], surge: int) -> serve.Deployment:
        return serve.deployment(
            name=name,
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            max_constructor_retry_count=1,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
            graceful_shutdown_timeout_s=hosting.recipe.serving.drain_s,
            graceful_shutdown_wait_loop_s=SHUTDOWN_LOOKS_S,
            max_surge_percent=surge,
            logging_config=quiet,
            **options,
        )(actor)

    handles = {}
    for name, engine in hosting.engines.items():
        options = replica_options(engine.settings)
        options["request_router_config"] = ROUTING
        handles[name] = deployment(EngineDeployment, name, options, 100 if spare else 0).bind(engine, board)
    gateway = deployment(Gateway, GATEWAY, gateway_options(hosting.recipe.serving), 100)
    return gateway.bind(hosting, handles, keys)


def app(args: dict[str, Any]) -> Application:
    """`serve run serving.app:app recipe=FILE`, or `import_path: serving.app:app` with `args: {recipe, model, set}`,
    where `model` is a version or a list of them; see `chosen`."""
    from s2t_models.hosting import host

    models = args.get("model", ())
    models = [models] if isinstance(models, str) else models
    hosting = host(chosen(models, args.get("recipe"), args.get("set", ())))
    _check_engines(hosting)
    return build(hosting, read_keys(hosting.recipe.serving.keys_file))


def chosen(models: Sequence[str], recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe to serve: the one given, with the registered versions `models` (models:/NAME/VERSION) in it, or the
    first version's own. Raises RecipeError, and for a version RegistryError or StoreError."""
    if models:
        from serving.registry import recipe_of

        return recipe_of(models, recipe, overrides)
    if recipe is None:
        raise RecipeError("nothing to serve: give --recipe FILE, or models:/NAME/VERSION of a registered model")
    return load_recipe(recipe, overrides)


def run(hosting: Hosting, blocking: bool = True) -> str:
    """Deploy on the cluster at hand and return the endpoint's URL; `blocking` serves until SIGINT or SIGTERM, and then
    until what is in flight is answered.

    Deployed again, a changed recipe replaces the one that was served. Raises RecipeError where the port is taken, the
    cluster too small, or an engine does not start, ClusterError where it does not grow in time, and KeysError.
    """
    import ray
    from ray import serve

    from serving.lifecycle import Deployed, until_stopped

    serving = hosting.recipe.serving
    keys = read_keys(serving.keys_file)
    _check_engines(hosting)
    own_cluster = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    if own_cluster:
        port.check_is_free(serving)
    if blocking:
        for caution in _cautions(serving, keys):
            print(f"serve: {caution}", file=sys.stderr, flush=True)
    with ExitStack() as undo:
        if _join(hosting):
            undo.callback(ray.shutdown)
        serving_already = bool(serve.status().proxies)
        if serving_already:
            port.check_is_serves(serving)
        else:
            if not own_cluster:
                undo.callback(serve.shutdown)
            port.start_serve(serving, LOGGING)
        _deploy(build(hosting, keys, spare=_has_room(hosting)), NAME, "serve")
        url = _url(serving, NAME)
        if blocking:
            application = Deployed(NAME)
            if serving_already:
                undo.callback(application.delete)
            print(_screen(hosting, url), flush=True)
            until_stopped(application, serving.drain_s)
        else:
            undo.pop_all()
    return url


def run_for_job(hosting: Hosting, name: str, keys: Keys, board: Any, command: str) -> str:
    """Deploy beside what the cluster serves, for a job that asks with one of the `keys`, and return the URL. The
    application is called `name`, and its end is the job's business; for the `board` see `build`. Lines of progress
    begin with `command`.

    On a cluster of its own the job takes a free port of this machine unless the recipe names one, so that several can
    run at once; else it takes the port that Serve has, or gets. Raises RecipeError as `run` does."""
    from ray import serve

    serving = hosting.recipe.serving
    _check_engines(hosting)
    _join(hosting)
    if serve.status().proxies:
        serving = port.serves_own(serving)
    elif os.environ.get("RAY_ADDRESS") or serving.port != ServingSettings().port:
        serving = port.start_serve(port.for_any_node(serving), LOGGING)
    else:
        serving = port.start_serve_anywhere(serving, LOGGING)
    _deploy(build(hosting, keys, board), name, command)
    return _url(serving, name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="s2t serve", description="Serve a recipe's policies behind the OpenAI API.")
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a registered model with its recipe: models:/NAME/VERSION or models:/NAME@ALIAS; more of them beside it",
    )
    parser.add_argument("--recipe", help="a YAML file, or a shipped name; with a model, instead of its own")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    options = parser.parse_args(arguments)

    def work() -> None:
        from s2t_models.hosting import host

        run(host(chosen(options.models, options.recipe, options.set)))

    return run_command("serve", work, resumes=False)


def _prefix(name: str) -> str:
    return "/" if name == NAME else f"/{name}"


def _url(serving: ServingSettings, name: str) -> str:
    return f"http://{port.reached_at(serving)}{_prefix(name).rstrip('/')}/v1"


def _check_engines(hosting: Hosting) -> None:
    from s2t_models.engines.load import check

    for engine in hosting.engines.values():
        check(engine)


def _join(hosting: Hosting) -> bool:
    """Join the cluster, or start one here; returns whether it was started. One that is too small and grows by itself is
    waited for. Raises RecipeError or ClusterError where it is, or stays, too small."""
    import ray

    demand = _demand(hosting.engines)
    logging.getLogger("ray.serve").setLevel(LOGGING["log_level"])
    started = cluster.start(demand["CPU"])
    try:
        _check_resources(demand, ray.cluster_resources())
    except RecipeError:
        if started:
            ray.shutdown()
        if not cluster.grows():
            raise
        cluster.require(_bundles(hosting.engines), f"{hosting.recipe.name}: the endpoint's engines")
    return started


def _has_room(hosting: Hosting) -> bool:
    """Whether the cluster has room for the engines beside what runs on it."""
    import ray

    free = ray.available_resources()
    return all(wanted <= free.get(resource, 0) for resource, wanted in _demand(hosting.engines).items())


def _cautions(serving: ServingSettings, keys: Keys) -> Iterator[str]:
    """What whoever serves like this should know."""
    if not (keys or http.is_loopback(serving.host)):
        yield (
            f"{serving.host} is reached from other machines, and whoever reaches it may ask; set serving.keys_file or "
            f"{VARIABLE}, or serving.host=127.0.0.1"
        )
    if serving.keys_file and is_readable_by_others(serving.keys_file):
        yield f"serving.keys_file: other users of this machine can read {serving.keys_file}; chmod 600 it"


def _deploy(application: Application, name: str, command: str) -> None:
    from ray import serve

    from serving.lifecycle import Loading

    try:
        with Loading(command, name):
            serve.run(application, name=name, route_prefix=_prefix(name))
    except RuntimeError as error:
        failed = {
            deployment: status.message
            for deployment, status in serve.status().applications[name].deployments.items()
            if status.status not in ("HEALTHY", "UPDATING")
        }
        if name != NAME:
            serve.delete(name)
        lines = [f"{deployment} does not start: {one_line(message)}" for deployment, message in failed.items()]
        raise RecipeError("; ".join(lines) or one_line(error)) from RuntimeError(
            "\n".join(failed.values()) or str(error)
        )


def _screen(hosting: Hosting, url: str) -> str:
    """What a user needs to know once it runs."""
    from s2t_models.policies import offer

    names = list(offer(hosting)[0])
    beside = [name for name in hosting.engines if ":" in name]
    weights = [f"beside    {', '.join(beside)}, each with the SLM's weights once more"] if beside else []
    body = {"model": names[0], "messages": [{"role": "user", "content": "What is 3 + 4 * 5?"}]}
    return "\n".join(
        [
            f"endpoint  {url}  (recipe {hosting.recipe.name}; Ctrl-C stops it)",
            f"models    {', '.join(names)}",
            *weights,
            f"try       curl {url}/chat/completions -H 'Content-Type: application/json' \\",
            f"            -d '{json.dumps(body)}'",
        ]
    )


def cpus(hosting: Hosting) -> float:
    """The CPUs that the engines take, all replicas together."""
    return _demand(hosting.engines)["CPU"]


def _demand(engines: Mapping[str, Hosted]) -> dict[str, float]:
    """What the engines take of the cluster, all replicas together."""
    return {kind: sum(bundle.get(kind, 0.0) for bundle in _bundles(engines)) for kind in ("CPU", "GPU")}


def _bundles(engines: Mapping[str, Hosted]) -> list[dict[str, float]]:
    models = [engine.settings for engine in engines.values()]
    return [
        bundle for model in models for bundle in model.num_replicas * actor_bundles(model, model.num_cpus, model.gpus)
    ]


def _check_resources(demand: Mapping[str, float], cluster: Mapping[str, float]) -> None:
    for resource, wanted in demand.items():
        if wanted > cluster.get(resource, 0):
            raise RecipeError(
                f"the engines take {wanted:g} {resource}s and the cluster has {cluster.get(resource, 0):g}; set fewer "
                f"replicas (slm.num_replicas) or less for each (slm.num_{resource.lower()}s), or add nodes"
            )


if __name__ == "__main__":
    sys.exit(main())
