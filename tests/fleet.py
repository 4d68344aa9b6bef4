"""A run without a trainer, for tests of its workers: real Celery processes, or the rollout role in the test's own process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
import torch
from builders import make_config, rollout_payload, task_payload
from harness import running, tiny_folder, wait_for, worker
from served import request

from sluice.common.config import Config
from sluice.common.connections.broker import make_app, send_stage
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import load_pretrained, named_weights
from sluice.common.monitoring.diagnosis import alarms
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.policies.manifest import Manifest
from sluice.common.policies.store import PolicyStore
from sluice.common.run import create_run, open_run
from sluice.common.types import Completion
from sluice.workers.context import Context
from sluice.workers.rollout import RolloutRole

LEASE_S = 2.0
ODD_WORKER = """
import os, sys, threading, time
{patch}
from celery.__main__ import main
sys.argv = ["celery", "-A", "sluice", "worker", "-Q", "{queue}"]
main()
"""


@dataclass(frozen=True)
class Fleet:
    """A run without a trainer: its groups are admitted by the test."""

    config: Config
    ledger: Ledger
    app: Any
    env: dict[str, str]
    folder: Path

    def admit(self, num_groups: int, *, until: str = "task") -> list[str]:
        """Groups with their parts stored up to `until`; messages for what follows are sent."""
        reply = self.ledger.scripts(
            "admit", num_groups, 10**9, 10**12, 10**6, 10**6, 60_000, f"test/{time.monotonic()}", "task"
        )
        group_ids = [f"t{int(cursor)}" for cursor in reply[2:]]
        for group_id in group_ids:
            following = self.ledger.store(group_id, "task", task_payload(group_id))
            if until == "rollout":
                following = self.ledger.store(group_id, "rollout", rollout_payload(), version=0)
            for stage in following or ():
                send_stage(self.app, group_id, stage)
        return group_ids

    def tick_until(self, condition: Callable[[], Any], *, timeout: float, what: str) -> Any:
        """What the dataset worker's tick does, until something is so."""

        def ticked() -> Any:
            for group_id, stage, _ in self.ledger.reap():
                send_stage(self.app, group_id, stage)
            return condition()

        return wait_for(ticked, timeout=timeout, what=what)

    def field(self, group_id: str, name: str) -> str:
        return (self.ledger.client.hget(self.ledger.keys.group(group_id), name) or b"").decode()

    def has(self, group_ids: list[str], name: str) -> bool:
        return all(self.ledger.client.hexists(self.ledger.keys.group(group_id), name) for group_id in group_ids)

    def messages(self, queue: str) -> str:
        """Name of the broker's list of a queue."""
        return self.ledger.keys.celery_prefix + queue

    @contextlib.contextmanager
    def odd(self, queue: str, *, patch: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker of a queue that behaves otherwise."""
        argv = [sys.executable, "-c", ODD_WORKER.format(patch=patch, queue=queue)]
        with running(argv, cwd=self.folder, log=self.folder / f"odd-{queue}.log", **self.env) as process:
            yield process

    @contextlib.contextmanager
    def sound(self, queue: str) -> Iterator[subprocess.Popen[bytes]]:
        with worker(queue, cwd=self.folder, **self.env) as process:
            yield process


def make_fleet(client: redis.Redis, keys: Keys, *, url: str, folder: Path, **sections: Any) -> Fleet:
    """A run with version 0 published, and short leases."""
    tiny = tiny_folder(3)
    config = make_config(
        model={"path": str(tiny / "model")},
        dataset={"path": str(tiny / "train.jsonl"), **sections.pop("dataset", {})},
        policy_store={"path": str(folder / "policies"), **sections.pop("policy_store", {})},
        **{"lease": {"running_s": LEASE_S, "queued_s": 2.0}, "rollout": {"concurrency": 4}, **sections},
    )
    create_run(client, keys.run, config, assets=read_assets(str(tiny / "model")).to_wire(), folder=str(folder))
    weights = {name: tensor.detach() for name, tensor in named_weights(load_pretrained(config.model.path)).items()}
    PolicyStore(client, keys, config.policy_store).publish(0, weights, step=0, parent=-1)
    env = {"SLUICE_REDIS_URL": url, "SLUICE_RUN": keys.run}
    return Fleet(config, Ledger(client, keys, config), make_app(keys.run, url=url), env, folder)


class ServedFleet:
    """The rollout role of a fleet in this process, as a worker runs it, and what its heartbeat says."""

    def __init__(self, fleet: Fleet) -> None:
        """Load the engine; the environment is that of the fleet."""
        self.fleet, self.client, self.keys = fleet, fleet.ledger.client, fleet.ledger.keys
        self.store = PolicyStore(self.client, self.keys, fleet.config.policy_store)
        self.role = RolloutRole(Context.open(fleet.app, "rollout"))
        self.engine: Any = self.role.engine

    @property
    def heartbeat(self) -> dict[str, Any]:
        return read_heartbeats(self.client, self.keys).get(self.role.context.process, {})

    def until(self, condition: Callable[[dict[str, Any]], Any], what: str) -> None:
        wait_for(lambda: condition(self.heartbeat), timeout=15, what=what)

    def until_serves(self, version: int) -> None:
        """Wait until the heartbeat names the version, its digest and no alarm."""
        manifest = self.store.manifest(version)
        self.until(
            lambda beat: (
                beat.get("version") == version and manifest.digest.startswith(beat["digest"]) and not beat["alarm"]
            ),
            f"version {version} to be served",
        )

    def until_alarm(self, text: str) -> None:
        self.until(lambda beat: beat.get("alarm"), "an alarm in the heartbeat")
        assert self.heartbeat["alarm"].startswith(text)

    def alarm_kinds(self) -> list[str]:
        """Kinds of what `sluice status` warns of."""
        return [alarm.kind for alarm in alarms(self.client, open_run(self.client, self.keys.run))]

    def publish(self, version: int, tensors: dict[str, torch.Tensor] | None = None, **more: Any) -> Manifest:
        """Publish a version; by default one near the base."""
        if tensors is None:
            tensors = {name: tensor + 0.001 * version for name, tensor in self.store.fetch(0)[1].items()}
        return self.store.publish(version, tensors, step=version, parent=version - 1, **more)

    def generate(self, **asked: Any) -> list[Completion]:
        return self.engine.generate(request([5, 6, 7], **{"n": 1, "max_tokens": 2, **asked}))

    def versions(self, **asked: Any) -> set[int]:
        """Versions that generate a group now."""
        return {version for completion in self.generate(**asked) for version, _ in completion.policy_versions}
