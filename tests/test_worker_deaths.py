"""Workers that die, stop or hang while they hold groups: the groups are taken over, and no result counts twice.

The workers are real Celery processes on a small real model; some are started through `python -c`, which makes one group
deadly, slow or endless first. The test itself plays the dataset worker's tick: it sends what the reaper finds overdue.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from fleet import LEASE_S, Fleet
from harness import wait_for

from sluice.common.monitoring.heartbeats import read_heartbeats
from sluice.workers.context import HUNG_EXIT_CODE

ROLLOUT = """
from sluice.workers.engine.torch.engine import TorchEngine
generate = TorchEngine.generate
def odd(self, request):
    {behaviour}
    return generate(self, request)

def wait_until(condition, timeout):
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
TorchEngine.generate = odd
"""


def test_a_poison_prompt_dies_alone_and_takes_no_innocent_with_it(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(lease={"running_s": LEASE_S, "queued_s": 2.0, "max_attempts": 2})
    poison, *others = fleet.admit(5)
    # the poison prompt kills the process when another is at work beside it, and that one stays at work until then
    behaviour = f"""inside.append(request.group_id)
    if request.group_id == "{poison}":
        wait_until(lambda: len(inside) > 1, 2)
        os._exit(9)
    wait_until(lambda: "{poison}" in inside, 1)
    wait_until(lambda: "{poison}" not in inside, 20)"""
    num_deaths = 0
    patch = "inside = []\n" + ROLLOUT.format(behaviour=behaviour)
    settled = lambda: fleet.has(others, "rollout") and fleet.field(poison, "stage") == "dead"  # noqa: E731
    while not settled():
        assert num_deaths <= 2
        with fleet.odd("rollout", patch=patch) as process:
            over = lambda: process.poll() is not None or settled()  # noqa: E731
            fleet.tick_until(over, timeout=30, what="the poison prompt to kill a worker, or to be dead")
            num_deaths += process.poll() is not None
    counters = fleet.ledger.counters()
    assert num_deaths == 2, "as many as lease.max_attempts"
    assert counters.dead == {"lease_expired": 1}
    assert "rollout held by" in fleet.field(poison, "dead_detail")
    assert max(int(fleet.field(group_id, "n:rollout")) for group_id in others) == 2, "somebody was beside it"
    assert counters.holds


def test_a_group_whose_workers_are_preempted_after_progress_is_healthy_and_runs_beside_others(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(lease={"running_s": LEASE_S, "queued_s": 2.0, "max_attempts": 2})
    group_ids = fleet.admit(3)
    slow = "from sluice.workers.engine.torch.engine import TorchEngine\nstep = TorchEngine._step\n"
    slow += "TorchEngine._step = lambda self: (time.sleep(0.3), step(self))"
    for number in range(1, 3):
        with fleet.odd("rollout", patch=slow) as preempted:
            made = lambda: fleet.has(group_ids, "p:rollout")  # noqa: E731
            fleet.tick_until(made, timeout=30, what="all three to have made progress at the same time")
            preempted.kill()
        lost = lambda: fleet.ledger.counters().interrupted == 3 * number  # noqa: B023, E731
        fleet.tick_until(lost, timeout=20, what="the leases of a killed worker to end")
    with fleet.sound("rollout"):
        fleet.tick_until(lambda: fleet.has(group_ids, "rollout"), timeout=30, what="another worker to do its groups")
    counters = fleet.ledger.counters()
    assert (counters.retried, counters.dead, counters.holds) == (0, {}, True)


def test_groups_wait_for_a_base_policy_that_is_away_and_lose_no_attempt(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(trainer={"loss": {"kl_beta": 0.1}}, policy_store={"delta": False})
    [base] = Path(fleet.config.policy_store.path).glob("**/*.safetensors")
    base.rename(base.with_suffix(".away"))
    group_ids = fleet.admit(3, until="rollout")
    with fleet.sound("reference"):
        heartbeats = lambda: read_heartbeats(fleet.ledger.client, fleet.ledger.keys).values()  # noqa: E731
        alarm = lambda: next((beat["alarm"] for beat in heartbeats()), "")  # noqa: E731
        fleet.tick_until(alarm, timeout=30, what="the worker to say what it waits for")
        assert alarm().startswith("waits for the base policy: ")
        assert not any(fleet.has([group_id], "by:reference") for group_id in group_ids)
        base.with_suffix(".away").rename(base)
        fleet.tick_until(lambda: fleet.has(group_ids, "reference"), timeout=30, what="all groups to be scored")
    counters = fleet.ledger.counters()
    assert (counters.retried, counters.dead, counters.holds) == (0, {}, True)


def test_a_stopped_worker_is_taken_over_and_its_late_results_are_refused(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet()
    late = fleet.folder / "late"  # until then it generates
    behaviour = f"wait_until(lambda: os.path.exists({str(late)!r}), 60)"
    with fleet.odd("rollout", patch=ROLLOUT.format(behaviour=behaviour)) as stopped:
        heartbeats = lambda: read_heartbeats(fleet.ledger.client, fleet.ledger.keys)  # noqa: E731
        wait_for(lambda: any(f["version"] == 0 for f in heartbeats().values()), timeout=30, what="a worker that serves")
        group_ids = fleet.admit(3)
        wait_for(lambda: fleet.has(group_ids, "by:rollout"), timeout=10, what="the groups to be in its hands")
        stopped.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        holders = [fleet.field(group_id, "by:rollout") for group_id in group_ids]

        def taken_over() -> bool:
            return fleet.ledger.counters().retried == len(group_ids)

        fleet.tick_until(taken_over, timeout=30, what="the leases of a stopped worker to end")
        assert time.monotonic() - stopped_at < 5 * LEASE_S
        with fleet.sound("rollout"):
            fleet.tick_until(
                lambda: fleet.has(group_ids, "rollout"), timeout=30, what="another worker to do its groups"
            )
            payloads = [fleet.field(group_id, "by:rollout") for group_id in group_ids]
            assert not set(payloads) & set(holders)
            late.touch()
            stopped.send_signal(signal.SIGCONT)
            wait_for(
                lambda: fleet.ledger.counters().refused == len(group_ids) or stopped.poll() is not None,
                timeout=20,
                what="its late results to be refused",
            )
    counters = fleet.ledger.counters()
    assert counters.refused == len(group_ids)
    assert (counters.admitted, counters.in_flight, counters.dead) == (3, 3, {})
    assert counters.holds


def test_an_engine_in_an_endless_loop_is_taken_over_and_its_process_ends(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet()
    patch = "from sluice.workers.engine.torch.engine import TorchEngine\nassert TorchEngine._step\n"
    patch += "def endless(self):\n    while True: pass\nTorchEngine._step = endless"
    group_ids = fleet.admit(2)
    with fleet.odd("rollout", patch=patch) as hung:
        wait_for(lambda: fleet.has(group_ids, "by:rollout"), timeout=30, what="the groups to be in its hands")
        claimed_at = time.monotonic()
        fleet.tick_until(lambda: fleet.ledger.counters().retried == 2, timeout=30, what="its leases to end")
        assert time.monotonic() - claimed_at < 5 * LEASE_S
        assert hung.wait(60) == HUNG_EXIT_CODE
    with fleet.sound("rollout"):
        fleet.tick_until(lambda: fleet.has(group_ids, "rollout"), timeout=30, what="another worker to do its groups")
    assert fleet.ledger.counters().holds


def test_prompts_of_a_dataset_worker_that_died_after_admission_are_prepared_by_another(
    make_fleet: Callable[..., Fleet],
) -> None:
    fleet = make_fleet(dataset={"max_req_tokens": 32}, trainer={"seq_len": 64})
    patch = "from sluice.workers.prompt_source import PromptSource\nPromptSource.prompt_at = lambda self, cursor: os._exit(9)"
    with fleet.odd("dataset", patch=patch) as killed:
        assert killed.wait(90) == 9
    num_admitted = fleet.ledger.counters().admitted
    assert num_admitted == fleet.ledger.counters().in_flight > 0
    group_ids = [f"t{cursor}" for cursor in range(num_admitted)]
    assert not any(fleet.has([group_id], "task") for group_id in group_ids)
    with fleet.sound("dataset"):  # its own tick reaps and sends
        wait_for(lambda: fleet.has(group_ids, "task"), timeout=30, what="the tasks of the dead worker's groups")
        messages = fleet.messages("rollout")
        wait_for(lambda: fleet.ledger.client.llen(messages) == num_admitted, timeout=30, what="their messages")
    counters = fleet.ledger.counters()
    assert (counters.admitted, counters.dropped, counters.retried) == (num_admitted, {}, num_admitted)
    assert counters.holds


def test_groups_of_a_killed_reference_worker_are_scored_by_another(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(trainer={"loss": {"kl_beta": 0.1}})
    patch = "from sluice.workers.reference import ReferenceModel\n"
    patch += "ReferenceModel.forward = lambda self, sequences, sampling: os.kill(os.getpid(), 9)"
    group_ids = fleet.admit(3, until="rollout")
    with fleet.odd("reference", patch=patch) as killed:
        assert killed.wait(90) == -signal.SIGKILL
    held = [group_id for group_id in group_ids if fleet.has([group_id], "by:reference")]
    assert held
    with fleet.sound("reference"):
        fleet.tick_until(lambda: fleet.has(group_ids, "reference"), timeout=30, what="all groups to be scored")
    assert fleet.ledger.counters().retried == len(held)
    assert fleet.ledger.counters().holds


def test_messages_that_vanish_from_the_broker_are_sent_again(make_fleet: Callable[..., Fleet]) -> None:
    fleet = make_fleet(lease={"running_s": LEASE_S, "queued_s": 0.5}, trainer={"loss": {"kl_beta": 0.0}})
    group_ids = fleet.admit(3, until="rollout")
    assert fleet.ledger.client.llen(fleet.messages("reward")) == 3
    fleet.ledger.client.delete(fleet.messages("reward"))
    with fleet.sound("reward"):
        fleet.tick_until(lambda: fleet.has(group_ids, "reward"), timeout=30, what="all groups to be scored")
    counters = fleet.ledger.counters()
    assert counters.resent >= 3
    assert (counters.retried, counters.dead) == (0, {})
    assert counters.holds
