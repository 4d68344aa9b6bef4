"""The state of runs in Prometheus' text format: what `sluice status` reads, as numbers.

Every sample has the label `run`. Labels take values from small fixed sets (queue, role, reason, kind) or from the live
processes. Each kind of stall and alarm has a series that is 0 while it does not apply, so that rules can refer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import redis
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sluice.common.monitoring.diagnosis import ALARM_KINDS, STALL_KINDS
from sluice.common.monitoring.heartbeats import is_silent
from sluice.common.pipeline import ROLES
from sluice.common.run import Run
from sluice.dashboard.run_state import collect_status

PREFIX = "sluice_"
STATUSES = ("created", "running", "finished", "stopped", "drained", "failed")
STEP_METRICS = {
    "reward/mean": ("reward_mean", "Mean reward of the last step's completions."),
    "frac_reward_zero_std": ("zero_variance_share", "Share of its groups whose rewards were all equal."),
    "staleness/mean": ("policy_age_mean_steps", "Mean policy age of its groups, in optimizer steps."),
    "staleness/max": ("policy_age_max_steps", "Highest policy age of its groups, in optimizer steps."),
    "off_policy/ess": ("off_policy_ess", "Effective sample size of its importance weights, as a share of the tokens."),
    "off_policy/mismatch_kl": ("off_policy_mismatch_kl", "KL of trainer and sampler on its tokens (k3), in nats."),
    "off_policy/masked_fraction": ("off_policy_masked_share", "Share of its tokens that the correction masked."),
    "grad_norm": ("grad_norm", "Norm of its gradient before clipping."),
    "completions/mean_length": ("completion_tokens_mean", "Mean length of its completions, in tokens."),
    "throughput/trained_tokens_per_s": ("trained_tokens_per_second", "Completion tokens trained per second."),
    "throughput/generated_tokens_per_s": (
        "generated_tokens_per_second",
        "Tokens generated per second, evaluations included.",
    ),
    "time/step": ("step_seconds", "Seconds of the last step, waiting included."),
    "time/wait_for_batch": ("wait_for_batch_seconds", "Seconds of it spent waiting for a batch."),
    "time/forward_backward": ("forward_backward_seconds", "Seconds of it in forward and backward passes."),
    "time/publish": ("publish_seconds", "Seconds that its publication took, beside the next step."),
    "policy/payload_bytes": ("publish_bytes", "Bytes that its publication moved."),
    "buffer/bytes": ("buffer_bytes", "Payload bytes that groups hold in Redis."),
    "admission/credits": ("credits_held", "Groups that hold an admission credit."),
}
"""Metric of the trainer's stream -> (name, help)."""
Labelled = tuple[dict[str, str], float]


def exposition(client: redis.Redis, runs: Iterable[Run]) -> bytes:
    """Return runs in the text format 0.0.4."""
    return generate_latest(registry(client, lambda: runs))


def registry(client: redis.Redis, runs: Callable[[], Iterable[Run]]) -> CollectorRegistry:
    """Return a registry that reads the runs anew for each scrape, for prometheus_client's own server."""
    made = CollectorRegistry(auto_describe=False)
    made.register(_Scrape(client, runs))
    return made


class _Scrape(Collector):
    """One snapshot per scrape. A run that is deleted meanwhile is left out."""

    def __init__(self, client: redis.Redis, runs: Callable[[], Iterable[Run]]) -> None:
        self._client, self._runs = client, runs

    def describe(self) -> list[Metric]:
        """Return nothing, so that registration reads no run."""
        return []

    def collect(self) -> Iterator[Metric]:
        snapshots = [collect_status(self._client, run) for run in self._runs()]
        yield from _Snapshots([snapshot for snapshot in snapshots if snapshot["status"] != "?"]).collect()


