"""Creating a run and driving it to its end: what `sluice create` and `sluice run` do.

preflight (nothing is started or stored yet: every bad input ends here, exit code 2)
  --> redis --> run record --> supervisor: workers, trainer --> progress until the trainer is done
  --> summary.json, report --> everything stopped, in order
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from sluice.common.config import Config
from sluice.common.config.file import load_config
from sluice.common.config.trainer import PEFT_MISSING
from sluice.common.connections.client import connect, give_up_after
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError
from sluice.common.monitoring.metrics import is_silent, read_heartbeats
from sluice.common.operations.control import cancel_drain, default_who
from sluice.common.policies.signing import RUN_KEY, make_key
from sluice.common.run import Run, create_run, open_run, set_status
from sluice.dashboard.auth import LOOPBACK, free_port, page_url
from sluice.scripts.launcher.progress import Progress
from sluice.scripts.launcher.redis_server import EmbeddedServer, reading_server, running_url, start_server
from sluice.scripts.launcher.roles import Role, check_gpus, dashboard_role
from sluice.scripts.launcher.scaling import Scaler
from sluice.scripts.launcher.summary import write_summary
from sluice.scripts.launcher.supervisor import TRAINER_STOP_S, RunFailed, Supervisor
from sluice.trainer.trackers import check_trackers

POLL_S = 0.1
KEY_FILE = "run.key"
READER_WAIT_S = 5.0
"""How long a command that only reads waits for a Redis that goes away while it reads."""


def preflight(config: Config) -> dict[str, object]:
    """Check everything that a run will need; returns the model's assets. Raises ConfigError."""
    from sluice.common.models.assets import read_assets
    from sluice.workers.prompt_source import PromptSource
    from sluice.workers.rewards.loading import load_reward_functions

    rewards = [reward.name for reward in load_reward_functions(config.reward.functions)]
    for judged in config.evaluation.datasets:
        if judged.function not in (None, *rewards):
            raise ConfigError(
                f"evaluation.datasets[{judged.name}].function = {judged.function!r} is no reward function of this run: use "
                f"one of {', '.join(rewards)}"
            )
    assets = read_assets(config.model.path, revision=config.model.revision)
    tokenizer = assets.tokenizer()
    sections = {"dataset": config.dataset}
    sections |= {f"evaluation.datasets[{e.name}].dataset": e.dataset for e in config.evaluation.datasets}
    for section, dataset in sections.items():
        source = PromptSource(dataset, tokenizer, seed=config.seed, section=section)
        source.prompt_at(0)
        source.close()
    return assets.to_wire()


def create(config_path: str, overrides: list[str], *, name: str | None) -> Run:
    """Store a new run in the Redis of SLUICE_REDIS_URL, for roles started one by one."""
    config = with_absolute_paths(load_config(config_path, overrides))
    client = connect()
    name = name or default_name(config_path)
    folder = str(run_folder(config, name))
    run = create_run(client, name, config, assets=preflight(config), folder=folder, may_exist=True)
    write_config(run)
    return run


def run_to_the_end(config_path: str, overrides: list[str], *, name: str | None, resume: str | None) -> int:
    """`sluice run`. Returns the exit code."""
    from sluice.workers.engine import check_engine

    config = with_absolute_paths(load_config(config_path, overrides))
    if resume is not None:
        if overrides or "=" in resume:
            raise ConfigError("--resume goes on with the config that is stored with the run: give no key=value with it")
        name = resume or newest_run(config, prefix=Path(config_path).stem)
    check_engine(config.rollout.engine)  # here the rollout workers run in this environment; with `create` they need not
    if config.trainer.lora and find_spec("peft") is None:
        raise ConfigError(PEFT_MISSING)
    check_trackers(config.metrics)
    check_gpus(config)
    assets = None if resume is not None else preflight(config)
    name = name or default_name(config_path)
    folder = run_folder(config, name)
    if resume is not None and not folder.is_dir():
        raise ConfigError(f"--resume {name}: there is no run folder {folder}")
    with interrupted_by_signals() as interrupted, _redis_for(folder) as (url, server):
        client = connect(url, retry=Retry(ExponentialBackoff(), 1))  # the supervisor must not wait while Redis is away
        if assets is None:
            run = open_run(client, name)
            cancel_drain(client, run, who=default_who())
        else:
            run = create_run(client, name, config, assets=assets, folder=str(folder))
            write_config(run)
            if secret(RUN_KEY) is None:
                make_key(folder / KEY_FILE)
        code = _drive(client, run, url, server, interrupted, config_path)
        is_finished = code == 0 and client.hget(run.keys("run"), "status") == b"finished"
        if is_finished and run.config.policy_store.path is None:  # its policies need not stay in memory
            from sluice.common.policies.store import store_folder

            shutil.rmtree(store_folder(run.config.policy_store, run.name), ignore_errors=True)
        return code


