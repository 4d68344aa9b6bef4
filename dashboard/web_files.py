"""Pages of what a run leaves: dead letters, its config with the settings in force, and the logs of its roles."""

from __future__ import annotations

import json
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import redis
from fastapi import Request
from nicegui import run, ui

from sluice.common.errors import SluiceError
from sluice.common.monitoring.printable import printable
from sluice.dashboard.dead_letters import read_dead_letters
from sluice.dashboard.folder_files import log_names, read_log
from sluice.dashboard.html import alarms_html
from sluice.dashboard.snapshots import Reader

MAX_LETTERS = 100
LOG_REFRESH_S = 2.0


async def dead_page(reader: Reader, request: Request) -> None:
    """Draw dead-lettered groups, newest first: reason, worker, prompt, traceback, completions."""
    with ui.element("div").classes("page"):
        content = await run.io_bound(_dead_html, reader, request.query_params.get("run", "")) or ""
        ui.html(content, sanitize=False).style("display: contents")


def _dead_html(reader: Reader, name: str) -> str:
    try:
        with reader.opened() as (client, opened):
            letters = read_dead_letters(client, opened.keys, count=MAX_LETTERS)
    except (SluiceError, redis.RedisError) as error:
        return alarms_html([str(error)])
    if not letters:
        return '<div class="card">No group of this run is dead-lettered.</div>'
    more = f"the newest {MAX_LETTERS}; " if len(letters) == MAX_LETTERS else f"{len(letters)}; "
    hint = f'<div class="hint">{more}<code>sluice dead --requeue GROUP</code> gives one fresh attempts</div>'
    return hint + "".join(_letter(letter, name) for letter in letters)


def _letter(letter: dict[str, Any], run_name: str) -> str:
    address = f"/trace?{urlencode({'run': run_name, 'group': letter['group']})}"
    first, _, rest = letter["detail"].partition("\n")
    details = "\n".join([rest, *(f"- {text}" for text in letter["completions"])]).strip()
    prompt = letter["prompt"] if isinstance(letter["prompt"], str) else json.dumps(letter["prompt"], ensure_ascii=False)
    return (
        f'<div class="card"><h2><a href="{escape(address)}">group {_shown(letter["group"])}</a> · '
        f'<span class="bad">{_shown(letter["reason"])}</span> · {datetime.fromtimestamp(letter["died_at"]):%m-%d %H:%M:%S} · '
        f'{_shown(letter["worker"])}</h2><div class="prompt">{_shown(prompt)}</div><div>{_shown(first)}</div>'
        + (
            f'<details><summary>all of it</summary><pre class="log">{_shown(details)}</pre></details>'
            if details
            else ""
        )
        + "</div>"
    )


async def config_page(reader: Reader, request: Request) -> None:
    """Draw the stored config, and on top the settings that operators have changed since."""
    with ui.element("div").classes("page"):
        content = await run.io_bound(_config_html, reader) or ""
        ui.html(content, sanitize=False).style("display: contents")


def _config_html(reader: Reader) -> str:
    try:
        snapshot = reader.read()
    except (SluiceError, redis.RedisError) as error:
        return alarms_html([str(error)])
    changed = "".join(
        f"<div><b>{_shown(key)}</b> {_shown(json.dumps(value))}</div>"
        for key, value in snapshot.status.get("settings", {}).items()
    )
    head = f'<div class="card"><h2>changed since the start (sluice set)</h2>{changed}</div>' if changed else ""
    return f'{head}<div class="card"><h2>config</h2><pre class="log">{_shown(snapshot.config.to_yaml())}</pre></div>'


async def logs_page(reader: Reader, request: Request) -> None:
    """Draw the end of one role's log, again every LOG_REFRESH_S."""
    name, chosen = (request.query_params.get(key, "") for key in ("run", "log"))
    with ui.element("div").classes("page"):
        try:
            folder = await run.io_bound(_folder, reader) or Path()
        except (SluiceError, redis.RedisError) as error:
            ui.html(alarms_html([str(error)]), sanitize=False)
            return
        names = log_names(folder)
        if not names:
            ui.label(
                f"There are no logs in {folder / 'logs'} on this machine: roles started one by one log to standard error."
            )
            return
        shown = chosen if chosen in names else "trainer" if "trainer" in names else names[0]
        with ui.element("div").classes("card tabs"):
            for log in names:
                link = ui.link(log, f"/logs?run={quote(name)}&log={quote(log)}")
                link.classes("here" if log == shown else "")
        with ui.element("div").classes("card"):
            text = ui.html("", sanitize=False)

    async def refresh() -> None:
        content = await run.io_bound(_log_html, folder, shown)
        if content and content != text.content:
            text.set_content(content)

    await refresh()
    ui.timer(LOG_REFRESH_S, refresh)


def _folder(reader: Reader) -> Path:
    if reader.folder:
        return reader.folder
    with reader.opened() as (_, opened):
        return Path(opened.folder)


def _log_html(folder: Path, name: str) -> str:
    try:
        text = read_log(folder, name)
    except SluiceError as error:
        return alarms_html([str(error)])
    return f'<h2>{escape(name)}</h2><div class="end"><pre class="log">{_shown(text) or "nothing yet"}</pre></div>'


def _shown(text: str) -> str:
    return escape(printable(text))
