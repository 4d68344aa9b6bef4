"""The dashboard's web server: pages over Redis and run folders, read-only, live.

`sluice dashboard` starts it, and `sluice run` beside a run.

    /                 one run, or several side by side: ?run=a&run=b
    /samples?run=a    groups that were trained on, with their completions
    /trace?run=a&group=t7
    /dead?run=a       dead-lettered groups
    /config?run=a     the config in force
    /logs?run=a&log=trainer
    /metrics          the same snapshot for Prometheus

A page is drawn once; then it updates what has changed, once a second. All assets come from the installed package.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlencode

import redis
from fastapi import Request, Response
from nicegui import app, ui
from prometheus_client import CONTENT_TYPE_LATEST

from sluice.dashboard.auth import AuthMiddleware
from sluice.dashboard.html import alarms_html
from sluice.dashboard.prometheus import exposition
from sluice.dashboard.snapshots import Reader, Readers
from sluice.dashboard.web_files import config_page, dead_page, logs_page
from sluice.dashboard.web_overview import overview_page
from sluice.dashboard.web_samples import samples_page
from sluice.dashboard.web_trace import trace_page

STYLE, SCRIPT = Path(__file__).parent / "style.css", Path(__file__).parent / "page.js"
DARK = """
(() => { const kept = localStorage.getItem("sluice-dark");
  const dark = kept === null ? matchMedia("(prefers-color-scheme: dark)").matches : kept === "true";
  Quasar.Dark.set(dark); })()
"""
TOGGLE = """
(() => { Quasar.Dark.toggle(); localStorage.setItem("sluice-dark", Quasar.Dark.isActive); })()
"""
PAGES: dict[str, Callable[[Reader, Request], Awaitable[None]]] = {
    "samples": samples_page,
    "trace": trace_page,
    "dead": dead_page,
    "config": config_page,
    "logs": logs_page,
}
"""Pages of one run; its name is in the title and in the bar on top."""


def serve(readers: Readers, *, host: str, port: int, listening: int, token: str | None) -> None:
    """Serve on the file descriptor of a listening socket until Ctrl-C or SIGTERM."""
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
        if names := _frame(readers, request.query_params.getlist("run"), page=""):
            await overview_page(readers, names, request)

    for name, draw in PAGES.items():
        _page(readers, name, draw)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(readers.client, readers.served()), media_type=CONTENT_TYPE_LATEST)


def _page(readers: Readers, name: str, draw: Callable[[Reader, Request], Awaitable[None]]) -> None:
    @ui.page(f"/{name}")
    async def page(request: Request) -> None:
        if shown := _frame(readers, [request.query_params.get("run", "")], page=name):
            await draw(readers.of(shown[0]), request)


def _frame(readers: Readers, asked: list[str], *, page: str) -> list[str]:
    """Draw the bar on top. Returns the runs that the page shows, none where there is no such run."""
    ui.add_css(STYLE)
    ui.add_body_html(f"<script>{SCRIPT.read_text()}</script>")
    ui.run_javascript(DARK)
    try:
        known = readers.names()
    except redis.RedisError as error:
        ui.html(alarms_html([f"Redis cannot be reached: {error}"]), sanitize=False)
        return []
    shown = [name for name in asked if name in known] or known[:1]
    missing = [name for name in asked if name and name not in known]
    ui.page_title(" · ".join([*([page] if page else []), *(shown if not missing else []), "Sluice"]))
    with ui.element("div").classes("bar"):
        ui.html("<b>Sluice</b>", sanitize=False)
        several = not page
        ui.select(
            known,
            multiple=several,
            value=shown if several else (shown[0] if shown else None),
            on_change=lambda e: ui.navigate.to(_address(page, e.value if several else [e.value])),
        ).props('dense options-dense borderless aria-label="runs"')
        with ui.element("nav"):
            for target in ("", *(name for name in PAGES if name != "trace")):
                link = ui.link(target or "overview", _address(target, shown[:1] if target or page else shown))
                link.classes("here" if target == page else "")
        ui.element("div").classes("grow")
        ui.button(icon="contrast", on_click=lambda: ui.run_javascript(TOGGLE)).props(
            'flat dense round size=sm aria-label="light or dark"'
        )
    if missing or not shown:
        wrong = [f"there is no run {name!r} here" for name in missing] or ["there is no run here yet"]
        ui.html(alarms_html(wrong), sanitize=False).classes("page")
    return [] if missing else shown


def _address(page: str, names: list[str]) -> str:
    return f"/{page}" + ("?" + urlencode([("run", name) for name in names]) if names else "")