class _Snapshots:
    """Snapshots of runs as metric families."""

    def __init__(self, snapshots: list[dict[str, Any]]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        yield from self._run()
        yield from self._ledger()
        yield from self._queues()
        yield from self._processes()
        for name, (short, text) in STEP_METRICS.items():
            yield self._gauge(short, text, partial(_of_last_step, name=name))

    def _run(self) -> Iterator[Metric]:
        for name, text, key, label, values in (
            ("run_status", "1 for the status of the run.", "status", "status", STATUSES),
            (
                "stalled",
                "1 for the first cause that explains why the trainer waits.",
                "stall_kind",
                "kind",
                STALL_KINDS,
            ),
            ("alarm", "Number of alarms of this kind.", "alarm_kinds", "kind", ALARM_KINDS),
        ):
            yield self._gauge(name, text, partial(_by_value, key=key, label=label, values=values), label)
        yield self._gauge("step", "Optimizer steps done.", lambda r: [({}, r["step"])])
        yield self._gauge("num_steps", "Optimizer steps of the whole run.", lambda r: [({}, r["num_steps"])])
        yield self._gauge("last_step_age_seconds", "Since the last step.", lambda r: [({}, r["age_of_last_step_s"])])
        yield self._gauge("policy_version", "Newest published version.", lambda r: [({}, r["policy"]["version"])])
        name, text = "policy_published_timestamp_seconds", "When it was published, in seconds since the epoch."
        yield self._gauge(name, text, lambda r: [({}, r["policy"]["published_at"])])

    def _ledger(self) -> Iterator[Metric]:
        for outcome in ("admitted", "trained", "scored", "retried", "resent", "refused", "reconciled"):
            text = f"Groups, as the ledger counts them: {outcome}."
            yield self._counter(f"groups_{outcome}", text, partial(_counters, outcome=outcome))
        for outcome in ("dropped", "dead"):
            text = f"Groups that were {outcome}, by reason."
            yield self._counter(f"groups_{outcome}", text, partial(_by_reason, outcome=outcome), "reason")
        for outcome, name, text in (
            ("in_flight", "groups_in_flight", "Groups admitted and not settled."),
            ("holds", "ledger_holds", "1 while admitted = trained + scored + dropped + dead + in flight."),
        ):
            yield self._gauge(name, text, partial(_counters, outcome=outcome), "set")

    def _queues(self) -> Iterator[Metric]:
        for key, name, text in (
            ("queues", "queue_depth", "Messages that wait in a queue."),
            ("oldest_age_s", "queue_oldest_age_seconds", "How long its oldest message has waited."),
            ("desired_replicas", "desired_replicas", "Workers that the load asks for, within the configured bounds."),
        ):
            yield self._gauge(name, text, partial(_by_queue, key=key), "queue")

    def _processes(self) -> Iterator[Metric]:
        yield self._gauge("processes", "Processes that send heartbeats, by role.", _num_processes, "role", "state")
        for stat, name, text in (
            ("version", "served_version", "Policy version that a worker serves, or the trainer has published."),
            ("idle_fraction", "idle_share", "Share of the last second that it was idle."),
            ("tokens_per_s", "worker_tokens_per_second", "Tokens that it generates per second."),
            ("running", "worker_running_groups", "Groups that it works on."),
        ):
            yield self._gauge(name, text, partial(_by_process, stat=stat), "process", "role")

    def _gauge(self, name: str, text: str, read: Callable[[dict[str, Any]], Iterable[Any]], *labels: str) -> Metric:
        return self._fill(GaugeMetricFamily(PREFIX + name, text, labels=("run", *labels)), read, labels)

    def _counter(self, name: str, text: str, read: Callable[[dict[str, Any]], Iterable[Any]], *labels: str) -> Metric:
        labels = ("set", *labels)
        return self._fill(CounterMetricFamily(PREFIX + name, text, labels=("run", *labels)), read, labels)

    def _fill(self, family: Any, read: Callable[[dict[str, Any]], Iterable[Any]], labels: tuple[str, ...]) -> Metric:
        for snapshot in self._snapshots:
            for values, number in read(snapshot):
                if number is not None:
                    family.add_metric([snapshot["run"], *(values[label] for label in labels)], float(number))
        return family


def _of_last_step(snapshot: dict[str, Any], name: str) -> list[tuple[dict[str, str], float | None]]:
    return [({}, snapshot["metrics"].get(name))]


def _by_value(snapshot: dict[str, Any], key: str, label: str, values: tuple[str, ...]) -> list[Labelled]:
    found = snapshot[key] if isinstance(snapshot[key], list) else [snapshot[key]]
    return [({label: value}, float(found.count(value))) for value in values]


def _by_queue(snapshot: dict[str, Any], key: str) -> list[Labelled]:
    return [({"queue": queue}, value) for queue, value in snapshot[key].items()]


def _by_reason(snapshot: dict[str, Any], outcome: str) -> list[Labelled]:
    return [
        ({"set": kind, "reason": reason}, count)
        for kind, counters in snapshot["ledger"].items()
        for reason, count in counters[outcome].items()
    ]


def _counters(snapshot: dict[str, Any], outcome: str) -> list[Labelled]:
    return [({"set": kind}, counters[outcome]) for kind, counters in snapshot["ledger"].items() if outcome in counters]


def _num_processes(snapshot: dict[str, Any]) -> Iterator[Labelled]:
    for role in ROLES:
        mine = [stats for stats in snapshot["processes"].values() if stats["role"] == role]
        num_silent = sum(is_silent(stats) for stats in mine)
        yield {"role": role, "state": "live"}, float(len(mine) - num_silent)
        yield {"role": role, "state": "silent"}, float(num_silent)


def _by_process(snapshot: dict[str, Any], stat: str) -> list[Labelled]:
    return [
        ({"process": name, "role": stats["role"]}, stats[stat])
        for name, stats in snapshot["processes"].items()
        if isinstance(stats.get(stat), int | float)
    ]
