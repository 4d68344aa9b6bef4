"""The training loop in this process, over real groups in a real Redis: it resumes, and it tells a Redis that came back older."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from builders import make_config, push_group, save_tiny_qwen
from harness import wait_for

from sluice.common.config import EvalDataset
from sluice.common.connections.client import connect
from sluice.common.errors import ConfigError, PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger, read_counters
from sluice.common.models.assets import read_assets
from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.common.policies.digest import weights_digest
from sluice.common.policies.lineage import policy_ages, read_lineage
from sluice.common.policies.reader import PolicyReader
from sluice.common.run import Run, create_run
from sluice.trainer.checkpoint import newest_checkpoint
from sluice.trainer.distributed.ranks import Ranks
from sluice.trainer.loop import Trainer


@pytest.fixture
def run(
    client: redis.Redis,
    keys: Keys,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Run:
    monkeypatch.setenv("SLUICE_REDIS_URL", redis_url)
    config = make_config(
        model={"path": str(save_tiny_qwen(tmp_path / "model"))},
        trainer={"num_steps": 4, "device": "cpu", "loss": {"kl_beta": 0.0}},
        checkpoint={"every_steps": getattr(request, "param", 2)},
        policy_store={"path": str(tmp_path / "policies")},
    )
    assets = read_assets(config.model.path).to_wire()
    return create_run(client, keys.run, config, assets=assets, folder=str(tmp_path / "run"))


@contextlib.contextmanager
def groups_arriving(run: Run, redis_url: str) -> Iterator[None]:
    """Groups of the version they are admitted at, the oldest that a worker may sample them from, whenever there is a credit."""
    ledger, stop = Ledger(connect(redis_url), run.keys, run.config), threading.Event()

    def feed() -> None:
        while not stop.wait(0.005):
            admission = ledger.admit(1)
            for cursor in admission.cursors:
                push_group(ledger, version=admission.policy_version, group_id=f"t{cursor}")

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def assert_trained(client: redis.Redis, run: Run, steps: list[int]) -> None:
    """These steps are reported, in this order, and the groups of four are trained."""
    lines = [json.loads(line) for line in (Path(run.folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/policy" in line] == steps
    counters = read_counters(client, run.keys)
    assert counters.holds
    assert counters.trained == 4 * run.config.groups_per_step


def before_sampling(trainer: Trainer, do: Callable[[int], object]) -> None:
    """Have something happen before every batch; it is told the trainer's version."""
    sample = trainer.buffer.sample

    def sample_after(version: int, **options: Any) -> Any:
        do(version)
        return sample(version, **options)

    trainer.buffer.sample = sample_after  # type: ignore[method-assign]


@pytest.mark.parametrize(("run", "saved_step"), [(2, 2), (4, 0)], indirect=["run"], ids=["checkpoint", "none yet"])
def test_a_trainer_resumes_where_the_newest_checkpoint_is_and_trains_on_the_same_groups(
    client: redis.Redis, run: Run, redis_url: str, saved_step: int
) -> None:
    class Died(Exception):
        pass

    with groups_arriving(run, redis_url):
        first = Trainer(client, run)
        sample = first.buffer.sample

        def dies(*args: Any, **options: Any) -> Any:
            given = sample(*args, **options)
            if options["step"] == 4 and given.groups:
                raise Died
            return given

        first.buffer.sample = dies  # type: ignore[method-assign]
        with pytest.raises(Died):
            first.train(Ranks())
        first.close()
        assert (first.position.step, first.position.saved_step, first.position.version) == (3, saved_step, 3)
        held = [client.lrange(run.keys.batch(step), 0, -1) for step in range(saved_step + 1, 5)]
        heartbeats = read_heartbeats(client, run.keys)
        assert not [name for name in heartbeats if name.startswith("trainer")], "it has signed off"
        second = Trainer(client, run)
        second.train(Ranks())
        second.close()
    assert (second.outcome, second.position.step, second.position.version) == ("finished", 4, 8 - saved_step)
    assert_trained(client, run, [1, 2, 3, *range(saved_step + 1, 5)])
    newest = newest_checkpoint(Path(run.folder) / "checkpoints")
    assert newest is not None and newest.state.step == 4
    groups = [line.decode().rpartition("|")[2] for lines in held for line in lines]
    assert sorted(newest.state.trained_groups) == sorted(groups)
    assert read_counters(client, run.keys).dropped == {}, "a step made again makes the same policy: nothing is stale"


