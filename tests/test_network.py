"""A real run whose network fails: connections that die silently, and a Redis that is out of reach for a while.

Every role reaches Redis through a proxy; the test looks at Redis beside it.
"""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit

from harness import SMALL, assert_trained_once, counters_of, create_run, trainer, wait_for, workers
from proxy import Proxy
from test_redis_loss import num_steps, wait_for_steps

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.scripts.launcher.redis_server import EmbeddedServer

ROLES = ("dataset", "rollout", "reward", "trainer")
RECOVERY_S = 25.0
OUTAGE_S = 12.0
STEPS = 40


def test_roles_survive_silent_connections_and_an_outage_and_the_run_finishes(
    tmp_path: Path, own_redis: EmbeddedServer
) -> None:
    settings = {"checkpoint__every_steps": 10, "lease__running_s": 15.0, "lease__queued_s": 5.0}
    env = create_run(tmp_path, own_redis.url, trainer__num_steps=STEPS, **{**SMALL, **settings})
    run_folder, port = tmp_path / "runs" / "roles", urlsplit(own_redis.url).port or 0
    client, keys = connect(own_redis.url), Keys("roles")

    def heartbeats() -> dict[str, float]:
        """Role -> when it last sent one, as the score of its process."""
        found = client.zrange(keys.processes, 0, -1, withscores=True)
        return {name.decode().partition("@")[0].partition("-")[0]: score for name, score in found}

    def wait_for_roles(since: float, *, what: str) -> None:
        wait_for(
            lambda: heartbeats().keys() == set(ROLES) and all(at > since for at in heartbeats().values()),
            timeout=RECOVERY_S,
            what=f"every role to send a heartbeat {what}",
        )

    def logs() -> dict[str, str]:
        return {role: (tmp_path / f"{role}.log").read_text() for role in ROLES}

    with Proxy(("127.0.0.1", port)) as proxy:
        behind = {**env, "SLUICE_REDIS_URL": own_redis.url.replace(f":{port}/", f":{proxy.port}/")}
        with workers(tmp_path, behind) as processes, trainer(tmp_path, behind) as daemon:

            def assert_none_exited() -> None:
                assert [process.poll() for process in (*processes, daemon)] == [None] * 4, logs()

            wait_for_roles(0.0, what="at the start")
            wait_for_steps(run_folder, 2)

            # connections that die silently
            steps, silenced = num_steps(run_folder), time.time()
            assert proxy.black_hole() >= 8
            wait_for_roles(silenced + 1, what="after its connections fell silent")
            left_s = RECOVERY_S - (time.time() - silenced)
            wait_for(
                lambda: num_steps(run_folder) > steps + 1,
                timeout=left_s,
                what="the trainer to step after its connections fell silent",
            )
            print(f"silent connections: steps after {time.time() - silenced:.1f} s")
            assert_none_exited()

            # no process reaches Redis
            proxy.cut()
            cut = time.time()
            for role in ROLES:
                wait_for(
                    lambda role=role: "is unreachable" in logs()[role],
                    timeout=OUTAGE_S - (time.time() - cut),
                    what=f"{role} to say what it waits for",
                )
            wait_for(lambda: time.time() - cut > OUTAGE_S, timeout=OUTAGE_S + 1, what="the outage to last")
            assert_none_exited()
            proxy.reopen()
            reopened = time.time()
            wait_for_roles(reopened, what="after the outage")
            wait_for_steps(run_folder, 2, timeout=RECOVERY_S)
            print(f"outage of {OUTAGE_S:.0f} s: steps {time.time() - reopened:.1f} s after its end")
            assert all("is back after" in text for text in logs().values())
            assert_none_exited()
            assert daemon.wait(120) == 0
    counters = counters_of(env)
    assert (counters.holds, counters.dead, counters.trained) == (True, {}, STEPS * 4), counters
    assert_trained_once(run_folder, STEPS, groups_per_step=4)
    client.close()
