"""docker-compose.yml: what Compose would start, checked without Docker and without a network.

Structure is checked against the part of the Compose specification that the file uses (compose-spec.io); interpolation
`${NAME:-default}` is resolved here with the defaults, as `docker compose config` would with an empty environment.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from builders import for_each

from sluice.common.config.file import load_config
from sluice.common.pipeline import QUEUES, ROLES, stage_on

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+):-(?P<default>[^}]*)\}")
TUTORIAL_REPLICAS = {"dataset": 2, "rollout": 8, "reference": 1, "reward": 16, "eval": 1}

# Keys of the Compose specification that this file may use; a misspelt key is refused by Compose, and here.
SERVICE_KEYS = {
    *("image", "build", "init", "restart", "stop_grace_period", "environment", "volumes", "depends_on"),
    *("command", "deploy", "ports", "healthcheck", "profiles"),
}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
DURATION = re.compile(r"(\d+(us|ms|s|m|h))+")


def resolved() -> dict[str, Any]:
    """The file with every default filled in and anchors merged."""
    return yaml.safe_load(VARIABLE.sub(lambda match: match["default"], COMPOSE.read_text()))


def services() -> dict[str, dict[str, Any]]:
    return resolved()["services"]


def command(name: str) -> list[str]:
    return shlex.split(services()[name].get("command", ""))


def test_only_known_top_level_and_service_keys() -> None:
    document = resolved()
    assert {key for key in document if not key.startswith("x-")} <= {"services", "volumes", "networks"}
    for name, service in document["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert isinstance(service.get("command", ""), str), name


@for_each("name", services())
def test_durations_and_restart_policies_are_valid(name: str) -> None:
    service = services()[name]
    health = service.get("healthcheck", {})
    for duration in (service.get("stop_grace_period", "1s"), health.get("interval", "1s"), health.get("timeout", "1s")):
        assert DURATION.fullmatch(duration)
    assert service["restart"] in ("no", "always", "on-failure", "unless-stopped")


@for_each("name", services())
def test_dependencies_exist_with_valid_conditions(name: str) -> None:
    for dependency, how in services()[name].get("depends_on", {}).items():
        assert dependency in services()
        assert how["condition"] in CONDITIONS


@for_each("name", services())
def test_named_volumes_are_declared_and_mounted_at_absolute_paths(name: str) -> None:
    for mount in services()[name].get("volumes", []):
        source, target = mount.removesuffix(":ro").split(":")
        assert (ROOT / source).is_dir() if source.startswith(".") else source in resolved()["volumes"]
        assert target.startswith("/")


def test_replicas_default_to_the_tutorials_numbers() -> None:
    replicas = {name: service["deploy"]["replicas"] for name, service in services().items() if "deploy" in service}
    assert replicas == TUTORIAL_REPLICAS
    assert "deploy" not in services()["trainer"]  # one trainer per run, whatever its number of ranks


def test_replicas_agree_with_the_shipped_config() -> None:
    config = load_config(ROOT / "config" / "gsm8k_qwen3_1.7b.yaml")
    assert config.replicas.model_dump() == {**TUTORIAL_REPLICAS, "trainer": 4}


def test_every_queue_has_one_service_and_every_worker_a_known_queue() -> None:
    prefix = ["celery", "-A", "sluice", "worker", "-Q"]
    workers = {name: command(name) for name in services() if command(name)[:4] == prefix[:4]}
    assert set(workers) == set(QUEUES)
    for name, line in workers.items():
        assert line == [*prefix, name]


def test_numbers_are_set_by_variables_whose_defaults_are_integers() -> None:
    defaults = {match["name"]: match["default"] for match in VARIABLE.finditer(COMPOSE.read_text())}
    numbers = {f"{queue.upper()}_REPLICAS" for queue in QUEUES} | {"REDIS_PORT", "POLICY_STORE_GIB", "SLUICE_GPU"}
    assert numbers <= set(defaults)
    assert all(defaults[name].isdecimal() for name in numbers)
    assert "${" not in VARIABLE.sub("", COMPOSE.read_text())  # none without a default


def test_run_is_created_once_before_any_worker_starts() -> None:
    assert command("create")[:5] == ["sluice", "create", "config/gsm8k_qwen3_1.7b.yaml", "--name", "gsm8k"]
    load_config(ROOT / command("create")[2], command("create")[5:])  # its overrides are valid
    assert services()["create"]["restart"] == "no"
    for name in ROLES:
        assert services()[name]["depends_on"]["create"] == {"condition": "service_completed_successfully"}
        assert services()[name]["environment"]["SLUICE_RUN"] == "gsm8k"


def test_trainer_is_the_standalone_daemon() -> None:
    assert command("trainer") == ["python", "-m", "sluice.trainer"]


def test_redis_is_durable_healthy_and_reachable_from_this_machine_only() -> None:
    redis = services()["redis"]
    assert command("redis") == ["redis-server", "--appendonly", "yes", "--appendfsync", "everysec"]
    assert redis["ports"] == ["127.0.0.1:6379:6379"]
    assert redis["healthcheck"]["test"] == ["CMD", "redis-cli", "ping"]
    for name in ("create", *QUEUES, "trainer"):
        assert services()[name]["depends_on"]["redis"] == {"condition": "service_healthy"}


def test_every_process_with_a_policy_shares_the_policy_store() -> None:
    for name in ("create", *(queue for queue in QUEUES if stage_on(queue).needs_weights), "trainer"):
        assert "policies:/policies" in services()[name]["volumes"]


def test_observability_is_a_profile_and_its_ports_are_this_machines_only() -> None:
    optional = {name: service for name, service in services().items() if service.get("profiles") == ["observability"]}
    assert set(optional) == {"dashboard", "metrics", "prometheus", "grafana", "flower"}
    assert all(port.startswith("127.0.0.1:") for service in services().values() for port in service.get("ports", []))
    scraped = yaml.safe_load((ROOT / "config" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for config in job["static_configs"] for target in config["targets"]]
    assert targets == ["metrics:9464", "flower:5555"]
    assert command("metrics")[-1] == "0.0.0.0:9464"
    assert "--port=5555" in command("flower")


def test_image_runs_as_an_unprivileged_user_who_owns_the_policy_store() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "USER sluice" in dockerfile
    assert "--uid 1000" in dockerfile
    assert "uid=1000" in resolved()["volumes"]["policies"]["driver_opts"]["o"]


def test_only_roles_that_publish_or_load_policies_have_the_runs_key() -> None:
    with_key = {name for name, service in services().items() if "SLUICE_RUN_KEY" in service.get("environment", {})}
    assert with_key == {"trainer", *(queue for queue in QUEUES if stage_on(queue).needs_weights)}
    assert all(services()[name]["environment"]["SLUICE_REDIS_URL"] for name in with_key)
