"""Creating a run and driving it to its end: what `sluice create` and `sluice run` do.

preflight (nothing is started or stored yet: every bad input ends here, exit code 2)
  --> redis --> run record --> supervisor: workers, trainer --> progress until the trainer is done
  --> everything stopped, in order --> summary.json, report, what to do next
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import click
import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from sluice.common.config import Config
from sluice.common.config.file import config_name, load_config, read_run_config
from sluice.common.connections.client import connect, refuse_eviction
from sluice.common.connections.secrets import secret
from sluice.common.errors import ConfigError
from sluice.common.monitoring.heartbeats import is_silent, read_heartbeats
from sluice.common.monitoring.metric_stream import write_event
from sluice.common.operations.control import cancel_drain, default_who, effective
from sluice.common.paths import expanded, with_absolute_paths
from sluice.common.policies.signing import RUN_KEY, make_key
from sluice.common.run import Run, RunRecord, create_run, open_run
from sluice.dashboard.auth import LOOPBACK, listen, page_url
from sluice.scripts.launcher.fork_server import ForkServer
from sluice.scripts.launcher.preflight import machine_checks, preflight
from sluice.scripts.launcher.processes import interrupted_by_signals
from sluice.scripts.launcher.progress import Progress
from sluice.scripts.launcher.redis_server import DataInUse, EmbeddedServer, start_server
from sluice.scripts.launcher.roles import Role, dashboard_role
from sluice.scripts.launcher.run_folder import new_folder, newest_run, run_folder, write_config
from sluice.scripts.launcher.scaling import Scaler
from sluice.scripts.launcher.summary import end_text, next_text
from sluice.scripts.launcher.supervisor import TRAINER_STOP_S, RunFailed, Supervisor

POLL_S = 0.1
KEY_FILE = "run.key"


def create(config_path: str, overrides: list[str], *, name: str | None) -> Run:
    """Store a new run in the Redis of SLUICE_REDIS_URL, for roles started one by one."""
    config = with_absolute_paths(load_config(config_path, overrides))
    client = connect()
    refuse_eviction(client)
    assets = preflight(config)
    folder = run_folder(config, name) if name else new_folder(config, config_path)
    run = create_run(client, folder.name, config, assets=assets, folder=str(folder), may_exist=True)
    write_config(run)
    return run


def run_to_the_end(
    config_path: str | None,
    overrides: list[str],
    *,
    name: str | None,
    resume: str | None,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Do what `sluice run` does; return the exit code.

    config_path: none = the overrides are the config. prepare: makes what the config names, before it is checked.
    """
    if resume is not None and (overrides or "=" in resume):
        raise ConfigError("--resume uses the config that is stored with the run: give no key=value with it")
    config = with_absolute_paths(_config(config_path, overrides, resume))
    if resume is not None:
        name = resume or newest_run(config.output_dir, prefix=config_name(config_path))
        if "/" in name and expanded(name).resolve().parent == Path(config.output_dir).resolve():
            name = expanded(name).resolve().name
    # roles are forked where the kernel ends them with their parent
    with ForkServer(is_fork=threading.active_count() == 1) if sys.platform == "linux" else nullcontext() as fork_server:
        click.echo("checking config, model, data and rewards", err=True)
        for check in machine_checks(config):  # here the roles run on this machine; with `create` they need not
            check()
        if prepare:
            prepare()
        assets = None if resume is not None else preflight(config)
        folder = run_folder(config, name) if name else new_folder(config, config_path)
        name = folder.name
        if resume is not None and not folder.is_dir():
            raise ConfigError(f"--resume {name}: there is no run folder {folder}")
        with interrupted_by_signals() as interrupted, _redis_for(folder) as (url, server):
            client = connect(url, retry=Retry(ExponentialBackoff(), 1))  # the supervisor must not wait for Redis
            refuse_eviction(client)
            if assets is None:
                run = open_run(client, name)
                preflight(run.config)  # what it names may have changed since
                cancel_drain(client, run, who=default_who())
                RunRecord(client, run.keys).set_status("created")  # no trainer of this start has begun
            else:
                run = create_run(client, name, config, assets=assets, folder=str(folder))
                write_config(run)
                if secret(RUN_KEY) is None:
                    make_key(folder / KEY_FILE)
            code = _drive(client, run, url, server, interrupted, config_path, fork_server)
            is_finished = code == 0 and RunRecord(client, run.keys).status == "finished"
            if is_finished and run.config.policy_store.path is None:  # its policies need not stay in memory
                from sluice.common.policies.transports import store_folder

                shutil.rmtree(store_folder(run.config.policy_store, run.name), ignore_errors=True)
            return code


