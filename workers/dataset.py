"""The `dataset` queue: admits groups while there is credit, prepares their prompts, sends overdue stages again.

    dataset.fill             admit as many groups as there is credit for (sent by the trainer after each publication)
    dataset.prepare(group)   the task stage of an admitted group whose first holder died
    dataset.evaluate         admit the groups of requested evaluations

A tick thread does the same once a second, so that a lost message costs a second, never a group, and autoscales. Any number of
dataset workers may run: every transition is one atomic script, and one of them at a time ticks.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import defaultdict
from typing import NamedTuple

import redis
import xxhash
from celery import Celery, signals

from sluice.common.config import DatasetConfig, EvalDataset
from sluice.common.connections.broker import send_stage
from sluice.common.errors import ConfigError
from sluice.common.ledger import evaluations
from sluice.common.ledger.ledger import stored_stages
from sluice.common.models.assets import ModelAssets
from sluice.common.monitoring import autoscale
from sluice.common.monitoring.losses import forget_dropped
from sluice.common.operations.control import effective
from sluice.common.pipeline import FIRST, stage_on
from sluice.common.serialization import encode
from sluice.common.types import SamplingParams, Task
from sluice.workers.context import Context
from sluice.workers.prompt_source import LeftOut, Prompt, PromptSource, TooLong

log = logging.getLogger("sluice.dataset")

ADMIT_BATCH = 64
TICK_S = 1.0
AWAY_S = 4.0
"""A gap between two ticks that load does not explain."""
RENEWAL_S = 3.0
"""More than a heartbeat and a reconnection: an outage must not cost every running stage an attempt."""
ADMIT_BELOW = 0.85
"""Share of Redis' maxmemory over which no group is admitted."""


def prepare(app: Celery, role: str) -> Context:
    """Register the tasks of this queue."""
    context = Context.open(app, role)
    host = DatasetRole(context)
    app.task(host.fill, name="dataset.fill")
    app.task(host.prepare_one, name=stage_on(role).celery_task)
    app.task(host.evaluate, name="dataset.evaluate")
    signals.worker_ready.connect(lambda **_: host.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: host.stop(), weak=False)
    signals.worker_shutdown.connect(lambda **_: host.close(), weak=False)
    return context


