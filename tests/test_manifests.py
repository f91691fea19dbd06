"""KubeRay's manifests in cluster/kuberay: its schemas with unknown fields refused, Ray's and our own parsers for what
stands in them, and the numbers that have to fit each other."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import known_command, ray_start
from jsonschema import Draft202012Validator

from s2t_models.recipe import Recipe
from serving import placement
from serving.app import chosen
from serving.proxy import ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parent.parent
CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
#: A kind's manifests, and where in one is the cluster's own specification.
KINDS = {
    "RayJob": ("ray.io_rayjobs.yaml", ["collect", "distil", "benchmark"], "rayClusterSpec"),
    "RayService": ("ray.io_rayservices.yaml", ["serve"], "rayClusterConfig"),
    "RayCluster": ("ray.io_rayclusters.yaml", ["cluster"], None),
}
MANIFESTS = {name: kind for kind, (_, names, _) in KINDS.items() for name in names}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def manifest(name: str) -> dict[str, Any]:
    """A manifest as it is sent to a cluster: what is written once and referred to is there each time."""
    return json.loads(json.dumps(yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())))


def cluster_spec(name: str) -> dict[str, Any]:
    *_, section = KINDS[MANIFESTS[name]]
    spec = manifest(name)["spec"]
    return spec[section] if section else spec


def groups(name: str) -> list[dict[str, Any]]:
    """The head's group and the workers'."""
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def entrypoint(name: str) -> list[str]:
    """The commands of a job, one after the other."""
    shell, option, script = shlex.split(manifest(name)["spec"]["entrypoint"])
    assert [shell, option] == ["sh", "-c"], "the shell that submits the job would take `&&` for its own"
    return script.split("&&")


def served() -> dict[str, Any]:
    return yaml.safe_load(manifest("serve")["spec"]["serveConfigV2"])


def served_recipe() -> Recipe:
    (application,) = served()["applications"]
    return chosen(application["args"].get("model"), application["args"].get("recipe"), application["args"]["set"])


# KubeRay's schemas.


@pytest.fixture(scope="module")
def schemas() -> dict[str, Draft202012Validator]:
    """By kind: KubeRay's schema with unknown fields refused. A cluster prunes them without a word."""
    folder = Path(os.environ.get("S2T_KUBERAY", REPOSITORY.parent / "shared" / "kuberay"))
    if not folder.is_dir():
        pytest.skip(f"KubeRay's schemas are not at {folder}; set S2T_KUBERAY to the folder with its CRDs")
    return {kind: Draft202012Validator(strict(crd(folder / file))) for kind, (file, _, _) in KINDS.items()}


def crd(file: Path) -> dict[str, Any]:
    versions = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    return schema


def strict(node: Any) -> Any:
    """The schema, with no other fields than those it lists wherever it lists some."""
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def complaints(validator: Draft202012Validator, document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_kuberays(schemas, name):
    assert manifest(name)["kind"] == MANIFESTS[name]
    assert complaints(schemas[MANIFESTS[name]], manifest(name)) == []


def test_the_block_for_a_head_that_may_end_is_kuberays(schemas):
    """Commented out, since it takes a Redis."""
    text, taken = re.subn(
        r"^    # (gcsFaultToleranceOptions:(?:\n    #   .+)+)",
        lambda found: "    " + found[1].replace("\n    # ", "\n    "),
        (KUBERAY / "serve.yaml").read_text(),
        flags=re.MULTILINE,
    )
    assert taken == 1
    service = yaml.safe_load(text)
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert complaints(schemas["RayService"], service) == []


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("", "headGroup", {}),
        ("headGroupSpec", "rayStartParam", {}),
        ("headGroupSpec.rayStartParams", "num-cpus", 0),  # a text for KubeRay
        ("headGroupSpec.template.spec.containers.0", "resource", {}),
        ("headGroupSpec.template.spec.containers.0.env.0", "valuefrom", {}),
        ("headGroupSpec.template.spec.volumes.0", "emptydir", {}),
        ("headGroupSpec.template.spec.securityContext", "runAsUsr", 1000),
        ("authOptions", "mode", "tokens"),
    ],
)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_wrong_field_is_refused(schemas, name, where, key, value):
    wrong = manifest(name)
    *_, section = KINDS[MANIFESTS[name]]
    node = wrong["spec"][section] if section else wrong["spec"]
    for part in filter(None, where.split(".")):
        node = node[int(part) if part.isdigit() else part]
    node[key] = value
    (complaint,) = complaints(schemas[MANIFESTS[name]], wrong)
    assert key in complaint


