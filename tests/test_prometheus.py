"""What Prometheus reads: the exposition against Redis, and rules and Grafana's dashboard against the exposition."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import yaml
from builders import admit_one, make_config, publish_policy, push_group
from harness import ROOT, running_sluice, sluice, wait_for
from prometheus_client.parser import text_string_to_metric_families

from sluice.common.keys import RUNS, Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.monitoring import diagnosis
from sluice.common.monitoring.autoscale import Scale
from sluice.common.monitoring.diagnosis import ALARM_KINDS, STALL_KINDS
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.monitoring.metric_stream import write_metrics
from sluice.common.run import Run, RunRecord, create_run
from sluice.dashboard.prometheus import PREFIX, exposition

ALERTS = ROOT / "config" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "config" / "grafana" / "dashboards" / "sluice.json"


@pytest.fixture
def run(client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Run]:
    """Groups at several stages, a trainer that waits, a step, a wish for more workers."""
    config = make_config(trainer={"loss": {"kl_beta": 0.0}})
    made = create_run(client, keys.run, config, assets={}, folder=str(tmp_path))
    ledger = Ledger(client, keys, config, worker="w")
    publish_policy(client, keys, 0)
    push_group(ledger)
    ledger.drop([admit_one(ledger)], reason="bad_row")
    send_heartbeat(client, keys, "trainer@h:1", {"role": "trainer", "waiting_s": 60.0, "version": 0, "step": 3})
    send_heartbeat(client, keys, "rollout@h:2", {"role": "rollout", "running": 2, "version": 0, "idle_fraction": 0.25})
    write_metrics(client, keys, {"step": 3, "time": 1.0, "reward/mean": 0.5, "off_policy/ess": 0.9}, max_length=10)
    scale = Scale(desired=3, have=1, min=1, max=4, reason="load", at=0.0, since=0.0)
    client.hset(keys.autoscale, "reward", scale.model_dump_json())
    client.lpush(keys.celery_prefix + "reward", "a", "b")
    RunRecord(client, keys).set_status("running")
    yield made
    client.hdel(RUNS, keys.run)


def series(text: bytes) -> dict[str, float]:
    """name{labels without the run's} -> value. Every series stands once."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "run")
            shown = sample.name.removeprefix(PREFIX) + (f"{{{labels}}}" if labels else "")
            assert shown not in found
            found[shown] = sample.value
    return found


def test_the_exposition_says_what_redis_holds(client: redis.Redis, keys: Keys, run: Run) -> None:
    found = series(exposition(client, [run]))
    expected = {
        "groups_admitted_total{set=train}": 2,
        "groups_dropped_total{reason=bad_row,set=train}": 1,
        "groups_in_flight{set=train}": 1,
        "ledger_holds{set=train}": 1,
        "queue_depth{queue=reward}": 2,
        "desired_replicas{queue=reward}": 3,
        "processes{role=rollout,state=live}": 1,
        "processes{role=reward,state=live}": 0,
        "idle_share{process=rollout@h:2,role=rollout}": 0.25,
        "step": 3,
        "reward_mean": 0.5,
        "run_status{status=running}": 1,
        "run_status{status=failed}": 0,
        **{f"stalled{{kind={kind}}}": float(kind == "no_workers") for kind in STALL_KINDS},
    }
    assert {name: found[name] for name in expected} == expected
    client.hincrby(keys.counts("train"), "admitted", 1)
    assert series(exposition(client, [run]))["ledger_holds{set=train}"] == 0


def test_several_runs_stand_side_by_side_and_a_deleted_one_is_left_out(
    client: redis.Redis, run: Run, tmp_path: Path
) -> None:
    gone = create_run(client, run.name + "-gone", make_config(), assets={}, folder=str(tmp_path))
    client.hdel(RUNS, gone.name)
    assert exposition(client, [run, gone]).count(b"sluice_step{") == 2
    for key in client.scan_iter(gone.keys.root + "*"):
        client.delete(key)
    assert exposition(client, [run, gone]).count(b"sluice_step{") == 1


def test_every_kind_of_cause_in_the_diagnosis_has_a_series() -> None:
    named = set()
    for folder in ("common", "trainer", "dashboard"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r'Cause\(\s*"(\w+)"', path.read_text()))
    assert len(named) > 10 and named <= {*STALL_KINDS, *ALARM_KINDS}
    documented = set(re.findall(r"^    (\w+)  ", diagnosis.__doc__ or "", re.M))
    assert documented <= set(STALL_KINDS)


def test_every_stall_and_every_alarm_has_a_rule() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    text = " ".join(rule["expr"] for rule in rules)
    assert all(f'sluice_stalled{{kind="{kind}"}}' in text for kind in STALL_KINDS)
    assert all(f'sluice_alarm{{kind="{kind}"}}' in text for kind in ALARM_KINDS)
    for rule in rules:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_rules_and_dashboard_name_only_what_is_exported(client: redis.Redis, run: Run) -> None:
    families = {f.name for f in text_string_to_metric_families(exposition(client, [run]).decode())}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [rule["expr"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]]
    named = {name for text in expressions for name in re.findall(r"sluice_\w+", text)}
    assert len(named) > 20
    assert {name.removesuffix("_total") for name in named} <= {name.removesuffix("_total") for name in families}


def test_grafana_finds_the_dashboard_and_the_source_that_it_names_and_no_panels_overlap() -> None:
    provisioning = ROOT / "config" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "sluice.yml").read_text())["providers"]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert provider["options"]["path"] in (ROOT / "docker-compose.yml").read_text()
    places = [panel["gridPos"] for panel in panels]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on PATH")
def test_promtool_accepts_rules_and_config() -> None:
    folder = ROOT / "config" / "prometheus"
    for check, name in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(["promtool", "check", check, folder / name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_prints_and_serves_the_exposition(
    redis_url: str, client: redis.Redis, keys: Keys, run: Run, tmp_path: Path
) -> None:
    printed = sluice("metrics", run.name, cwd=tmp_path, SLUICE_REDIS_URL=redis_url)
    assert printed.returncode == 0, printed.stderr
    assert f'sluice_queue_depth{{queue="reward",run="{run.name}"}} 2.0' in printed.stdout
    refused = sluice("metrics", "--listen", "9464", cwd=tmp_path, SLUICE_REDIS_URL=redis_url, SLUICE_RUN=run.name)
    assert refused.returncode == 2
    assert "give HOST:PORT" in refused.stderr
    with running_sluice("metrics", "--all", "--listen", "127.0.0.1:0", cwd=tmp_path, SLUICE_REDIS_URL=redis_url):
        log = tmp_path / "output.log"
        (url,) = wait_for(lambda: re.findall(r"http://\S+", log.read_text()), timeout=60, what="the address")
        for depth in (2, 1):
            served = urllib.request.urlopen(url, timeout=20).read().decode()
            assert f'sluice_queue_depth{{queue="reward",run="{run.name}"}} {depth}.0' in served
            client.rpop(keys.celery_prefix + "reward")