class DatasetRole:
    """Prompts in, rollout messages out."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._config = context.run.config
        self._tokenizer = ModelAssets.from_wire(context.run.assets).tokenizer()
        self._source = self._open(self._config.dataset, seed=self._config.seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        context.stats = lambda: {"stopped_by": self._stopped_by}
        self._stopped_by = "starting"
        self._busy_s = 0.0
        self._ticked_at = self._reap_from = 0.0
        context.busy_s = lambda: self._busy_s

    def _open(self, dataset: DatasetConfig, *, seed: int, section: str = "dataset") -> PromptSource:
        return PromptSource(dataset, self._tokenizer, seed=seed, section=section, code_folder=self._config.code_folder)

    def start(self) -> None:
        self.context.start_heartbeat()
        threading.Thread(target=self._tick_until_stopped, name="tick", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._source.close()
        self.context.close()

    def fill(self) -> None:
        """Admit until no credit is left, by the settings in force."""
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
        """Return why nothing is admitted while Redis is nearly full: groups in flight need the rest to finish."""
        memory = self.context.client.info("memory")
        used, maxmemory = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
        if not maxmemory or used <= ADMIT_BELOW * maxmemory:
            return ""
        return f"redis_memory: {used >> 20} MiB of maxmemory {maxmemory >> 20} MiB used"

    def prepare_one(self, group_id: str) -> None:
        """Prepare the task of a group whose admitting worker died."""
        claim = self.context.ledger.claim(group_id, FIRST.name, fields=("cursor",))
        cursor = claim and claim.fields["cursor"]
        if cursor:
            with self._lock:
                self._refresh()
                self._prepare([int(cursor)])

    def _prepare(self, cursors: list[int]) -> None:
        """Read the prompts, store all tasks in one round trip, send their rollout messages."""
        started, ledger = time.monotonic(), self.context.ledger
        tasks: dict[str, bytes] = {}
        dropped = defaultdict(list)
        for cursor in cursors:
            group_id, prompt = f"t{cursor}", _prompt_or_loss(self._source, cursor)
            if isinstance(prompt, Loss):
                dropped[prompt.reason].append((group_id, prompt.detail))
            else:
                sampling = self._sampling(group_id, n=self._config.sampling.group_size)
                tasks[group_id] = _task(group_id, prompt, sampling)
        for reason, found in dropped.items():
            group_ids, details = zip(*found, strict=True)
            ledger.drop(list(group_ids), reason=reason, detail=details[-1], num_rows=self._num_rows(cursors[-1]))
        with self.context.client.pipeline(transaction=False) as pipe:
            for group_id, payload in tasks.items():
                ledger.store(group_id, FIRST.name, payload, client=pipe)
            if tasks:
                forget_dropped(pipe, ledger.keys)
            replies = pipe.execute()
        for group_id, reply in zip(tasks, replies, strict=False):
            for stage in stored_stages(reply) or ():
                send_stage(self.context.app, group_id, stage)
        self.context.num_done += len(tasks)
        self._busy_s += time.monotonic() - started

    def _num_rows(self, cursor: int) -> int:
        """Return the rows of an epoch, of a stream at most; 0 before its end was reached once."""
        epoch = self._source.epoch_of(cursor)
        return self._source.num_rows or (cursor // epoch if epoch else 0)

    def _sampling(self, group_id: str, *, n: int) -> SamplingParams:
        s, seed = self._config.sampling, xxhash.xxh3_64_intdigest(f"{self._config.seed}:{group_id}".encode()) >> 1
        drawn = s.model_dump(include={"temperature", "top_p", "top_k", "min_p", "min_tokens", "stop"})
        return SamplingParams(n=n, max_tokens=s.max_res_tokens, seed=seed, **drawn)

    def evaluate(self) -> None:
        """Admit every requested evaluation that is not admitted yet."""
        with self._lock:
            for name, version in evaluations.waiting(self.context.client, self.context.run.keys).items():
                self._admit_evaluation(name, version)

    def _admit_evaluation(self, evaluation: str, version: int) -> None:
        sets = {evaluations.evaluation_id(version, d.name): d for d in self._config.evaluation.datasets}
        if evaluation not in sets:
            log.error("evaluation %s names no configured set; dropped", evaluation)
            evaluations.discard(self.context.client, self.context.run.keys, evaluation)
            return
        dataset = sets[evaluation]
        tasks = self._evaluation_tasks(evaluation, dataset)
        ledger = self.context.ledger
        for group_id, stage in ledger.admit_eval(evaluation, dataset=dataset.name, version=version, tasks=tasks):
            send_stage(self.context.app, group_id, stage)

    def _evaluation_tasks(self, evaluation: str, dataset: EvalDataset) -> dict[str, bytes]:
        ordered, section = dataset.dataset.model_copy(update={"shuffle": False}), f"evaluation.datasets[{dataset.name}]"
        source = self._open(ordered, seed=0, section=f"{section}.dataset")
        count = min(source.num_rows or dataset.num_prompts or 0, dataset.num_prompts or 10**9)
        s = self._config.sampling
        greedy = SamplingParams(n=1, max_tokens=s.max_res_tokens, temperature=0.0, min_tokens=s.min_tokens, stop=s.stop)
        tasks = {}
        for i in range(count):
            if source.epoch_of(i) > 0:
                break  # a stream that is shorter than num_prompts
            prompt = _prompt_or_loss(source, i)
            if isinstance(prompt, Loss):
                continue
            modes = {"g": greedy}
            if dataset.num_samples:
                modes["s"] = self._sampling(f"{evaluation}.{i}", n=dataset.num_samples)
            for mode, sampling in modes.items():
                group_id = f"e{evaluation}.{i}{mode}"
                tasks[group_id] = _task(group_id, prompt, sampling)
        source.close()
        return tasks

    def _tick_until_stopped(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                if self.context.ledger.begin_tick(lasts_s=0.9 * TICK_S):
                    self._tick()
            except redis.RedisError as error:
                log.warning("tick: Redis: %s", error)
            except Exception:
                log.exception("tick failed; the next one follows in %.0f s", TICK_S)
            else:
                self._ticked_at = time.monotonic()

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked_at > AWAY_S:  # Redis or this process was unavailable: let live workers renew first
            self._reap_from = now + RENEWAL_S
        if now >= self._reap_from:
            for group_id, stage, _ in self.context.ledger.reap():
                send_stage(self.context.app, group_id, stage)
            for group_id, stage in self.context.ledger.recover():
                log.warning("group %s is continued at %s: Redis had lost what led to it", group_id, stage)
                send_stage(self.context.app, group_id, stage)
        self.fill()
        self.evaluate()
        autoscale.update(self.context.client, self.context.run)


class Loss(NamedTuple):
    """Why the group of a row is dropped."""

    reason: str
    detail: str


def _prompt_or_loss(source: PromptSource, cursor: int) -> Prompt | Loss:
    """Return the prompt, or why its group is dropped: a bad row costs that row and not the run."""
    try:
        prompt = source.prompt_at(cursor)
    except ConfigError as error:
        log.error("prompt %d cannot be used: %s", cursor, error)
        return Loss("bad_row", str(error))
    if isinstance(prompt, LeftOut):
        return Loss("left_out", f"dataset.function leaves out prompt {cursor}")
    if isinstance(prompt, TooLong):
        limit = source.max_req_tokens
        detail = f"prompt {cursor} has {prompt.num_tokens:,} tokens, over dataset.max_req_tokens = {limit:,}"
        return Loss("prompt_too_long", f"{detail}: raise it, or shorten the prompts")
    return prompt


def _task(group_id: str, prompt: Prompt, sampling: SamplingParams) -> bytes:
    """Return the result of the first stage; what a prompt holds, a task holds under the same names."""
    fields = {field.name: getattr(prompt, field.name) for field in dataclasses.fields(prompt)}
    return encode(Task(group_id=group_id, sampling=sampling, **fields).to_wire())
