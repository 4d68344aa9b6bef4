"""What the pipeline itself costs: groups per second with an engine and a trainer of zero cost (SYNTHETIC).

    python benchmarks/pipeline.py [--groups 1500] [--rounds 3]

throughput   real Redis (append-only); dataset, rollout and reward workers (a process each), Celery, ledger and buffer; groups of
             8 completions of 512 tokens. The engine returns completions made beforehand; the trainer takes batches, moves the
             pointer and acknowledges. Beside it, in turn: (a) bare Celery, as many no-op tasks on the same queues, pools and
             broker settings; (b) bare Redis, one client that moves the same bytes, one round trip per step
backlog      cost per group of every step of the ledger while 10^2 .. 10^5 small groups wait in the buffer and in the queue
workers      1 .. 64 rollout workers, one in four three times slower, latency simulated by sleeping: makespan against the ideal,
             total work / total speed
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import psutil

from benchmarks.shared.processes import environment, until
from benchmarks.shared.report import new_parser, parse, publish
from sluice.common.config import Config
from sluice.common.connections.broker import make_app, send, send_stage
from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.replay_buffer import ReplayBuffer
from sluice.common.ledger.scripts import Scripts
from sluice.common.paths import with_absolute_paths
from sluice.common.run import create_run
from sluice.common.serialization import encode
from sluice.scripts.launcher.preflight import preflight
from sluice.scripts.launcher.redis_server import start_server
from sluice.scripts.prepare_tiny import prepare
from tests.builders import (
    file_groups,
    make_config,
    publish_policy,
    random_completions,
    reward_payload,
    rollout_payload,
    task_payload,
)

GROUP_SIZE, TOKENS, BATCH = 8, 512, 16
SLOWER, LATENCY_S, FLEET_TOKENS = 3.0, 1.0, 4


@contextlib.contextmanager
def workers(
    folder: Path, url: str, run: str, plan: list[tuple[str, float]], *, app: str = "benchmarks.shared.pipeline_worker"
) -> Iterator[list[Any]]:
    """Celery workers: (queue, latency) each; when the block ends they are killed."""
    env = environment(SLUICE_REDIS_URL=url, SLUICE_RUN=run)
    started = []
    try:
        for i, (queue, latency_s) in enumerate(plan):
            argv = [sys.executable, "-m", "celery", "-A", app, "worker", "-Q", queue, "--loglevel", "INFO"]
            argv += ["-P", "prefork" if queue == "reward" else "threads", "-c", "1"] if app.endswith("noop") else []
            with (folder / f"{queue}-{i}.log").open("wb") as log:
                here = {
                    **env,
                    "BENCH_LATENCY_S": str(latency_s),
                    "BENCH_TOKENS": str(FLEET_TOKENS if latency_s else TOKENS),
                }
                started.append(psutil.Popen(argv, env=here, cwd=folder, stdout=log, stderr=log))
        for log_file in [folder / f"{queue}-{i}.log" for i, (queue, _) in enumerate(plan)]:
            try:
                until(lambda log_file=log_file: b" ready." in log_file.read_bytes(), log_file.stem, timeout_s=180)
            except SystemExit:
                print(log_file.read_text())
                raise
        yield started
    finally:
        family = [child for process in started for child in process.children(recursive=True)] + started
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in started:
            process.wait(10)


def cpu_of(process: Any) -> float:
    """CPU seconds of a process so far, with its children (but for this process's own, which are the others)."""
    children = [] if process.pid == os.getpid() else process.children(recursive=True)
    times = [p.cpu_times() for p in [process, *children]]
    return sum(t.user + t.system for t in times)


def job(folder: Path, tiny: Path, **sections: Any) -> Config:
    (folder / "ones.py").write_text("def ones(prompts, completions, **kwargs):\n    return [1.0] * len(completions)\n")
    return with_absolute_paths(
        make_config(
            model={"path": str(tiny / "model")},
            dataset={"path": str(tiny / "train.jsonl"), "max_req_tokens": 24},
            sampling={"group_size": GROUP_SIZE, "max_res_tokens": TOKENS},
            reward={"functions": [{"function": f"{folder / 'ones.py'}:ones"}]},
            trainer={"seq_len": 1024, "num_steps": 1_000_000, "loss": {"kl_beta": 0.0}},
            replay_buffer={"batch_size": BATCH, "max_policy_age": 7, "max_bytes": 10**12},
            output_dir=str(folder / "runs"),
            **sections,
        )
    )


def pipeline_round(
    folder: Path, url: str, tiny: Path, *, groups: int, name: str, server: Any
) -> tuple[float, dict[str, float]]:
    """Return groups per second through every step, and CPU ms per group of each process."""
    config, client, keys = job(folder, tiny), connect(url), Keys(name)
    create_run(client, name, config, assets=preflight(config), folder=str(folder))
    publish_policy(client, keys, 0)
    app, scripts, ledger = make_app(name, url=url), Scripts(client, keys), Ledger(client, keys, config)
    buffer = ReplayBuffer(ledger, groups_per_step=BATCH, max_policy_age=7)
    with workers(folder, url, name, [("dataset", 0.0), ("rollout", 0.0), ("reward", 0.0)]) as started:
        step, trained, version, began = 0, 0, 0, 0.0
        before: list[float] = []
        warm = max(BATCH * 8, groups // 10)
        send(app, "dataset.fill", "dataset")
        while trained < warm + groups:
            sample = buffer.sample(version, step=step + 1)
            if sample.groups is None:
                buffer.wait(1.0)
                continue
            step, version = step + 1, version + 1
            trained += len(sample.groups)
            scripts("publish", version, version - 1, step, 1, f"digest-{version}", 0)
            send(app, "dataset.fill", "dataset")
            if step % 4 == 0:
                buffer.acknowledge(step)
            if trained >= warm and not began:
                began, counted = time.monotonic(), trained
                before = [cpu_of(process) for process in [*started, server, psutil.Process()]]
        took = time.monotonic() - began
        after = [cpu_of(process) for process in [*started, server, psutil.Process()]]
    buffer.acknowledge(step)
    counters = ledger.counters()
    assert counters.holds and not counters.dead and not counters.retried, counters
    done = trained - counted
    names = ("dataset", "rollout", "reward", "redis", "trainer")
    cpu_ms = {n: round(1000 * (b - a) / done, 2) for n, a, b in zip(names, before, after, strict=True)}
    client.close()
    return done / took, cpu_ms


def noop_round(folder: Path, url: str, *, groups: int, name: str) -> float:
    """Return groups per second of as many tasks that do nothing: two tasks make one group."""
    app, client, keys = make_app(name, url=url), connect(url), Keys(name)
    queues = [keys.celery_prefix + queue for queue in ("rollout", "reward")]
    with workers(folder, url, name, [("rollout", 0.0), ("reward", 0.0)], app="benchmarks.shared.pipeline_worker:noop"):
        began = time.monotonic()
        for group in range(groups):  # one client sends, as one dataset worker and one rollout worker do
            for stage in ("rollout", "reward"):
                send_stage(app, f"t{group}", stage)
        until(
            lambda: not any(client.llen(q) for q in queues) and not client.hlen(keys.celery_prefix + "unacked"),
            "the no-ops",
        )
        took = time.monotonic() - began
    client.close()
    return groups / took


def bytes_round(url: str, *, groups: int) -> tuple[float, int]:
    """One client: task and rollout in, rollout out for the reward, score in, everything out for the trainer, gone."""
    client = connect(url)
    task, scores = task_payload("t0", group_size=GROUP_SIZE), reward_payload(rewards=(1.0,) * GROUP_SIZE)
    rollout = encode({"completions": random_completions(GROUP_SIZE, TOKENS), "worker": "w"})
    began = time.monotonic()
    for i in range(groups):
        key = f"bare:{i}"
        client.hset(key, "task", task)
        client.hset(key, "rollout", rollout)
        client.hmget(key, ["task", "rollout"])
        client.hset(key, "reward", scores)
        client.hmget(key, ["task", "rollout", "reward"])
        client.unlink(key)
    took = time.monotonic() - began
    client.close()
    return groups / took, 3 * len(task) + 3 * len(rollout) + 2 * len(scores)


class Stopwatch:
    """Milliseconds of each named step."""

    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = work(*args, **kwargs)
        self.ms.setdefault(name, []).append(1000 * (time.perf_counter() - began))
        return result


def backlog(url: str, size: int, *, repeats: int, rounds: int) -> dict[str, Any]:
    """ms per group of each step while `size` small groups (2 x 3 tokens) wait in the buffer, and `size` messages in the queue."""
    client, keys = connect(url), Keys(f"backlog-{size}")
    client.hset(keys.run_record, "status", "running")
    publish_policy(client, keys, 0)
    ledger = Ledger(client, keys, make_config(replay_buffer={"batch_size": BATCH, "max_bytes": 10**12}))
    app, buffer = make_app(keys.run, url=url), ReplayBuffer(ledger, groups_per_step=BATCH, max_policy_age=1)
    held_before = client.info("memory")["used_memory"]
    for start in range(0, size, 1000):
        file_groups(ledger, [0] * min(1000, size - start))
    bytes_per_group = (client.info("memory")["used_memory"] - held_before) / size
    with client.pipeline(transaction=False) as pipe:
        for _ in range(size):
            pipe.lpush(keys.celery_prefix + "rollout", b"x" * 700)  # as long as a message
        pipe.execute()
    timed = Stopwatch()
    for step in range(1, rounds + 1):
        for _ in range(repeats):
            reply = timed("admit", ledger.scripts, "admit", 1, 10**9, 10**12, 10**9, 10**6, 60_000, "b/1", "task")
            group = f"t{int(reply[2])}"
            timed("store task", ledger.store, group, "task", task_payload(group))
            timed("send", send_stage, app, group, "rollout")
            timed("claim", ledger.claim, group, "rollout", fields=("task",))
            timed("store rollout", ledger.store, group, "rollout", rollout_payload(), version=0)
            timed("store reward", ledger.store, group, "reward", reward_payload())
        assert timed("sample 16", buffer.sample, 0, step=step).groups
        timed("acknowledge 16", buffer.acknowledge, step)
    assert ledger.counters().holds
    client.flushdb()
    client.close()
    per_group = {name: median(values) / (16 if name.endswith("16") else 1) for name, values in timed.ms.items()}
    return {
        "total_ms_per_group": round(sum(per_group.values()), 3),
        "steps_ms": {name: round(value, 3) for name, value in per_group.items()},
        "redis_bytes_per_group": round(bytes_per_group),
    }


def fleet(folder: Path, url: str, tiny: Path, *, count: int, per_worker: int) -> dict[str, Any]:
    """Makespan of `count` workers, one in four slower, over the ideal. Latency is SIMULATED."""
    name, num_groups = f"fleet-{count}", count * per_worker
    config = job(folder, tiny, rollout={"concurrency": 1}, lease={"queued_s": 600.0, "running_s": 60.0})
    client, keys = connect(url), Keys(name)
    create_run(client, name, config, assets=preflight(config), folder=str(folder))
    publish_policy(client, keys, 0)
    ledger, app = Ledger(client, keys, config), make_app(name, url=url)
    plan = [("rollout", LATENCY_S * (SLOWER if i % 4 == 3 else 1.0)) for i in range(count)]
    with workers(folder, url, name, plan):
        reply = ledger.scripts("admit", num_groups, 10**9, 10**12, 10**9, 10**6, 600_000, "b/1", "task")
        groups = [f"t{int(cursor)}" for cursor in reply[2:]]
        for group in groups:
            ledger.store(group, "task", task_payload(group, group_size=GROUP_SIZE))
        began = time.monotonic()
        for group in groups:
            send_stage(app, group, "rollout")
        tokens = num_groups * GROUP_SIZE * FLEET_TOKENS
        until(lambda: int(client.hget(keys.totals, "generated_tokens") or 0) >= tokens, "the fleet", timeout_s=600)
        makespan = time.monotonic() - began
    ideal = num_groups / sum(1 / latency for _, latency in plan)
    client.close()
    return {
        "groups": num_groups,
        "makespan_s": round(makespan, 2),
        "ideal_s": round(ideal, 2),
        "ratio": round(makespan / ideal, 3),
    }


def throughput(folder: Path, server: Any, tiny: Path, *, groups: int, rounds: int) -> dict[str, Any]:
    """Measure the pipeline, the no-ops and the bytes in turn; medians."""
    rates: dict[str, list[float]] = {"pipeline": [], "celery_noop": [], "bare_redis": []}
    for i in range(rounds):
        redis_process = psutil.Process(server.process.pid)
        rate, cpu_ms = pipeline_round(folder, server.url, tiny, groups=groups, name=f"run-{i}", server=redis_process)
        rates["pipeline"].append(rate)
        rates["celery_noop"].append(noop_round(folder, server.url, groups=groups, name=f"noop-{i}"))
        rate, num_bytes = bytes_round(server.url, groups=groups)
        rates["bare_redis"].append(rate)
        connect(server.url).flushdb()
    middle = {name: median(values) for name, values in rates.items()}
    return {
        "group": f"{GROUP_SIZE} completions of {TOKENS} tokens",
        "bytes_moved_per_group": num_bytes,
        "groups_per_s": {name: round(value, 1) for name, value in middle.items()},
        "spread": {name: [round(min(v), 1), round(max(v), 1)] for name, v in rates.items()},
        "pipeline_over_celery_noop": round(middle["pipeline"] / middle["celery_noop"], 3),
        "pipeline_over_bare_redis": round(middle["pipeline"] / middle["bare_redis"], 3),
        "cpu_ms_per_group": cpu_ms,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--groups", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backlogs", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--fleets", type=int, nargs="+", default=[1, 4, 16, 64], help="rollout workers")
    parser.add_argument("--groups-per-worker", type=int, default=24)
    quick = {"groups": 64, "rounds": 1, "backlogs": [100, 1000], "fleets": [1, 4], "groups_per_worker": 4}
    arguments = parse(parser, argv, quick=quick)
    with tempfile.TemporaryDirectory(prefix="sluice-pipeline-") as made:
        folder = Path(made)
        tiny, server = folder / "tiny", start_server(folder / "redis")
        try:
            prepare(tiny, warmup_steps=1)
            rounds, per_worker = 2 if arguments.quick else 12, arguments.groups_per_worker
            found: dict[str, Any] = {
                "synthetic": "engine and trainer of zero cost; the rollout latencies of `workers` are slept",
                "throughput": throughput(folder, server, tiny, groups=arguments.groups, rounds=arguments.rounds),
                "backlog": {
                    str(size): backlog(server.url, size, repeats=16, rounds=rounds) for size in arguments.backlogs
                },
                "workers": {
                    str(n): fleet(folder, server.url, tiny, count=n, per_worker=per_worker) for n in arguments.fleets
                },
            }
        finally:
            server.stop()
    publish("pipeline", arguments, found)


if __name__ == "__main__":
    main()
