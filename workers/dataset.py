"""The `dataset` queue: admits groups while there is credit, prepares their prompts, sends overdue parts again.

    dataset.fill             admit as many groups as there is credit for (sent by the trainer after each publication)
    dataset.prepare(group)   the task part of one admitted group, when its first owner died
    dataset.evaluate         admit the groups of evaluations that were asked for

A tick thread does all of this once a second as well, so that a lost message costs a second, never a group, and says how many
workers each queue should have. Any number of dataset workers may run: every step is one atomic script,
and a lock lets one of them tick at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import redis
import xxhash
from celery import Celery, signals

from sluice.common.config import EvalDataset
from sluice.common.connections.broker import send_stage
from sluice.common.errors import ConfigError
from sluice.common.ledger.evaluations import evaluation_id
from sluice.common.ledger.ledger import stored_stages
from sluice.common.models.assets import ModelAssets
from sluice.common.operations import autoscale
from sluice.common.operations.control import effective
from sluice.common.serialization import encode
from sluice.common.types import SamplingParams, Task
from sluice.workers.context import Context, CooperativePool
from sluice.workers.prompt_source import PromptSource, TooLong

log = logging.getLogger("sluice.dataset")

ADMIT_BATCH = 64
TICK_S = 1.0
AWAY_S = 4.0
"""A gap between two ticks that is no load any more."""
RENEWAL_S = 3.0
"""Over a heartbeat and a reconnection: an outage must not cost every running part an attempt."""
ADMIT_BELOW = 0.85
"""Share of Redis' maxmemory over which no group is admitted."""


def prepare(app: Celery, role: str) -> tuple[Any, int]:
    """Register the tasks of this queue; returns its pool and concurrency."""
    host = DatasetRole(Context.open(app, role))
    app.task(host.fill, name="dataset.fill")
    app.task(host.prepare_one, name="dataset.prepare")
    app.task(host.evaluate, name="dataset.evaluate")
    signals.worker_ready.connect(lambda **_: host.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: host.stop(), weak=False)
    signals.worker_shutdown.connect(lambda **_: host.close(), weak=False)
    return CooperativePool, 1


