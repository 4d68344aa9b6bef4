"""The first cause that explains why the trainer has no batch, and what is wrong without a stall.

Read from heartbeats, queues, the ledger and Redis' INFO, so that `sluice status`, the trainer's log and the dashboard agree.
Kinds of cause, in the order in which they are looked for:

    paused              an operator has paused the run
    starting            a trainer is loading (for callers that are not the trainer, as the next two)
    no_trainer          no trainer is running
    silent_trainer      it sends no heartbeats
    redis_unreachable   the data server, or the broker, does not answer
    redis_full          at maxmemory, or its append-only file cannot be written
    losing_groups       groups are lost one after the other, and none is completed (common/monitoring/losses.py)
    no_workers          no worker serves a queue that the run needs
    silent_worker       a process on such a queue sends no heartbeats
    alarm               an alarm in a heartbeat: disk full, policy not verified
    not_picked_up       no rollout worker serves the published policy
    admission           no group is in flight
    stale_drops         groups were dropped as too old since the last step
    zero_variance       a batch's worth of groups was dropped for zero reward variance since the last step
    queue_backed_up     half of the groups in flight wait in one queue
    working             none of these: groups are being worked on

Alarms without a stall, besides: losing_groups (half of the newest groups were lost), digest_mismatch (a worker serves other
bytes than the manifest names), sampler_mismatch (its logprobs differ from the trainer's), rejected_messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis

from sluice.common.errors import ConnectionFailed, SerializationError
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.heartbeats import is_readable, is_silent, read_heartbeats
from sluice.common.monitoring.losses import read_losses
from sluice.common.monitoring.metric_stream import last_metrics
from sluice.common.monitoring.queues import Queue, broker_client, read_queues
from sluice.common.operations.control import describe_paused
from sluice.common.pipeline import stages_for
from sluice.common.policies.canary import is_adapter_missing, mismatch_bound
from sluice.common.policies.lineage import read_pointer
from sluice.common.policies.signing import unsigned_bytes
from sluice.common.run import Run, RunRecord
from sluice.common.serialization import decode

STALL_KINDS = (
    "paused", "starting", "no_trainer", "silent_trainer", "redis_unreachable", "redis_full", "losing_groups", "no_workers",
    "silent_worker", "alarm", "not_picked_up", "admission", "stale_drops", "zero_variance", "queue_backed_up", "working",
)  # fmt: skip
ALARM_KINDS = (
    "silent_worker", "alarm", "not_picked_up", "digest_mismatch", "sampler_mismatch", "redis_full", "rejected_messages",
    "redis_unreachable", "losing_groups",
)  # fmt: skip
STALLED_AFTER_S = 5.0
"""A trainer that has waited for this long is stalled."""
_NEARLY_FULL = 0.9
_FULL = 0.99
"""At the limit memory fluctuates just below it: a refused command frees its buffers again."""
_COMPARED = {"mismatch": "the trainer's on the canary", "cache_mismatch": "its own fresh forward pass"}
"""Key of a heartbeat's stats -> what it is compared with."""
Heartbeats = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a run is stalled, or what is wrong with it."""

    kind: str
    text: str


def diagnose(client: redis.Redis, run: Run) -> Cause:
    """Return the first cause that explains a stall. `client` should fail quickly: what it raises is a cause too."""
    try:
        return _first_cause(client, run)
    except (redis.ConnectionError, redis.TimeoutError, ConnectionFailed) as error:
        return _unreachable(error)


def stall_cause(client: redis.Redis, run: Run, heartbeats: Heartbeats) -> Cause | None:
    """Return why no step is made, for a process that is not the trainer; None where one is being made."""
    if cause := _held_up(client, run, heartbeats):
        return cause
    waiting_s = max(stats.get("waiting_s", 0.0) for stats in heartbeats.values() if stats["role"] == "trainer")
    return diagnose(client, run) if waiting_s > STALLED_AFTER_S else None


def explain(client: redis.Redis, run: Run) -> Cause:
    """Return why there is no step yet, for a process that is not the trainer: a stall, or what the trainer does meanwhile."""
    try:
        heartbeats = read_heartbeats(client, run.keys)
        cause = _held_up(client, run, heartbeats)
    except (redis.ConnectionError, redis.TimeoutError) as error:
        return _unreachable(error)
    is_waiting = any(stats.get("waiting_s") for stats in heartbeats.values() if stats["role"] == "trainer")
    return cause or (diagnose(client, run) if is_waiting else Cause("working", "the trainer is training on a batch"))


def _held_up(client: redis.Redis, run: Run, heartbeats: Heartbeats) -> Cause | None:
    """Return what keeps the trainer from asking for a batch at all."""
    if held := _paused(client, run):
        return held
    trainer = next((stats for stats in heartbeats.values() if stats["role"] == "trainer"), None)
    if trainer and is_silent(trainer):
        text = f"the trainer has been silent for {trainer['silent_s']:.0f} s: dead, stopped or cut off"
        return Cause("silent_trainer", text)
    doing = trainer and trainer.get("doing")
    if doing or (trainer is None and RunRecord(client, run.keys).status == "created"):
        needed = [*(stage.queue for stage in stages_for(run.config)), "trainer"]
        loading = [role for role in needed if role not in {stats["role"] for stats in heartbeats.values()}]
        parts = [f"loading: {', '.join(loading)}"] if loading else []
        return Cause("starting", "; ".join([*parts, *([f"the trainer is {doing}"] if doing else [])]))
    return None if trainer else Cause("no_trainer", "no trainer is running")


def alarms(client: redis.Redis, run: Run) -> list[Cause]:
    """Return what is wrong, whether or not training stalls."""
    try:
        heartbeats = read_heartbeats(client, run.keys)
        found = _silent(heartbeats) + _reported(heartbeats) + _not_picked_up(client, run, heartbeats)
        found += _other_digests(client, run, heartbeats) + _mismatched(run, heartbeats)
        found += _memory(client, over=_NEARLY_FULL) + _losing(read_losses(client, run).alarm(run.config))
        if rejected := broker_client(client).llen(run.keys.rejected):
            found.append(Cause("rejected_messages", f"{rejected} broker messages could not be read and were set aside"))
    except (redis.ConnectionError, redis.TimeoutError, ConnectionFailed) as error:
        return [_unreachable(error)]
    return found


def _unreachable(error: Exception) -> Cause:
    return Cause("redis_unreachable", f"Redis cannot be reached: {error}")


def _first_cause(client: redis.Redis, run: Run) -> Cause:
    needed = tuple(stage.queue for stage in stages_for(run.config))
    if held := _paused(client, run):
        return held
    heartbeats = {name: stats for name, stats in read_heartbeats(client, run.keys).items() if is_readable(stats)}
    queues = read_queues(client, run, needed)
    serving = {stats["role"] for stats in heartbeats.values()}
    on_path = {name: stats for name, stats in heartbeats.items() if stats["role"] in (*needed, "trainer")}
    idle = [queue for queue in needed if queue not in serving]
    causes = _memory(client, over=_FULL) + _losing(read_losses(client, run).stall(run.config))
    causes += [Cause("no_workers", f"0 workers on `{queue}`, {_waiting(queues[queue])}") for queue in idle]
    causes += _silent(on_path) + _reported(on_path) + _not_picked_up(client, run, heartbeats)
    return causes[0] if causes else _from_flow(client, run, heartbeats, queues)


def _paused(client: redis.Redis, run: Run) -> Cause | None:
    paused, _ = RunRecord(client, run.keys).held()
    return Cause("paused", describe_paused(paused)) if paused else None


def _losing(text: str | None) -> list[Cause]:
    return [Cause("losing_groups", text)] if text else []


def _memory(client: redis.Redis, *, over: float) -> list[Cause]:
    info = client.info("memory") | client.info("persistence")
    used, maxmemory = int(info["used_memory"]), int(info.get("maxmemory", 0))
    found = []
    if maxmemory and used >= over * maxmemory:
        text = f"Redis is full: {used >> 20} MiB of maxmemory {maxmemory >> 20} MiB used"
        found.append(Cause("redis_full", text if used >= _FULL * maxmemory else text.replace("full", "nearly full")))
    if info.get("aof_last_write_status", "ok") != "ok":
        text = "Redis cannot write its append-only file (its disk is full?) and refuses writes"
        found.append(Cause("redis_full", text))
    return found


def _silent(heartbeats: Heartbeats) -> list[Cause]:
    return [
        Cause("silent_worker", f"{name} has been silent for {stats['silent_s']:.0f} s: dead, stopped or cut off")
        for name, stats in heartbeats.items()
        if is_silent(stats)
    ]


def _reported(heartbeats: Heartbeats) -> list[Cause]:
    return [Cause("alarm", f"{name}: {stats['alarm']}") for name, stats in heartbeats.items() if stats.get("alarm")]


def _not_picked_up(client: redis.Redis, run: Run, heartbeats: Heartbeats) -> list[Cause]:
    """Check that a live rollout worker serves the newest policy, or that it was published recently."""
    pointer = read_pointer(client, run.keys)
    if "unreadable" in pointer:
        return [Cause("alarm", f"the policy pointer in Redis cannot be read: {pointer['unreadable']}")]
    if not {"version", "published_at"} <= pointer.keys():
        return []
    version = int(pointer["version"])
    seconds, microseconds = client.time()
    out_s = seconds + microseconds / 1e6 - float(pointer["published_at"])
    live = [s for s in heartbeats.values() if s["role"] == "rollout" and not is_silent(s)]
    served = [stats["version"] for stats in live if "version" in stats]
    if out_s <= run.config.policy_store.pickup_alarm_s or max(served, default=-1) >= version:
        return []
    serving = f"the newest that one serves is {max(served)}" if served else "none is there"
    text = f"no rollout worker has picked up policy version {version}, published {out_s:.0f} s ago: {serving}"
    return [Cause("not_picked_up", text)]


def _other_digests(client: redis.Redis, run: Run, heartbeats: Heartbeats) -> list[Cause]:
    """Check that workers serve the weights that the manifest of their version names."""
    found = []
    for name, stats in heartbeats.items():
        if not stats.get("digest") or "version" not in stats:
            continue
        wire = client.hget(run.keys.manifests, str(stats["version"]))
        if wire is None:
            continue
        try:
            published = str(decode(unsigned_bytes(wire))["digest"])
        except (SerializationError, LookupError, TypeError) as error:
            text = f"the manifest of policy version {stats['version']} in Redis cannot be read: {error}"
            found.append(Cause("alarm", text[:300]))
            continue
        if not published.startswith(stats["digest"]):
            text = (
                f"{name} serves policy version {stats['version']} with digest {stats['digest']}, not the published one"
            )
            found.append(Cause("digest_mismatch", text))
    return found


def _mismatched(run: Run, heartbeats: Heartbeats) -> list[Cause]:
    """Check that the logprobs of each engine agree with the trainer's and with those it sampled."""
    bound = mismatch_bound(run.config.rollout.dtype, run.config.trainer.autocast)
    found = [
        Cause(
            "sampler_mismatch",
            f"{name} serves policy version {stats.get('version', '?')}, but its logprobs are {stats[key]:.3g} nats from {what} "
            f"(bound {bound:g}): it samples from another policy",
        )
        for name, stats in heartbeats.items()
        for key, what in _COMPARED.items()
        if (stats.get(key) or 0.0) > bound
    ]
    for name, stats in heartbeats.items():
        if stats.get("adapter_share") and is_adapter_missing(*stats["adapter_share"]):
            share, error = stats["adapter_share"]
            text = (
                f"{name} serves policy version {stats.get('version', '?')}, but on the canary it shows {share:.2f} +- "
                f"{error:.2f} of the LoRA adapter's effect: it samples from the base, or {run.config.rollout.dtype} rounds the "
                "adapter away"
            )
            found.append(Cause("sampler_mismatch", text))
    return found


