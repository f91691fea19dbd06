"""Serve a recipe: its engines and the gateway, on a running Ray cluster or one started here.

    python -m serving.app --recipe cluster/recipes/embedded.yaml --set serving.port=8080
    python -m serving.app models:/embedded-selector/1

`app` is the builder for Serve configuration files and KubeRay's RayService. A recipe that cannot be served is refused
before anything is deployed. Training and benchmarks are not known here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx

from s2t_models.commands import debugging, run_command
from s2t_models.errors import one_line
from s2t_models.recipe import Recipe, RecipeError, load_recipe
from serving import cluster
from serving.keys import Keys, read_keys
from serving.placement import gateway_options, replica_options
from serving.proxy import ENVIRONMENT

if TYPE_CHECKING:
    from ray.serve import Application

    from s2t_models.hosting import Hosted, Hosting

#: The application that answers at the root; one of another name answers below it.
NAME = "s2t"
#: The deployment that speaks HTTP.
GATEWAY = "gateway"
# Batching is the engine's business: Serve passes every call on at once and holds none back.
MAX_ONGOING_REQUESTS = 4096
#: An engine whose processes have ended is replaced within about this time; one that is there and does not answer three
#: checks in a row, within three times the time-out.
HEALTH_CHECK_PERIOD_S = 3.0
HEALTH_CHECK_TIMEOUT_S = 5.0
#: How often a replica that ends looks whether its last request has ended.
SHUTDOWN_LOOKS_S = 0.5
LOGGING: dict[str, Any] = {"log_level": "INFO" if debugging() else "WARNING", "enable_access_log": debugging()}


def build(hosting: Hosting, keys: Keys, board: Any = None) -> Application:
    """What a recipe hosts as a Serve application, for those who have one of the `keys`. The engines tell the `board`
    what they have written (`serving.written`). Raises RecipeError where a model asks for an engine that there is
    not."""
    from ray import serve
    from ray.serve.schema import LoggingConfig

    from s2t_models.engines.load import check
    from serving.engine_deployment import EngineDeployment
    from serving.gateway import Gateway

    quiet = LoggingConfig(**LOGGING)

    def deployment(actor: type, name: str, options: dict[str, Any]) -> serve.Deployment:
        return serve.deployment(
            name=name,
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            max_constructor_retry_count=1,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
            graceful_shutdown_timeout_s=hosting.recipe.serving.drain_s,
            graceful_shutdown_wait_loop_s=SHUTDOWN_LOOKS_S,
            logging_config=quiet,
            **options,
        )(actor)

    handles = {}
    for name, engine in hosting.engines.items():
        check(engine)
        handles[name] = deployment(EngineDeployment, name, replica_options(engine.settings)).bind(engine, board)
    gateway = deployment(Gateway, GATEWAY, gateway_options(hosting.recipe.serving))
    return gateway.bind(hosting, handles, keys)


def app(args: dict[str, Any]) -> Application:
    """`serve run serving.app:app recipe=FILE`, or `import_path: serving.app:app` with `args: {recipe, model, set}`;
    see `chosen`."""
    from s2t_models.hosting import host

    hosting = host(chosen(args.get("model"), args.get("recipe"), args.get("set", ())))
    return build(hosting, read_keys(hosting.recipe.serving.keys_file))


def chosen(model: str | None, recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe to serve: the one given, with the registered version `model` (models:/NAME/VERSION) in it, or that
    version's own. Raises RecipeError, and for a version RegistryError or StoreError."""
    if model is not None:
        from serving.registry import recipe_of

        return recipe_of(model, recipe, overrides)
    if recipe is None:
        raise RecipeError("nothing to serve: give --recipe FILE, or models:/NAME/VERSION of a registered model")
    return load_recipe(recipe, overrides)