class DatasetRole:
    """Prompts in, rollout messages out."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._config = context.run.config
        self._tokenizer = ModelAssets.from_wire(context.run.assets).tokenizer()
        self._source = PromptSource(self._config.dataset, self._tokenizer, seed=self._config.seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        context.stats = lambda: {"stopped_by": self._stopped_by}
        self._stopped_by = "starting"
        self._busy_s = 0.0
        self._ticked_at = self._reap_from = 0.0
        context.busy_s = lambda: self._busy_s

    def start(self) -> None:
        self.context.start_heartbeat()
        threading.Thread(target=self._tick_until_stopped, name="tick", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._source.close()
        self.context.close()

    def fill(self) -> None:
        """Admit until there is no credit left, by the settings in force."""
        with self._lock:
            self._refresh()
            while not self._stop.is_set():
                if full := self._full_memory():
                    self._stopped_by = full
                    return
                admission = self.context.ledger.admit(ADMIT_BATCH)
                self._stopped_by = admission.stopped_by
                if not admission.cursors:
                    return
                self._prepare(admission.cursors)

    def _refresh(self) -> None:
        self._config = self.context.ledger.config = effective(self.context.client, self.context.run)

    def _full_memory(self) -> str:
        """Why nothing is admitted while Redis is nearly full: what is in flight needs the rest to finish."""
        memory = self.context.client.info("memory")
        used, most = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
        if not most or used <= ADMIT_BELOW * most:
            return ""
        return f"redis_memory: {used >> 20} MiB of maxmemory {most >> 20} MiB used"

    def prepare_one(self, group_id: str) -> None:
        """The task part of a group whose admitting worker died."""
        claim = self.context.ledger.claim(group_id, "task", fields=("cursor",))
        cursor = claim and claim.fields["cursor"]
        if cursor:
            with self._lock:
                self._refresh()
                self._prepare([int(cursor)])

    def _prepare(self, cursors: list[int]) -> None:
        """Read the prompts, store all tasks in one round trip, send their rollout messages."""
        started = time.monotonic()
        tasks, too_long, unreadable = {}, [], []
        for cursor in cursors:
            group_id = f"t{cursor}"
            try:
                prompt = self._source.prompt_at(cursor)
            except ConfigError as error:
                log.error("prompt %d cannot be used: %s", cursor, error)
                unreadable.append(group_id)
                continue
            if isinstance(prompt, TooLong):
                too_long.append(group_id)
                continue
            tasks[group_id] = encode(
                self._task(group_id, prompt, self._sampling(group_id, n=self._config.sampling.group_size)).to_wire()
            )
        self.context.ledger.drop(too_long, reason="prompt_too_long")
        self.context.ledger.drop(unreadable, reason="bad_row")
        with self.context.client.pipeline(transaction=False) as pipe:
            for group_id, payload in tasks.items():
                self.context.ledger.store(group_id, "task", payload, client=pipe)
            replies = pipe.execute()
        for group_id, reply in zip(tasks, replies, strict=True):
            for stage in stored_stages(reply) or ():
                send_stage(self.context.app, group_id, stage)
        self.context.num_done += len(tasks)
        self._busy_s += time.monotonic() - started

    def _task(self, group_id: str, prompt: Any, sampling: SamplingParams) -> Task:
        return Task(
            group_id=group_id,
            prompt_ids=prompt.prompt_ids,
            prompt=prompt.prompt,
            target=prompt.target,
            columns=prompt.columns,
            sampling=sampling,
        )

    def _sampling(self, group_id: str, *, n: int) -> SamplingParams:
        s = self._config.sampling
        return SamplingParams(
            n=n,
            max_tokens=s.max_res_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            min_tokens=s.min_tokens,
            stop=s.stop,
            seed=self._seed_of(group_id),
        )

    def _seed_of(self, group_id: str) -> int:
        return xxhash.xxh3_64_intdigest(f"{self._config.seed}:{group_id}".encode()) >> 1

    def evaluate(self) -> None:
        """Admit every evaluation that was asked for and is not admitted yet."""
        with self._lock:
            client, keys = self.context.client, self.context.run.keys
            for name, version in client.hgetall(keys("evaluations")).items():
                if not client.hexists(keys("eval", name.decode()), "total"):
                    self._admit_evaluation(name.decode(), int(version))

    def _admit_evaluation(self, evaluation: str, version: int) -> None:
        sets = {evaluation_id(version, d.name): d for d in self._config.evaluation.datasets}
        if evaluation not in sets:
            log.error("evaluation %s names no configured set; dropped", evaluation)
            self.context.client.hdel(self.context.run.keys("evaluations"), evaluation)
            return
        dataset = sets[evaluation]
        tasks = self._evaluation_tasks(evaluation, dataset)
        for group_id in self.context.ledger.admit_eval(evaluation, dataset=dataset.name, version=version, tasks=tasks):
            send_stage(self.context.app, group_id, "rollout")

    def _evaluation_tasks(self, evaluation: str, dataset: EvalDataset) -> dict[str, bytes]:
        ordered = dataset.dataset.model_copy(update={"shuffle": False})
        source = PromptSource(ordered, self._tokenizer, seed=0, section=f"evaluation.datasets[{dataset.name}].dataset")
        count = min(source.num_rows or dataset.num_prompts or 0, dataset.num_prompts or 10**9)
        drawn = self._config.sampling
        greedy = SamplingParams(
            n=1, max_tokens=drawn.max_res_tokens, temperature=0.0, min_tokens=drawn.min_tokens, stop=drawn.stop
        )
        tasks = {}
        for i in range(count):
            if source.epoch_of(i) > 0:
                break  # a stream that is shorter than num_prompts
            try:
                prompt = source.prompt_at(i)
            except ConfigError as error:  # as in training: a bad row costs that row
                log.error("prompt %d of evaluation set %s cannot be used: %s", i, dataset.name, error)
                continue
            if isinstance(prompt, TooLong):
                continue
            modes = {"g": greedy}
            if dataset.num_samples:
                modes["s"] = self._sampling(f"{evaluation}.{i}", n=dataset.num_samples)
            for mode, sampling in modes.items():
                group_id = f"e{evaluation}.{i}{mode}"
                tasks[group_id] = encode(self._task(group_id, prompt, sampling).to_wire())
        source.close()
        return tasks

    def _tick_until_stopped(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                if self.context.client.set(
                    self.context.run.keys("tick"), self.context.process, nx=True, px=int(TICK_S * 900)
                ):
                    self._tick()
            except redis.RedisError as error:
                log.warning("tick: Redis: %s", error)
            except Exception:
                log.exception("tick failed; the next one follows in %.0f s", TICK_S)
            else:
                self._ticked_at = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked_at > AWAY_S:  # Redis, or this process, was away: who lives gets time to renew its leases
            self._reap_from = now + RENEWAL_S
        if now >= self._reap_from:
            for group_id, stage, _ in self.context.ledger.reap():
                send_stage(self.context.app, group_id, stage)
        self.fill()
        self.evaluate()
        autoscale.update(self.context.client, self.context.run)