def _config(config_path: str | None, overrides: list[str], resume: str | None) -> Config:
    """Read a config; of a run that is resumed and had no file, the one in its folder under runs/."""
    if config_path is not None or resume is None:
        return load_config(config_path, overrides)
    runs = Config.model_fields["output_dir"].default
    return read_run_config(Path(runs) / (resume or newest_run(runs, prefix=config_name(None))))


def _drive(
    client: redis.Redis,
    run: Run,
    url: str,
    server: EmbeddedServer | None,
    interrupted: Callable[[], bool],
    config_path: str | None,
    fork_server: ForkServer | None,
) -> int:
    """Start every role and watch until the trainer has finished."""
    folder, record = Path(run.folder), RunRecord(client, run.keys)
    done = _trained_steps(folder)
    progress = Progress(client, run, done=done)
    pages, link = _dashboard(run)
    supervisor = Supervisor(
        run.config,
        run=run.name,
        url=url,
        folder=folder,
        status=lambda: record.status,
        trainer_is_alive=lambda: _trainer_is_alive(client, run),
        is_working=partial(_is_working, client, run),
        extra=pages,
        say=progress.say,
        write_event=partial(write_event, client, run.keys),
        key_file=folder / KEY_FILE if secret(RUN_KEY) is None and (folder / KEY_FILE).exists() else None,
        fork_server=fork_server,
    )
    scaler = Scaler(client, run, supervisor, say=progress.say)
    started, failure = time.monotonic(), None
    progress.say(f"run {run.name} in {folder} (logs in {folder / 'logs'})")
    if done:
        progress.say(_resumed_text(done, total=effective(client, run).trainer.num_steps))
    if link:
        record.set_dashboard(link)
        progress.say(f"dashboard at {link}")
    try:
        supervisor.start()
        with progress:
            while _watch(supervisor, scaler, server, progress) and not interrupted():
                time.sleep(POLL_S)
            progress.update()
    except RunFailed as error:
        failure = error
    finally:
        was_interrupted = interrupted()
        if was_interrupted:
            progress.say(
                f"stopping: the trainer finishes its step and writes a checkpoint, for up to {TRAINER_STOP_S:.0f} s (Ctrl-C "
                "again: without waiting)"
            )
        supervisor.stop()
        with suppress(redis.ConnectionError, redis.TimeoutError):
            record.set_dashboard("")
    if failure:
        with suppress(redis.ConnectionError, redis.TimeoutError):
            record.set_status("failed", failure=_reason(failure))
            _summarize(client, run, progress, supervisor, wall_s=time.monotonic() - started)
        raise failure
    if was_interrupted:
        record.set_status("stopped")
    holds = _summarize(client, run, progress, supervisor, wall_s=time.monotonic() - started)
    if was_interrupted or record.status == "drained":
        ended = "stopped" if was_interrupted else "drained"
        progress.say(
            f"{ended}; resume with: {' '.join(filter(None, ['sluice run', config_path, '--resume', run.name]))}"
        )
    if was_interrupted:
        return 130
    return 0 if holds else 1


def _summarize(client: redis.Redis, run: Run, progress: Progress, supervisor: Supervisor, *, wall_s: float) -> bool:
    """Write and print what came of the run, and what to do next; return whether the ledger holds."""
    from sluice.trainer.summary import write_summary

    folder, record = Path(run.folder), RunRecord(client, run.keys)
    status, failure = record.status, record.failure
    ended = write_summary(client, run, status=status, failure=failure, wall_s=wall_s, restarts=supervisor.restarts)
    progress.say(end_text(ended, folder))
    if not failure:
        progress.say(next_text(ended.summary, folder))
    return ended.counters.holds


