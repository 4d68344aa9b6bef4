"""config/kubernetes: valid by schema, and about the queues, commands, keys and numbers that there really are. No cluster."""

from __future__ import annotations

import json
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
from sluice.common.pipeline import QUEUES, stage_on

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "config" / "kubernetes"
FILES = sorted(FOLDER.rglob("*.yaml"))
VERSION = "1.32"


def objects(path: Path) -> list[dict[str, Any]]:
    """Every object of a file, lists taken apart."""
    found = []
    for document in yaml.safe_load_all(path.read_text()):
        found += document["items"] if document["kind"] == "List" else [document]
    return found


def core() -> list[dict[str, Any]]:
    """What is applied whichever autoscaler is."""
    return [each for path in FOLDER.glob("*.yaml") for each in objects(path)]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in core() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Name -> pod spec of everything that runs."""
    kinds = ("Deployment", "StatefulSet", "Job")
    return {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in core() if each["kind"] in kinds}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def created() -> Config:
    """The config of the run that the manifests create."""
    (create,) = pods()["trainer"]["initContainers"]
    assert create["command"][:2] == ["sluice", "create"]
    path, *rest = create["command"][2:]
    assert rest[:2] == ["--name", "$(SLUICE_RUN)"]
    return load_config(ROOT / path, rest[2:])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_every_object_is_valid(path: Path) -> None:
    schema = json.loads((ROOT / "tests" / "fixtures" / "keda.schema.json").read_text())
    assert objects(path)
    for each in objects(path):
        assert each["metadata"]["namespace"] == "sluice"
        if each["apiVersion"].startswith("keda.sh/"):
            jsonschema.validate(each, schema)
        else:
            kubernetes_validate.validate(each, VERSION, strict=True)


def test_a_wrong_field_is_noticed() -> None:
    deployment = named("Deployment", "rollout") | {"spce": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)
    schema = json.loads((ROOT / "tests" / "fixtures" / "keda.schema.json").read_text())
    scaled = objects(FOLDER / "keda" / "redis.yaml")[1]
    scaled["spec"]["triggers"][0]["metadata"]["listLength"] = 1  # KEDA's metadata are strings
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled, schema)


def test_every_queue_has_one_deployment_with_its_worker() -> None:
    deployments = {each["metadata"]["name"]: each for each in core() if each["kind"] == "Deployment"}
    assert set(deployments) == set(QUEUES)
    for queue, deployment in deployments.items():
        (worker,) = deployment["spec"]["template"]["spec"]["containers"]
        assert worker["command"] == ["celery", "-A", "sluice", "worker", "-Q", queue]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"] == labels == {"app": "sluice", "role": queue}


def test_there_is_one_trainer_and_it_is_replaced_only_when_it_has_ended() -> None:
    job = named("Job", "trainer")["spec"]
    assert (job["completions"], job["parallelism"], job["podReplacementPolicy"]) == (1, 1, "Failed")
    assert pods()["trainer"]["containers"][0]["command"] == ["python", "-m", "sluice.trainer"]


def test_replicas_are_those_of_the_config_and_scaled_ones_are_left_to_keda() -> None:
    bounds = bounds_of(created())
    for queue in QUEUES:
        replicas = named("Deployment", queue)["spec"].get("replicas")
        is_fixed = bounds[queue].min == bounds[queue].max
        assert replicas == (bounds[queue].min if is_fixed else None), queue


@pytest.mark.parametrize("variant", ["redis", "prometheus"])
def test_keda_scales_every_queue_with_a_range_within_it(variant: str) -> None:
    bounds = bounds_of(created())
    scaled = [each for each in objects(FOLDER / "keda" / f"{variant}.yaml") if each["kind"] == "ScaledObject"]
    ranges = {each["spec"]["scaleTargetRef"]["name"]: each["spec"] for each in scaled}
    assert set(ranges) == {queue for queue in QUEUES if bounds[queue].min != bounds[queue].max}
    for queue, spec in ranges.items():
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (bounds[queue].min, bounds[queue].max)


def test_keda_reads_the_lists_that_the_broker_uses() -> None:
    keys = Keys(named("ConfigMap", "sluice-run")["data"]["SLUICE_RUN"])
    for each in objects(FOLDER / "keda" / "redis.yaml"):
        if each["kind"] == "ScaledObject":
            (trigger,) = each["spec"]["triggers"]
            assert trigger["metadata"]["listName"] == keys.celery_prefix + each["spec"]["scaleTargetRef"]["name"]
    for each in objects(FOLDER / "keda" / "prometheus.yaml"):
        (trigger,) = each["spec"]["triggers"]
        queue = each["spec"]["scaleTargetRef"]["name"]
        assert f'{{run="{keys.run}",queue="{queue}"}}' in trigger["metadata"]["query"]


@for_each("name", pods())
def test_pods_are_unprivileged_and_bounded(name: str) -> None:
    pod = pods()[name]
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
    with_gpu = {n for n, pod in pods().items() if pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")}
    assert with_gpu == {"trainer", *(queue for queue in QUEUES if stage_on(queue).needs_device)}


def test_passwords_and_the_runs_key_come_from_secrets_only() -> None:
    for name, pod in pods().items():
        for container in containers(pod):
            refs = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"]}
            wanted = {"REDIS_PASSWORD": "password"} if name == "redis" else {"SLUICE_REDIS_URL": "url"}
            has_key = (name in QUEUES and stage_on(name).needs_weights) or container["name"] == "trainer"
            signed = {"SLUICE_RUN_KEY": {"name": "sluice-run-key", "key": "key"}} if has_key else {}
            assert refs == signed | {key: {"name": "sluice-redis", "key": value} for key, value in wanted.items()}
    assert not any(each["kind"] == "Secret" for path in FILES for each in objects(path))


def test_pods_have_time_to_drain() -> None:
    config = created()
    least = config.autoscale.drain_s + config.lease.shutdown_grace_s + config.reward.time_limit_s
    for queue in QUEUES:
        assert pods()[queue]["terminationGracePeriodSeconds"] > least
        (worker,) = pods()[queue]["containers"]
        assert "kill -USR2 1" in worker["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert pods()["trainer"]["terminationGracePeriodSeconds"] >= 300


def test_redis_is_durable() -> None:
    (redis,) = pods()["redis"]["containers"]
    assert redis["args"][:5] == ["redis-server", "--appendonly", "yes", "--appendfsync", "everysec"]
    assert named("StatefulSet", "redis")["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
