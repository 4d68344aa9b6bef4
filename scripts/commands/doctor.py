"""`sluice doctor`: what this machine has, and what prevents a run."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from typing import NamedTuple

import click
import psutil

from sluice.common.config import Config
from sluice.common.config.file import examine
from sluice.common.connections import sentinel
from sluice.common.connections.client import connect, eviction_problem, persistence_warning, without_password
from sluice.common.connections.secrets import secret
from sluice.common.errors import SluiceError
from sluice.common.monitoring.printable import printable
from sluice.common.paths import with_absolute_paths
from sluice.common.policies.signing import RUN_KEY
from sluice.scripts.launcher.redis_server import find_server
from sluice.scripts.options import Overrides, UserPath, example


class Finding(NamedTuple):
    """One line of the report: ok, note, warning or problem."""

    level: str
    text: str


@click.command(epilog=example("sluice doctor quickstart"))
@click.argument("config", required=False, type=UserPath())
@Overrides
def doctor(config: str | None, overrides: tuple[str, ...]) -> None:
    """Check this machine, Redis and (if given) a config; say what to do about each problem. Exit code 2 if there is one."""
    findings = [*_machine(), *examine_redis(), *(_config(config, list(overrides)) if config else [])]
    for finding in findings:
        click.echo(printable(f"{finding.level:8} {finding.text}"))
    sys.exit(2 if any(finding.level == "problem" for finding in findings) else 0)


def _machine() -> list[Finding]:
    import torch

    memory, free = psutil.virtual_memory().available / 2**30, shutil.disk_usage(".").free / 2**30
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    vllm = (
        ("ok", "is installed") if find_spec("vllm") else ("note", "is not installed: rollout.engine=torch is available")
    )
    on_disk = f"{free:.1f} GiB free on this disk (checkpoints, logs, Redis' append-only file)"
    return [
        Finding("ok", f"{os.cpu_count()} CPU cores, {memory:.1f} GiB memory free, torch {torch.__version__}"),
        Finding("ok" if devices else "note", f"GPUs: {', '.join(devices) or 'none: everything runs on the CPU'}"),
        Finding(vllm[0], f"vLLM {vllm[1]}"),
        Finding("ok" if free > 5 else "problem", on_disk),
    ]


def examine_redis() -> list[Finding]:
    """Check that the Redis of SLUICE_REDIS_URL answers, and cannot lose what a run keeps in it."""
    url = secret("SLUICE_REDIS_URL")
    try:
        if not url:
            return [Finding("ok", f"SLUICE_REDIS_URL is not set: `sluice run` starts its own server, {find_server()}")]
        client = connect(url)
    except SluiceError as error:
        return [Finding("problem", str(error))]
    info = client.info()
    findings = [Finding("ok", f"Redis {info['redis_version']} at {without_password(url)}")]
    if sentinel.is_sentinel(url):
        host, port = sentinel.parse(url).master_address()
        named = f"Sentinel names {host}:{port} as the master, {info['connected_slaves']} replicas"
        findings.append(Finding("ok", named))
    if secret(RUN_KEY) is None:
        unsigned = f"{RUN_KEY} is not set: only `sluice run` signs policies then (docs/security.md)"
        findings.append(Finding("note", unsigned))
    if warning := persistence_warning(client):
        findings.append(Finding("warning", warning))
    if problem := eviction_problem(client):
        findings.append(Finding("problem", problem))
    elif info.get("maxmemory"):
        bound = f"Redis refuses writes when it reaches maxmemory ({info['maxmemory'] / 2**20:.0f} MiB): every role pauses until "
        findings.append(Finding("note", f"{bound}there is room; replay_buffer.max_bytes stops admission before"))
    return findings


def _config(path: str, overrides: list[str]) -> list[Finding]:
    from sluice.scripts.launcher.preflight import problems

    try:
        config, wrong = examine(Config, path, overrides)
        found = [f"{path}: {problem}" for problem in wrong]
        if config is not None:
            found += problems(with_absolute_paths(config))
    except SluiceError as error:
        found = [str(error)]
    ok = Finding("ok", f"{path}: config, model, datasets and reward functions load")
    return [Finding("problem", problem) for problem in found] or [ok]
