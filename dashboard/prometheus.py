"""The state of runs in Prometheus' text format: what `sluice status` reads, as numbers.

Every sample has the label `run`. Labels take values from small fixed sets (queue, role, reason, kind) or from the live
processes. Each kind of stall and alarm has a series that is 0 while it does not apply, so that rules can refer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
Read = Callable[[dict[str, Any]], Iterable[tuple[tuple[str, ...], float | None]]]
"""A run's snapshot -> (values of the family's labels, number); none = no sample."""


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
        for family, read in _families():
            for snapshot in snapshots:
                for labels, number in read(snapshot) if snapshot["status"] != "?" else ():
                    if number is not None:
                        family.add_metric([snapshot["run"], *labels], float(number))
            yield family


def _families() -> Iterator[tuple[Any, Read]]:
    """Yield every family, without samples, and what reads them."""
    for outcome in ("admitted", "trained", "scored", "retried", "interrupted", "resent", "refused", "reconciled"):
        text = f"Groups, as the ledger counts them: {outcome}."
        yield _family(CounterMetricFamily, f"groups_{outcome}", text, "set"), _counters(outcome)
    for outcome in ("dropped", "dead"):
        text = f"Groups that were {outcome}, by reason."
        yield _family(CounterMetricFamily, f"groups_{outcome}", text, "set", "reason"), _by_reason(outcome)
    for name, text, labels, read in _GAUGES:
        yield _family(GaugeMetricFamily, name, text, *labels), read
    for metric, (name, text) in STEP_METRICS.items():
        yield _family(GaugeMetricFamily, name, text), _value("metrics", metric)


def _family(kind: type[Metric], name: str, text: str, *labels: str) -> Metric:
    return kind(PREFIX + name, text, labels=("run", *labels))  # type: ignore[call-arg]


def _value(key: str, part: str | None = None) -> Read:
    return lambda snapshot: [((), snapshot[key] if part is None else snapshot[key].get(part))]


def _one_of(key: str, kinds: tuple[str, ...]) -> Read:
    """Return how often each kind is there."""

    def read(snapshot: dict[str, Any]) -> list[tuple[tuple[str, ...], float]]:
        found = snapshot[key] if isinstance(snapshot[key], list) else [snapshot[key]]
        return [((kind,), found.count(kind)) for kind in kinds]

    return read


def _by_queue(key: str) -> Read:
    return lambda snapshot: [((queue,), value) for queue, value in snapshot[key].items()]


def _counters(outcome: str) -> Read:
    return lambda snapshot: [((kind,), counters.get(outcome)) for kind, counters in snapshot["ledger"].items()]


def _by_reason(outcome: str) -> Read:
    return lambda snapshot: [
        ((kind, reason), count)
        for kind, counters in snapshot["ledger"].items()
        for reason, count in counters[outcome].items()
    ]


def _num_processes(snapshot: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for role in ROLES:
        silent = [is_silent(stats) for stats in snapshot["processes"].values() if stats["role"] == role]
        yield (role, "live"), silent.count(False)
        yield (role, "silent"), silent.count(True)


def _by_process(stat: str) -> Read:
    return lambda snapshot: [
        ((name, stats["role"]), stats[stat])
        for name, stats in snapshot["processes"].items()
        if isinstance(stats.get(stat), int | float)
    ]


_GAUGES: list[tuple[str, str, tuple[str, ...], Read]] = [
    ("run_status", "1 for the status of the run.", ("status",), _one_of("status", STATUSES)),
    ("stalled", "1 for the first cause that explains why the trainer waits.", ("kind",), _one_of("stall_kind", STALL_KINDS)),
    ("alarm", "Number of alarms of this kind.", ("kind",), _one_of("alarm_kinds", ALARM_KINDS)),
    ("step", "Optimizer steps done.", (), _value("step")),
    ("num_steps", "Optimizer steps of the whole run.", (), _value("num_steps")),
    ("last_step_age_seconds", "Since the last step.", (), _value("age_of_last_step_s")),
    ("policy_version", "Newest published version.", (), _value("policy", "version")),
    ("policy_published_timestamp_seconds", "When it was published, in seconds since the epoch.",
     (), _value("policy", "published_at")),
    ("groups_in_flight", "Groups admitted and not settled.", ("set",), _counters("in_flight")),
    ("ledger_holds", "1 while admitted = trained + scored + dropped + dead + in flight.", ("set",), _counters("holds")),
    ("queue_depth", "Messages that wait in a queue.", ("queue",), _by_queue("queues")),
    ("queue_oldest_age_seconds", "How long its oldest message has waited.", ("queue",), _by_queue("oldest_age_s")),
    ("desired_replicas", "Workers that the load asks for, within the configured bounds.",
     ("queue",), _by_queue("desired_replicas")),
    ("processes", "Processes that send heartbeats, by role.", ("role", "state"), _num_processes),
    ("served_version", "Policy version that a worker serves, or the trainer has published.",
     ("process", "role"), _by_process("version")),
    ("idle_share", "Share of the last second that it was idle.", ("process", "role"), _by_process("idle_fraction")),
    ("worker_tokens_per_second", "Tokens that it generates per second.",
     ("process", "role"), _by_process("tokens_per_s")),
    ("worker_running_groups", "Groups that it works on.", ("process", "role"), _by_process("running")),
]  # fmt: skip
"""(name, help, labels besides `run`, what reads them)."""