def _waiting(queue: Queue) -> str:
    """Return how many messages wait, and for how long if over a second."""
    text = f"{queue.depth} messages queued"
    return f"{text}, the oldest for {queue.oldest_age_s:.0f} s" if queue.oldest_age_s >= 1 else text


def _from_flow(client: redis.Redis, run: Run, heartbeats: Heartbeats, queues: dict[str, Queue]) -> Cause:
    """Find the cause in where the groups are: every process is running."""
    counters = read_counters(client, run.keys)
    if counters.in_flight == 0:
        stopped = {stats.get("stopped_by", "?") for stats in heartbeats.values() if stats["role"] == "dataset"}
        return Cause("admission", f"no group is in flight; admission stopped by {', '.join(sorted(stopped))}")
    last = last_metrics(client, run.keys)
    stale = counters.dropped.get("stale", 0) - int(last.get("staleness/dropped", 0))
    if stale > 0:
        text = f"{stale} groups were dropped as stale since step {int(last.get('step', 0))}; "
        return Cause("stale_drops", text + f"{counters.in_flight} in flight")
    filtered = counters.dropped.get("zero_variance", 0) - int(last.get("filter/dropped", 0))
    if filtered >= run.config.groups_per_step:
        left = max(0, run.config.max_filtered - int(client.get(run.keys.filtered) or 0))
        text = f"{filtered} groups were dropped for equal rewards since step {int(last.get('step', 0))}; "
        return Cause("zero_variance", text + f"{left} more may be, then they are kept; {counters.in_flight} in flight")
    running = {queue: sum(f.get("running", 0) for f in heartbeats.values() if f["role"] == queue) for queue in queues}
    busy = ", ".join(f"{count} on {queue}" for queue, count in running.items() if count) or "none"
    deepest = max(queues, key=lambda queue: queues[queue].depth)
    if 2 * queues[deepest].depth >= counters.in_flight:
        workers = sum(stats["role"] == deepest for stats in heartbeats.values())
        text = f"queue `{deepest}` is backed up: {_waiting(queues[deepest])} for {workers} workers"
        return Cause("queue_backed_up", f"{text}; {counters.in_flight} groups in flight, being worked on: {busy}")
    queued = f"; longest queue: {queues[deepest].depth} on `{deepest}`" if queues[deepest].depth else ""
    if "redis_memory" in (held := " ".join(str(f.get("stopped_by", "")) for f in heartbeats.values())):
        queued += f"; admission stopped by {held.strip()}"
    return Cause("working", f"{counters.in_flight} groups in flight, being worked on: {busy}{queued}")
