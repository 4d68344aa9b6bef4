"""The web dashboard: pages over Redis, read-only, live. `sluice dashboard` starts it, and `sluice run` beside a run.

    /                 one run, or several side by side: ?run=a&run=b
    /samples?run=a    groups that were trained on, with their completions
    /trace?run=a&group=t7
    /metrics          the same snapshot for Prometheus

A page is drawn once; then it updates what has changed, once a second. All assets come from the installed package.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import redis
from fastapi import Request, Response
from nicegui import app, run, ui
from prometheus_client import CONTENT_TYPE_LATEST

from sluice.common.errors import SluiceError
from sluice.dashboard import overview, rows
from sluice.dashboard.auth import AuthMiddleware
from sluice.dashboard.html import alarms_html, table_html, tiles_html
from sluice.dashboard.prometheus import exposition
from sluice.dashboard.snapshots import Readers, Snapshot
from sluice.dashboard.web_samples import samples_page, trace_page

STYLE = Path(__file__).parent / "style.css"
REFRESH_S = 1.0
DARK = """
(() => { const kept = localStorage.getItem("sluice-dark");
  const dark = kept === null ? matchMedia("(prefers-color-scheme: dark)").matches : kept === "true";
  Quasar.Dark.set(dark); })()
"""
TOGGLE = """
(() => { Quasar.Dark.toggle(); localStorage.setItem("sluice-dark", Quasar.Dark.isActive); })()
"""
_TABLES: dict[str, Callable[[Snapshot], rows.Rows]] = {
    "queues": lambda snapshot: rows.queue_rows(snapshot.status),
    "ledger": lambda snapshot: rows.ledger_rows(snapshot.status),
    "processes": lambda snapshot: rows.process_rows(snapshot.status),
    "changes": lambda snapshot: rows.change_rows(snapshot.change_log),
}


def serve(
    client: redis.Redis, names: tuple[str, ...], *, host: str, port: int, listening: int, token: str | None
) -> None:
    """Serve on the file descriptor of a listening socket until Ctrl-C or SIGTERM."""
    readers = Readers(client, names)
    app.add_middleware(AuthMiddleware, token=token)
    _pages(readers)
    ui.run(
        host=host,
        port=port,
        fd=listening,
        title="Sluice",
        favicon="🌊",
        dark=None,
        reload=False,
        show=False,
        show_welcome_message=False,
        tailwind=False,
        uvicorn_logging_level="warning",
        timeout_graceful_shutdown=1,  # open pages are not waited for
    )


def _pages(readers: Readers) -> None:
    @ui.page("/")
    async def index(request: Request) -> None:
        await _overview(readers, request.query_params.getlist("run"))

    @ui.page("/samples")
    async def samples(request: Request) -> None:
        name = _frame(readers, [request.query_params.get("run", "")], page="/samples")
        if name:
            await samples_page(readers.of(name[0]))

    @ui.page("/trace")
    async def trace(request: Request) -> None:
        name = _frame(readers, [request.query_params.get("run", "")], page="/trace")
        if name:
            await trace_page(readers.of(name[0]), request.query_params.get("group", ""))

    @app.get("/metrics")
    def metrics() -> Response:
        runs = [readers.of(name).run for name in readers.names()]
        return Response(exposition(readers.client, runs), media_type=CONTENT_TYPE_LATEST)


def _frame(readers: Readers, asked: list[str], *, page: str) -> list[str]:
    """Draw the bar on top. Returns the runs that the page shows, none where there is no such run."""
    ui.add_css(STYLE)
    ui.run_javascript(DARK)
    try:
        known = readers.names()
    except redis.RedisError as error:
        ui.html(alarms_html([f"Redis cannot be reached: {error}"]), sanitize=False)
        return []
    shown = [name for name in asked if name in known] or known[:1]
    missing = [name for name in asked if name and name not in known]
    with ui.element("div").classes("bar"):
        ui.html("<b>Sluice</b>", sanitize=False)
        several = page == "/"
        ui.select(
            known,
            multiple=several,
            value=shown if several else (shown[0] if shown else None),
            on_change=lambda e: ui.navigate.to(_address(page, e.value if several else [e.value])),
        ).props('dense options-dense borderless aria-label="runs"')
        first = shown[:1]
        for text, target in (("overview", "/"), ("samples", "/samples")):
            ui.link(text, _address(target, first if target != "/" or page != "/" else shown))
        ui.element("div").classes("grow")
        ui.button(icon="contrast", on_click=lambda: ui.run_javascript(TOGGLE)).props(
            'flat dense round size=sm aria-label="light or dark"'
        )
    if missing or not shown:
        wrong = [f"there is no run {name!r} here" for name in missing] or ["there is no run on this Redis yet"]
        ui.html(alarms_html(wrong), sanitize=False).classes("page")
    return [] if missing else shown


def _address(page: str, names: list[str]) -> str:
    return page + ("?" + "&".join(f"run={name}" for name in names) if names else "")


async def _overview(readers: Readers, asked: list[str]) -> None:
    names = _frame(readers, asked, page="/")
    if not names:
        return
    with ui.element("div").classes("page"):
        page = _Overview(names)

    async def refresh() -> None:
        try:
            found = {name: await run.io_bound(readers.of(name).read) for name in names}
            page.show({name: snapshot for name, snapshot in found.items() if snapshot})  # none: the server is ending
        except (redis.RedisError, SluiceError) as error:
            page.trouble(f"what is shown is old: {error}")

    await refresh()
    ui.timer(REFRESH_S, refresh)


class _Overview:
    """The elements of the page, and what they showed last."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._trouble = ui.html("", sanitize=False)
        self._heads = {}
        for name in names:
            with ui.element("div").classes("card"):
                self._heads[name] = ui.html("", sanitize=False)
        self._charts: list[tuple[Any, overview.Series, list[str]]] = []
        with ui.element("div").classes("charts"):
            for options, series in overview.CHARTS[:2]:
                self._add(options, series, names)
            for name in names:
                for options, series in overview.PER_RUN:
                    self._add(options, series, [name])
            for options, series in overview.CHARTS[2:]:
                self._add(options, series, names)
        self._tables = {}
        for name in names:
            with ui.element("div").classes("tables"):
                for title in _TABLES:
                    with ui.element("div").classes("card wide" if title in ("processes", "changes") else "card"):
                        shown = title if len(names) == 1 else f"{name}: {title}"
                        ui.html(f"<h2>{shown}</h2>", sanitize=False)
                        self._tables[name, title] = ui.html("", sanitize=False).classes("scroll")

    def _add(self, options: dict[str, Any], series: overview.Series, names: list[str]) -> None:
        own = deepcopy(options)
        if names != self._names:
            own["title"]["text"] += f" ({names[0]})"
        with ui.element("div").classes("card"):
            self._charts.append((ui.echart(own), series, names))

    def show(self, snapshots: dict[str, Snapshot]) -> None:
        """Update every element to these snapshots; unchanged content is not sent."""
        self.trouble("")
        for name, snapshot in snapshots.items():
            head = tiles_html(name, snapshot.status, overview.tiles(snapshot))
            _put(self._heads[name], head)
            for title, table in _TABLES.items():
                _put(self._tables[name, title], table_html(table(snapshot)))
        for element, series, names in self._charts:
            chosen = {name: snapshots[name] for name in names}
            drawn = overview.draw(series, chosen) if all(snapshot.steps for snapshot in chosen.values()) else []
            if element.options["series"] != drawn:
                element.options["series"] = drawn
                element.update()

    def trouble(self, text: str) -> None:
        _put(self._trouble, alarms_html([text]) if text else "")


def _put(element: Any, content: str) -> None:
    if element.content != content:
        element.set_content(content)