def run(hosting: Hosting, blocking: bool = True, name: str = NAME, board: Any = None, keys: Keys | None = None) -> str:
    """Deploy on the cluster at hand and return the endpoint's URL; `blocking` serves until SIGINT or SIGTERM. `name` is
    the application's; for the `board` see `build`.

    Deployed again, a changed recipe replaces the one that was served. Raises RecipeError where the port is taken, the
    cluster too small, or an engine does not start.
    """
    import ray
    from ray import serve

    recipe = hosting.recipe
    keys = read_keys(recipe.serving.keys_file) if keys is None else keys
    application = build(hosting, keys, board)
    demand = _demand(hosting.engines)
    logging.getLogger("ray.serve").setLevel(LOGGING["log_level"])
    own_cluster = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    if own_cluster:
        _check_port_is_free(recipe)
    with ExitStack() as undo:
        if cluster.start(demand["CPU"]):
            undo.callback(ray.shutdown)
        _check_resources(demand, ray.cluster_resources())
        serving_already = bool(serve.status().proxies)
        if serving_already:
            _check_port_is_serves(recipe)
        else:
            _check_port_is_free(recipe)
            if not own_cluster:
                undo.callback(serve.shutdown)
            options = {"host": recipe.serving.host, "port": recipe.serving.port}
            serve.start(
                proxy_location="HeadOnly",
                http_options=options,
                logging_config=LOGGING,
                controller_options={"runtime_env": {"env_vars": ENVIRONMENT}},
            )
        _deploy(application, name)
        url = f"http://{recipe.serving.host}:{recipe.serving.port}{_prefix(name).rstrip('/')}/v1"
        if blocking:
            if serving_already:
                undo.callback(serve.delete, name)
            print(_screen(hosting, url), flush=True)
            _wait()
        else:
            undo.pop_all()
    return url


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="s2t serve", description="Serve a recipe's policies behind the OpenAI API.")
    parser.add_argument(
        "model", nargs="?", help="a registered model with its recipe: models:/NAME/VERSION or models:/NAME@ALIAS"
    )
    parser.add_argument("--recipe", help="a YAML file, or a shipped name; beside a model, instead of its own")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    options = parser.parse_args(arguments)

    def work() -> None:
        from s2t_models.hosting import host

        run(host(chosen(options.model, options.recipe, options.set)))

    return run_command("serve", work, resumes=False)


def _prefix(name: str) -> str:
    return "/" if name == NAME else f"/{name}"


def _deploy(application: Application, name: str) -> None:
    from ray import serve

    try:
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
    body = {"model": names[0], "messages": [{"role": "user", "content": "What is 3 + 4 * 5?"}]}
    return "\n".join(
        [
            f"endpoint  {url}  (recipe {hosting.recipe.name}; Ctrl-C stops it)",
            f"models    {', '.join(names)}",
            f"try       curl {url}/chat/completions -H 'Content-Type: application/json' \\",
            f"            -d '{json.dumps(body)}'",
        ]
    )


def _demand(engines: Mapping[str, Hosted]) -> dict[str, float]:
    """What the engines take of the cluster, all replicas together."""
    models = [engine.settings for engine in engines.values()]
    return {
        "CPU": sum(model.num_replicas * model.num_cpus for model in models),
        "GPU": sum(model.num_replicas * model.gpus for model in models),
    }


def _check_resources(demand: Mapping[str, float], cluster: Mapping[str, float]) -> None:
    for resource, wanted in demand.items():
        if wanted > cluster.get(resource, 0):
            raise RecipeError(
                f"the engines take {wanted:g} {resource}s and the cluster has {cluster.get(resource, 0):g}; set fewer "
                f"replicas (slm.num_replicas) or less for each (slm.num_{resource.lower()}s), or add nodes"
            )


def _check_port_is_free(recipe: Recipe) -> None:
    host, port = recipe.serving.host, recipe.serving.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RecipeError(
                f"serving.port: {host}:{port} cannot be had ({error.strerror}); choose another with "
                "--set serving.port=PORT"
            ) from None


def _check_port_is_serves(recipe: Recipe) -> None:
    """Serve has one port a cluster: where it runs, the recipe's has to be that one."""
    address = f"{recipe.serving.host}:{recipe.serving.port}"
    try:
        answers = httpx.get(f"http://{address}/-/healthz", timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        answers = False
    if not answers:
        raise RecipeError(f"serving.port: Serve runs on this cluster already, and not at {address}; give its port")


def _wait() -> None:
    """Until Ctrl-C, which `run_command` handles, or SIGTERM, which is how supervisors end a service."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()


if __name__ == "__main__":
    sys.exit(main())
