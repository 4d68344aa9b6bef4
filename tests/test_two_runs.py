"""Two runs on one Redis, at the same time, give what each gives alone.

Strictly on-policy, every step is a function of the config: which prompts, which tokens, which weights. So a run beside another
one must publish the same policies, bit for bit, as it does with a server of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from harness import counters_of, create_run, metrics_of, trainer, workers

from sluice.common.connections.client import connect
from sluice.common.keys import RUNS, Keys
from sluice.scripts.launcher.redis_server import EmbeddedServer, start_server

STEPS = 6
ON_POLICY = {
    "trainer__num_steps": STEPS,
    "trainer__loss": {"kl_beta": 0.0},
    "replay_buffer": {"batch_size": 4, "max_policy_age": 0},
    "sampling__group_size": 4,
    # a group decoded beside another one has the same tokens, but other last bits of logprobs
    "rollout": {"concurrency": 1},
}


def train(folder: Path, url: str, seeds: dict[str, int]) -> dict[str, dict[int, str]]:
    """Runs of these names and seeds side by side, to their end; trainer step -> digest of the policy it made, by name."""
    client = connect(url)
    with ExitStack() as stack:
        daemons = {}
        for name, seed in seeds.items():
            (own := folder / name).mkdir()
            env = create_run(own, url, name=name, seed=seed, **ON_POLICY)
            stack.enter_context(workers(own, env))
            daemons[name] = own, env, stack.enter_context(trainer(own, env))
        for name, (own, env, daemon) in daemons.items():
            assert daemon.wait(240) == 0, (own / "trainer.log").read_text()
            counters = counters_of(env)
            assert counters.holds
            assert counters.admitted == counters.trained == 4 * STEPS
            assert (counters.dropped, counters.dead) == ({}, {})
            assert [m["step"] for m in metrics_of(own / "runs" / name)] == list(range(1, STEPS + 1))
    digests = {}
    for name in seeds:
        # whole: there is one checkpoint, and a run whose only one is damaged resumes from the base model
        lineage = [value.decode().split(":") for value in client.hvals(Keys(name).lineage)]
        digests[name] = {int(step): digest for _, step, digest in lineage}
        assert sorted(digests[name]) == list(range(STEPS + 1))
    roots = tuple(Keys(name).root for name in seeds)
    assert [key for key in client.scan_iter(count=1000) if not key.decode().startswith((*roots, RUNS))] == []
    client.close()
    return digests


def test_two_runs_at_once_give_what_each_gives_alone(own_redis: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "together").mkdir()
    with start_server(tmp_path / "another") as alone:
        expected = train(tmp_path / "alone", alone.url, {"a": 1})
    found = train(tmp_path / "together", own_redis.url, {"a": 1, "ab": 2})
    assert found["a"] == expected["a"]
    assert found["ab"][STEPS] != found["a"][STEPS], "another seed is another run"