def test_a_base_policy_that_was_lost_is_written_again_when_a_reader_asks(
    client: redis.Redis, run: Run, redis_url: str
) -> None:
    trainer, reader = Trainer(client, run), PolicyReader(client, run.keys, run.config.policy_store)
    has_trained = threading.Event()

    def is_readable() -> bool:
        with contextlib.suppress(PolicyNotFound):
            return weights_digest(reader.fetch(0)[1]) == reader.manifest(0).digest
        return False

    def lose_the_base() -> None:
        try:
            wait_for(is_readable, timeout=30, what="the base policy")
            for path in Path(run.config.policy_store.path or "").rglob("policy-00000000.safetensors"):
                path.unlink()
            assert not is_readable()
            wait_for(is_readable, timeout=30, what="the trainer to write it again")
            with groups_arriving(run, redis_url):
                has_trained.wait(60)
        finally:
            trainer.stopping = True

    with ThreadPoolExecutor(1) as pool:
        reads = pool.submit(lose_the_base)
        trainer.train(Ranks())
        has_trained.set()
        reads.result()
    trainer.close()
    assert_trained(client, run, [1, 2, 3, 4])


def test_a_redis_that_came_back_older_is_told_what_was_trained(client: redis.Redis, run: Run, redis_url: str) -> None:
    """It has forgotten the newest version, and with it that the trainer is there."""
    with groups_arriving(run, redis_url):
        trainer = Trainer(client, run)
        has_lost = []

        def forget(version: int) -> None:
            if version == 2 and not has_lost:
                trainer.publisher.wait()
                has_lost.append(version)
                client.hset(run.keys.policy, mapping={"version": 1})
                client.hdel(run.keys.lineage, "2")
                client.hdel(run.keys.manifests, "2")

        before_sampling(trainer, forget)
        trainer.train(Ranks())
        trainer.close()
    assert has_lost and trainer.position.step == 4
    assert trainer.position.version == 5, "published once more under a version of its own"
    assert_trained(client, run, [1, 2, 3, 4])


def test_a_redis_that_has_lost_the_run_ends_it_with_what_to_do(client: redis.Redis, run: Run, redis_url: str) -> None:
    with groups_arriving(run, redis_url):
        trainer = Trainer(client, run)

        def forget(version: int) -> None:
            if version == 1:
                trainer.publisher.wait()
                client.delete(run.keys.run_record, run.keys.policy, run.keys.lineage)

        before_sampling(trainer, forget)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"Redis has lost run .* start a new run with model.path=TARGET"):
            trainer.train(Ranks())
        trainer.close()
    assert time.monotonic() - began < 30


def test_the_lineage_is_bounded_and_knows_what_a_checkpoint_or_an_evaluation_needs(
    client: redis.Redis, run: Run, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.trainer.loop.EVALUATION_WAIT_S", 0.0)  # no worker evaluates
    config = run.config.model_copy(
        update={
            "trainer": run.config.trainer.model_copy(update={"num_steps": 12}),
            "evaluation": run.config.evaluation.model_copy(
                update={"datasets": (EvalDataset(dataset=run.config.dataset),)}
            ),
        }
    )
    run = replace(run, config=config)
    client.hset(run.keys.evaluation("2.heldout"), "total", 1)
    trainer = Trainer(client, run)
    with groups_arriving(run, redis_url):
        trainer.train(Ranks())
    trainer.close()
    # keep = 2 checkpoints, of the steps 10 and 12; a group may be one step old; version n was made by step n
    left = {version: made.step for version, made in read_lineage(client, run.keys).items()}
    assert sorted(left) == [0, 2, *range(9, 13)], "0 and 2 have evaluations"
    assert set(trainer.publisher.store._announced) == {*left}
    assert policy_ages(client, run.keys, [9], current=12) == [3]