def _reason(failure: RunFailed) -> str:
    """Return the sentence that says why a run has failed: its first line, or where that announces a log, with the log's end."""
    first, _, rest = str(failure).partition("\n")
    return f"{first} {rest.splitlines()[-1].removeprefix('error: ')}" if first.endswith(":") and rest else first


def _trained_steps(folder: Path) -> int:
    """Return the step of the newest checkpoint, from which a run is resumed; 0 where there is none."""
    from sluice.trainer.checkpoint import checkpoint_steps  # torch loads here

    return max(checkpoint_steps(folder / "checkpoints"), default=0)


def _resumed_text(done: int, *, total: int) -> str:
    if done < total:
        return f"resuming at step {done} of {total}"
    return f"step {done} of {total}: every step is trained already; only evaluations that are missing are made"


def _dashboard(run: Run) -> tuple[list[Role], str]:
    """Return the web page's role and the link to it; on a free port if the configured one is in use.

    Other people on this machine reach it too, so it asks for a token: a user's own, or one that is in the link.
    """
    if not run.config.dashboard.enabled:
        return [], ""
    try:
        listening, port = listen(LOOPBACK, run.config.dashboard.port)
    except ConfigError:
        listening, port = listen(LOOPBACK, 0)
    own = os.environ.get("SLUICE_DASHBOARD_TOKEN")
    token = own or secrets.token_urlsafe(16)
    link = page_url(LOOPBACK, port, **({} if own else {"token": token}), run=run.name)
    return [dashboard_role(listening=listening, port=port, token=token)], link


def _trainer_is_alive(client: redis.Redis, run: Run) -> bool:
    with suppress(redis.ConnectionError, redis.TimeoutError):
        heartbeats = read_heartbeats(client, run.keys)
        return any(name.startswith("trainer@") and not is_silent(stats) for name, stats in heartbeats.items())
    return False


def _is_working(client: redis.Redis, run: Run, role: str, pid: int, age_s: float) -> bool:
    """Return whether a role of this machine has loaded: its process, or one of its ranks, sends heartbeats that say so."""
    ours = f"{role}@{socket.gethostname()}:"
    for name, stats in read_heartbeats(client, run.keys).items():
        is_new = name == f"{ours}{pid}" or (role == "trainer" and stats.get("up_s", age_s) < age_s)
        if name.startswith(ours) and is_new and not is_silent(stats) and not stats.get("doing"):
            return True
    return False


def _watch(supervisor: Supervisor, scaler: Scaler, server: EmbeddedServer | None, progress: Progress) -> bool:
    """Check everything once; False when the trainer has finished. While Redis is unavailable the roles wait for it."""
    if server and server.process.poll() is not None:
        progress.say(
            f"the embedded Redis ended unexpectedly (exit code {server.process.returncode}): starting it again"
        )
        began = time.monotonic()
        server.restart()
        progress.say(f"the embedded Redis works again, after {time.monotonic() - began:.1f} s")
    try:
        is_running = supervisor.poll()
        if is_running:
            scaler.update()
        progress.update()
        return is_running
    except (redis.ConnectionError, redis.TimeoutError) as error:
        progress.say_unreachable(error)
        return True


@contextmanager
def _redis_for(folder: Path) -> Iterator[tuple[str, EmbeddedServer | None]]:
    """Return the URL of the server of SLUICE_REDIS_URL, or of an embedded one that ends with the run."""
    if url := secret("SLUICE_REDIS_URL"):
        yield url, None
        return
    try:
        server = start_server(folder / "redis")
    except DataInUse:
        raise ConfigError(
            f"run {folder.name} is in progress: its Redis is alive (sluice status {folder.name})"
        ) from None
    with server:
        yield server.url, server
