"""docker-compose.yml and config/kubernetes: valid, and about the queues, commands, keys and numbers that there really are.

Neither Docker nor a cluster is needed. Compose's structure is checked against the part of its specification that the file uses
(compose-spec.io); interpolation `${NAME:-default}` is resolved here with the defaults, as `docker compose config` would with an
empty environment. Kubernetes' objects are checked by schema.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from builders import for_each

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.keys import Keys
from sluice.common.monitoring.autoscale import bounds_of
from sluice.common.pipeline import QUEUES, ROLES, stage_on

ROOT = Path(__file__).parent.parent
WITH_WEIGHTS = {"trainer", *(queue for queue in QUEUES if stage_on(queue).needs_weights)}

COMPOSE = (ROOT / "docker-compose.yml").read_text()
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+):-(?P<default>[^}]*)\}")
TUTORIAL_REPLICAS = {"dataset": 2, "rollout": 8, "reference": 1, "reward": 16, "eval": 1}
# Keys of the Compose specification that this file may use; a misspelt key is refused by Compose, and here.
SERVICE_KEYS = {
    *("image", "build", "init", "restart", "stop_grace_period", "environment", "volumes", "depends_on"),
    *("command", "deploy", "ports", "healthcheck", "profiles"),
}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
DURATION = re.compile(r"(\d+(us|ms|s|m|h))+")
RESOLVED: dict[str, Any] = yaml.safe_load(VARIABLE.sub(lambda match: match["default"], COMPOSE))
"""The file with every default filled in and anchors merged."""
SERVICES: dict[str, dict[str, Any]] = RESOLVED["services"]
COMMANDS = {name: shlex.split(service.get("command", "")) for name, service in SERVICES.items()}

FOLDER = ROOT / "config" / "kubernetes"
KEDA = json.loads((ROOT / "tests" / "fixtures" / "keda.schema.json").read_text())
VERSION = "1.32"


def objects(path: Path) -> list[dict[str, Any]]:
    """Every object of a file, lists taken apart."""
    found = []
    for document in yaml.safe_load_all(path.read_text()):
        found += document["items"] if document["kind"] == "List" else [document]
    return found


OBJECTS = {path: objects(path) for path in FOLDER.rglob("*.yaml")}
CORE = {(each["kind"], each["metadata"]["name"]): each for path in FOLDER.glob("*.yaml") for each in OBJECTS[path]}
"""Kind, name -> what is applied whichever autoscaler is."""
PODS = {
    name: each["spec"]["template"]["spec"] for (_, name), each in CORE.items() if "template" in each.get("spec", {})
}
"""Name -> pod spec of everything that runs."""
SCALED = {
    path.stem: {o["spec"]["scaleTargetRef"]["name"]: o["spec"] for o in found if o["kind"] == "ScaledObject"}
    for path, found in OBJECTS.items()
    if path.parent.name == "keda"
}
"""Autoscaler -> queue -> how KEDA scales its workers."""


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def created(command: list[str], *, name: str) -> Config:
    """The config of the run that `sluice create` makes; its overrides are valid."""
    assert [*command[:2], *command[3:5]] == ["sluice", "create", "--name", name]
    return load_config(ROOT / command[2], command[5:])


def in_cluster() -> Config:
    return created(PODS["trainer"]["initContainers"][0]["command"], name="$(SLUICE_RUN)")


# Both.


@for_each(
    "commands",
    [
        COMMANDS,
        {name: pod["containers"][0].get("command") or pod["containers"][0]["args"] for name, pod in PODS.items()},
    ],
)
def test_every_queue_has_one_worker_the_trainer_is_the_standalone_daemon_and_redis_is_durable(
    commands: dict[str, list[str]],
) -> None:
    workers = {name: line for name, line in commands.items() if line[:4] == ["celery", "-A", "sluice", "worker"]}
    assert workers == {queue: ["celery", "-A", "sluice", "worker", "-Q", queue] for queue in QUEUES}
    assert commands["trainer"] == ["python", "-m", "sluice.trainer"]
    assert commands["redis"][:5] == ["redis-server", "--appendonly", "yes", "--appendfsync", "everysec"]


# Compose.


def test_only_known_top_level_keys_and_no_variable_without_a_default() -> None:
    assert {key for key in RESOLVED if not key.startswith("x-")} <= {"services", "volumes", "networks"}
    defaults = {match["name"]: match["default"] for match in VARIABLE.finditer(COMPOSE)}
    numbers = {f"{queue.upper()}_REPLICAS" for queue in QUEUES} | {"REDIS_PORT", "POLICY_STORE_GIB", "SLUICE_GPU"}
    assert numbers <= set(defaults)
    assert all(defaults[name].isdecimal() for name in numbers)
    assert "${" not in VARIABLE.sub("", COMPOSE)


@for_each("name", SERVICES)
def test_services_are_valid(name: str) -> None:
    service = SERVICES[name]
    assert set(service) <= SERVICE_KEYS
    assert isinstance(service.get("command", ""), str)
    health = service.get("healthcheck", {})
    for duration in (service.get("stop_grace_period", "1s"), health.get("interval", "1s"), health.get("timeout", "1s")):
        assert DURATION.fullmatch(duration)
    assert service["restart"] in ("no", "always", "on-failure", "unless-stopped")
    for dependency, how in service.get("depends_on", {}).items():
        assert dependency in SERVICES and how["condition"] in CONDITIONS
    for mount in service.get("volumes", []):
        source, target = mount.removesuffix(":ro").split(":")
        assert (ROOT / source).is_dir() if source.startswith(".") else source in RESOLVED["volumes"]
        assert target.startswith("/")


def test_replicas_default_to_the_tutorials_numbers_and_agree_with_the_shipped_config() -> None:
    replicas = {name: service["deploy"]["replicas"] for name, service in SERVICES.items() if "deploy" in service}
    assert replicas == TUTORIAL_REPLICAS  # one trainer per run, whatever its number of ranks
    config = load_config(ROOT / "config" / "gsm8k_qwen3_1.7b.yaml")
    assert config.replicas.model_dump() == {**TUTORIAL_REPLICAS, "trainer": 4}


def test_run_is_created_once_before_any_worker_starts_and_after_redis_is_healthy() -> None:
    assert COMMANDS["create"][2] == "config/gsm8k_qwen3_1.7b.yaml"
    created(COMMANDS["create"], name="gsm8k")
    assert SERVICES["create"]["restart"] == "no"
    for name in ROLES:
        assert SERVICES[name]["depends_on"]["create"] == {"condition": "service_completed_successfully"}
        assert SERVICES[name]["environment"]["SLUICE_RUN"] == "gsm8k"
    for name in ("create", *QUEUES, "trainer"):
        assert SERVICES[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert SERVICES["redis"]["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]


def test_only_roles_that_publish_or_load_policies_share_the_store_and_have_the_runs_key() -> None:
    for name in ("create", *WITH_WEIGHTS):
        assert "policies:/policies" in SERVICES[name]["volumes"]
    with_key = {name for name, service in SERVICES.items() if "SLUICE_RUN_KEY" in service.get("environment", {})}
    assert with_key == WITH_WEIGHTS
    assert all(SERVICES[name]["environment"]["SLUICE_REDIS_URL"] for name in with_key)


def test_observability_is_a_profile_and_all_ports_are_this_machines_only() -> None:
    optional = {name for name, service in SERVICES.items() if service.get("profiles") == ["observability"]}
    assert optional == {"dashboard", "metrics", "prometheus", "grafana", "flower"}
    assert SERVICES["redis"]["ports"] == ["127.0.0.1:6379:6379"]
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", []))
    scraped = yaml.safe_load((ROOT / "config" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for config in job["static_configs"] for target in config["targets"]]
    assert targets == ["metrics:9464", "flower:5555"]
    assert COMMANDS["metrics"][-1] == "0.0.0.0:9464"
    assert "--port=5555" in COMMANDS["flower"]


def test_image_runs_as_an_unprivileged_user_who_owns_the_policy_store() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "USER sluice" in dockerfile
    assert "--uid 1000" in dockerfile
    assert "uid=1000" in RESOLVED["volumes"]["policies"]["driver_opts"]["o"]


# Kubernetes.


def validate(each: dict[str, Any]) -> None:
    if each["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(each, KEDA)
    else:
        kubernetes_validate.validate(each, VERSION, strict=True)


@for_each("path", OBJECTS)
def test_every_object_is_valid(path: Path) -> None:
    assert OBJECTS[path]
    for each in OBJECTS[path]:
        assert each["metadata"]["namespace"] == "sluice"
        assert each["kind"] != "Secret"
        validate(each)


def test_a_wrong_field_is_noticed() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(CORE["Deployment", "rollout"] | {"spce": {}})
    scaled = objects(FOLDER / "keda" / "redis.yaml")[1]
    scaled["spec"]["triggers"][0]["metadata"]["listLength"] = 1  # KEDA's metadata are strings
    with pytest.raises(jsonschema.ValidationError):
        validate(scaled)


def test_every_queue_has_a_deployment_there_is_one_trainer_and_it_is_replaced_only_when_it_has_ended() -> None:
    deployments = {name: each["spec"] for (kind, name), each in CORE.items() if kind == "Deployment"}
    assert set(deployments) == set(QUEUES)
    for queue, spec in deployments.items():
        assert len(spec["template"]["spec"]["containers"]) == 1
        labels = {"app": "sluice", "role": queue}
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == labels
    job = CORE["Job", "trainer"]["spec"]
    assert (job["completions"], job["parallelism"], job["podReplacementPolicy"]) == (1, 1, "Failed")
    assert CORE["StatefulSet", "redis"]["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data"


def test_replicas_are_those_of_the_config_and_ranges_are_left_to_keda() -> None:
    bounds = bounds_of(in_cluster())
    fixed = {queue: bounds[queue].min for queue in QUEUES if bounds[queue].min == bounds[queue].max}
    for queue in QUEUES:
        assert CORE["Deployment", queue]["spec"].get("replicas") == fixed.get(queue), queue
    assert set(SCALED) == {"redis", "prometheus"}
    for scaled in SCALED.values():
        assert set(scaled) == set(QUEUES) - set(fixed)
        for queue, spec in scaled.items():
            assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (bounds[queue].min, bounds[queue].max)


def test_keda_reads_the_lists_that_the_broker_uses() -> None:
    keys = Keys(CORE["ConfigMap", "sluice-run"]["data"]["SLUICE_RUN"])
    for queue, spec in SCALED["redis"].items():
        (trigger,) = spec["triggers"]
        assert trigger["metadata"]["listName"] == keys.celery_prefix + queue
    for queue, spec in SCALED["prometheus"].items():
        (trigger,) = spec["triggers"]
        assert f'{{run="{keys.run}",queue="{queue}"}}' in trigger["metadata"]["query"]


@for_each("name", PODS)
def test_pods_are_unprivileged_and_bounded(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
    for container in containers(pod):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_roles_with_a_model_get_a_gpu_and_no_other() -> None:
    with_gpu = {n for n, pod in PODS.items() if pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")}
    assert with_gpu == {"trainer", *(queue for queue in QUEUES if stage_on(queue).needs_device)}


@for_each("name", PODS)
def test_passwords_and_the_runs_key_come_from_secrets_only(name: str) -> None:
    for container in containers(PODS[name]):
        refs = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"]}
        variable, key = ("REDIS_PASSWORD", "password") if name == "redis" else ("SLUICE_REDIS_URL", "url")
        has_key = (name in QUEUES and stage_on(name).needs_weights) or container["name"] == "trainer"
        signed = {"SLUICE_RUN_KEY": {"name": "sluice-run-key", "key": "key"}} if has_key else {}
        assert refs == signed | {variable: {"name": "sluice-redis", "key": key}}


def test_pods_have_time_to_drain() -> None:
    config = in_cluster()
    least = config.autoscale.drain_s + config.lease.shutdown_grace_s + config.reward.time_limit_s
    for queue in QUEUES:
        assert PODS[queue]["terminationGracePeriodSeconds"] > least
        (worker,) = PODS[queue]["containers"]
        assert "kill -USR2 1" in worker["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert PODS["trainer"]["terminationGracePeriodSeconds"] >= 300