def _drive(
    client: redis.Redis,
    run: Run,
    url: str,
    server: EmbeddedServer | None,
    interrupted: Callable[[], bool],
    config_path: str,
) -> int:
    """Start every role and watch until the trainer has finished."""
    folder = Path(run.folder)
    progress = Progress(client, run)
    pages, address = _dashboard(run)
    supervisor = Supervisor(
        run.config,
        run=run.name,
        url=url,
        folder=folder,
        status=lambda: (client.hget(run.keys("run"), "status") or b"").decode(),
        trainer_is_alive=lambda: _trainer_is_alive(client, run),
        extra=pages,
        say=progress.say,
        key_file=folder / KEY_FILE if secret(RUN_KEY) is None and (folder / KEY_FILE).exists() else None,
    )
    scaler = Scaler(client, run, supervisor, say=progress.say)
    started = time.monotonic()
    progress.say(f"run {run.name} in {folder} (logs in {folder / 'logs'})")
    if address:
        client.hset(run.keys("run"), "dashboard", address)
        progress.say(f"dashboard at {address}")
    try:
        supervisor.start()
        with progress:
            while _watch(supervisor, scaler, server, progress) and not interrupted():
                time.sleep(POLL_S)
            progress.update()
    except RunFailed:
        with suppress(redis.ConnectionError):
            set_status(client, run.keys, "failed")
        raise
    finally:
        was_interrupted = interrupted()
        if was_interrupted:
            progress.say(
                f"stopping: the trainer finishes its step and writes a checkpoint, for up to {TRAINER_STOP_S:.0f} s (Ctrl-C "
                "again: without waiting)"
            )
        supervisor.stop()
        with suppress(redis.ConnectionError, redis.TimeoutError):
            client.hdel(run.keys("run"), "dashboard")
    if was_interrupted:
        set_status(client, run.keys, "stopped")
    summary = write_summary(client, run, wall_s=time.monotonic() - started, restarts=supervisor.restarts)
    progress.say(summary.text)
    if client.hget(run.keys("run"), "status") == b"drained":
        progress.say(f"drained; go on with: sluice run {config_path} --resume {run.name}")
    if was_interrupted:
        progress.say(f"stopped; go on with: sluice run {config_path} --resume {run.name}")
        return 130
    return 0 if summary.holds else 1


def _dashboard(run: Run) -> tuple[list[Role], str | None]:
    """The web page's role and its address; on a free port if the configured one is taken."""
    if not run.config.dashboard.enabled:
        return [], None
    try:
        port = free_port(LOOPBACK, run.config.dashboard.port)
    except ConfigError:
        port = free_port(LOOPBACK, 0)
    return [dashboard_role(port)], f"{page_url(LOOPBACK, port)}?run={quote(run.name)}"


def _trainer_is_alive(client: redis.Redis, run: Run) -> bool:
    try:
        heartbeats = read_heartbeats(client, run.keys)
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    return any(name.startswith("trainer@") and not is_silent(stats) for name, stats in heartbeats.items())


def _watch(supervisor: Supervisor, scaler: Scaler, server: EmbeddedServer | None, progress: Progress) -> bool:
    """One look at everything; False when the trainer has finished. Redis may be away for a while: the roles wait for it."""
    if server and server.process.poll() is not None:
        progress.say(f"the embedded Redis ended by itself (exit code {server.process.returncode}): starting it again")
        server.restart()
    try:
        goes_on = supervisor.poll()
        if goes_on:
            scaler.update()
        progress.update()
        return goes_on
    except (redis.ConnectionError, redis.TimeoutError) as error:
        progress.say_throttled(f"Redis is unreachable, every role waits for it: {error}")
        return True