# What the pods are.


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_confined_and_hold_what_they_ask_for(name):
    assert cluster_spec(name)["rayVersion"] == pinned("ray")
    assert cluster_spec(name)["authOptions"]["mode"] == "token"
    for group in groups(name):
        pod, one = group["template"]["spec"], container(group)
        assert one["image"] == f"s2t:{PROJECT['version']}"
        assert one["resources"]["requests"] == one["resources"]["limits"], "Ray counts by the limits"
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert not one["securityContext"]["allowPrivilegeEscalation"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in one["volumeMounts"]} == volumes.keys()
        assert {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert number(volumes["shm"]["emptyDir"]["sizeLimit"]) <= number(one["resources"]["limits"]["memory"]) / 2
        for variable in one["env"]:
            is_secret = re.search("TOKEN|KEY|PASSWORD", variable["name"])
            assert ("secretKeyRef" in variable.get("valueFrom", {})) == bool(is_secret), variable["name"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_rays_start_has_the_parameters_that_pods_give_it(name):
    known = {option for parameter in ray_start().params for option in parameter.opts}
    for group in groups(name):
        assert {f"--{key}" for key in group["rayStartParams"]} <= known


def test_the_claims_and_secrets_of_pods_are_those_of_the_readme():
    claim = yaml.safe_load((KUBERAY / "storage.yaml").read_text())
    text = (CLUSTER / "README.md").read_text()
    (created,) = re.findall(r"kubectl create secret generic (\S+)((?: \\\n|.)+)", text)
    made = set(re.findall(r"--from-(?:literal|file)=(\w+)=", created[1]))
    for name in MANIFESTS:
        assert cluster_spec(name)["authOptions"]["secretName"] == created[0]
        for group in groups(name):
            for volume in group["template"]["spec"]["volumes"]:
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
                if "secret" in volume:
                    assert volume["secret"]["secretName"] == created[0]
                    assert {item["key"] for item in volume["secret"]["items"]} <= made
            for variable in container(group)["env"]:
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert reference["name"] == created[0]
                    assert reference["key"] in made
    assert "auth_token" in made, "KubeRay looks for the token there"


@pytest.mark.parametrize(("name", "hosts"), [("serve", groups("serve")), ("cluster", groups("cluster")[:1])])
def test_serve_starts_with_our_proxies(name, hosts):
    """Serve's controller is on the head, and a node's proxy has the environment of its node beside it."""
    for group in hosts:
        given = {variable["name"]: variable.get("value") for variable in container(group)["env"]}
        assert {key: given.get(key) for key in ENVIRONMENT} == ENVIRONMENT


# What they run.


@pytest.mark.parametrize("name", KINDS["RayJob"][1])
def test_a_jobs_commands_are_ours(name):
    commands = [shlex.split(command) for command in entrypoint(name)]
    assert [command[1] for command in commands] == {
        "collect": ["collect", "collect"],
        "distil": ["distil", "distil"],
        "benchmark": ["benchmark", "analyse"],
    }[name]
    for command in commands:
        known_command(command)


def test_stages_hand_on_what_the_next_one_takes():
    jobs = [shlex.split(command) for name in KINDS["RayJob"][1] for command in entrypoint(name)]
    folders = {command[command.index("--output") + 1] for command in jobs if "--output" in command}
    train, calibration = (shlex.split(command) for command in entrypoint("collect"))
    assert [part for part in train if part not in calibration] == [train[-1]], "one pair, whatever is collected"
    selector, control = (shlex.split(command) for command in entrypoint("distil"))
    for command, option in ((selector, "--shards"), (selector, "--calibration"), (control, "--shards")):
        assert command[command.index(option) + 1] in folders
    recipe = served_recipe()
    assert {recipe.artifact, *recipe.checkpoints.values()} <= folders
    asking = known_command(shlex.split(entrypoint("benchmark")[0]))
    assert asking is not None
    assert (asking.artifact, asking.checkpoints) == (recipe.artifact, recipe.checkpoints)
    (service,) = re.findall(r"--endpoint http://(\S+)-serve-svc:(\d+)/v1", entrypoint("benchmark")[0])
    assert service == (manifest("serve")["metadata"]["name"], str(served()["http_options"]["port"]))


def test_pods_have_the_gpus_that_their_stages_ask_for():
    for command in entrypoint("collect"):
        recipe = known_command(shlex.split(command))
        assert recipe is not None
        pools = [(recipe.collect.rollout, recipe.slm), (recipe.collect.label, recipe.teacher)]
        gpus = sum(placement.gpus(model, pool.num_gpus) * pool.actors for pool, model in pools)
        cpus = sum(pool.num_cpus * pool.actors for pool, _ in pools)
        assert has("collect", "nvidia.com/gpu") == gpus == 4
        assert has("collect", "cpu") >= cpus + 2, "two more read and write"
    trained = known_command(shlex.split(entrypoint("distil")[0]))
    assert trained is not None
    assert has("distil", "nvidia.com/gpu") == trained.distil.num_gpus * trained.distil.workers == 1
    recipe = served_recipe()
    slms = 1 + (recipe.artifact is not None) + len(recipe.checkpoints)
    assert recipe.teacher.vllm.tensor_parallel > 1
    assert slms * recipe.slm.gpus + recipe.teacher.gpus <= has("serve", "nvidia.com/gpu") == 4
    assert has("serve", "cpu") >= slms * recipe.slm.num_cpus + recipe.teacher.num_cpus


def test_serve_reads_what_the_service_serves():
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(served())
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert application.args.keys() <= {"recipe", "model", "set"}
    assert served_recipe().serving.keys_file == mounted("keys")
    with pytest.raises(ValueError, match="import_pth"):
        ServeDeploySchema.model_validate({"applications": [{"import_pth": "serving.app:app"}]})


def test_the_service_is_ready_when_engines_answer_and_ends_when_answers_have_ended():
    serving, spec = served_recipe().serving, manifest("serve")["spec"]
    _, worker = groups("serve")
    one, ports = container(worker), {port["name"]: port["containerPort"] for port in container(worker)["ports"]}
    ready = one["readinessProbe"]["httpGet"]
    assert (ready["path"], ports[ready["port"]]) == ("/health", served()["http_options"]["port"])
    assert one["readinessProbe"]["timeoutSeconds"] > 3, "an engine has 3 seconds to answer"
    (pause, seconds) = one["lifecycle"]["preStop"]["exec"]["command"]
    assert pause == "sleep"
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] > int(seconds) > serving.drain_s
    assert spec["rayClusterDeletionDelaySeconds"] > serving.request_timeout_s
    assert served()["http_options"]["host"] == "0.0.0.0", "the Service reaches no other"


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    return version


def mounted(name: str) -> str:
    """Where the workers of the service find a file of the Secret."""
    pod = groups("serve")[1]["template"]["spec"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == name]
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == name]
    return f"{mount['mountPath']}/{volume['secret']['items'][0]['path']}"


def has(name: str, resource: str) -> float:
    """What all workers of a manifest have, at the least."""
    workers = groups(name)[1:]
    return sum(group["minReplicas"] * number(container(group)["resources"]["limits"][resource]) for group in workers)


def number(quantity: str) -> float:
    return float(quantity[:-2]) * UNITS[quantity[-2:]] if quantity[-2:] in UNITS else float(quantity)