@contextmanager
def _redis_for(folder: Path) -> Iterator[tuple[str, EmbeddedServer | None]]:
    """URL of the server of SLUICE_REDIS_URL, or of an embedded one that ends with the run."""
    if url := secret("SLUICE_REDIS_URL"):
        yield url, None
        return
    if running_url(folder / "redis"):
        raise ConfigError(f"run {folder.name} is in progress: its Redis is alive (sluice status {folder.name})")
    server = start_server(folder / "redis")
    try:
        yield server.url, server
    finally:
        server.stop()


@contextmanager
def interrupted_by_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag; a second one interrupts whatever runs."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def opened_run(name: str | None) -> Iterator[tuple[redis.Redis, Run, str]]:
    """An existing run and its Redis' URL: SLUICE_REDIS_URL's, or the newest (or named) run folder's own Redis."""
    if url := secret("SLUICE_REDIS_URL"):
        client = connect(url)
        give_up_after(client, READER_WAIT_S)
        yield client, open_run(client, name or os.environ.get("SLUICE_RUN") or _newest_name(client)), url
        return
    folder = existing_folder(name or os.environ.get("SLUICE_RUN"))
    with reading_server(folder / "redis") as url:
        client = connect(url)
        give_up_after(client, READER_WAIT_S)
        yield client, open_run(client, folder.name), url
        client.close()


def _newest_name(client: redis.Redis) -> str:
    from sluice.common.keys import RUNS

    runs = {name.decode(): float(created) for name, created in client.hgetall(RUNS).items()}
    if not runs:
        raise ConfigError("there is no run on this Redis yet: `sluice run CONFIG` makes one")
    return max(runs, key=lambda name: runs[name])


def existing_folder(name: str | None) -> Path:
    base = Path("runs")
    if name:
        if (base / name / "redis").is_dir():
            return base / name
        raise ConfigError(
            f"no run folder {base / name} with a Redis of its own: is this the folder that `sluice run` was started in?"
        )
    folders = sorted((p.parent for p in base.glob("*/redis")), key=lambda p: (p / "redis").stat().st_ctime)
    if not folders:
        raise ConfigError("there is no run here: set SLUICE_REDIS_URL, or change to the folder that holds runs/")
    return folders[-1]


def default_name(config_path: str) -> str:
    return f"{Path(config_path).stem}-{datetime.now():%Y%m%d-%H%M%S}"


def newest_run(config: Config, *, prefix: str) -> str:
    """Name of the newest run of a config. Raises ConfigError."""
    folders = sorted(Path(config.output_dir).glob(f"{prefix}-*/config.yaml"), key=lambda p: p.stat().st_mtime)
    if not folders:
        raise ConfigError(f"--resume: no run of {prefix} in {config.output_dir}")
    return folders[-1].parent.name


def run_folder(config: Config, name: str) -> Path:
    return Path(config.output_dir).resolve() / name


def write_config(run: Run) -> None:
    """The resolved config, for people, beside everything else of the run."""
    folder = Path(run.folder)
    with suppress(FileExistsError):
        folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(run.config.to_yaml())


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute, so that roles started in any folder find them; hub ids stay as they are."""

    def absolute(path: str) -> str:
        file, colon, attribute = path.partition(":")
        return f"{Path(file).resolve()}{colon}{attribute}" if Path(file).exists() else path

    data = config.model_dump()
    data["model"]["path"] = absolute(data["model"]["path"])
    for section in (data["dataset"], *(e["dataset"] for e in data["evaluation"]["datasets"])):
        section["path"] = absolute(section["path"])
    for function in data["reward"]["functions"]:
        function["function"] = absolute(function["function"])
    data["output_dir"] = str(Path(data["output_dir"]).resolve())
    if data["policy_store"]["path"]:
        data["policy_store"]["path"] = str(Path(data["policy_store"]["path"]).resolve())
    return Config.model_validate(data)
