"""The overview of one run, or of several side by side: numbers, four sections of charts, the pipeline, tables; live."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from typing import Any

import redis
from fastapi import Request
from nicegui import run, ui

from sluice.common.errors import SluiceError
from sluice.dashboard import overview, rows
from sluice.dashboard.charts import MARKERS, Chart, draw, options
from sluice.dashboard.flow import flow_html
from sluice.dashboard.html import alarms_html, table_html, tiles_html
from sluice.dashboard.snapshots import Readers, Snapshot

REFRESH_S = 1.0
SHOWN_EVENTS = 20
"Newest events in the table."
SHOWN_MARKERS = ("kills", "restarts", "settings")
_TABLES: dict[str, Callable[[Snapshot], rows.Rows]] = {
    "ledger": lambda snapshot: rows.ledger_rows(snapshot.status),
    "events": lambda snapshot: rows.event_rows(snapshot.events[-SHOWN_EVENTS:]),
    "queues": lambda snapshot: rows.queue_rows(snapshot.status),
    "processes": lambda snapshot: rows.process_rows(snapshot.status),
}


async def overview_page(readers: Readers, names: list[str], request: Request) -> None:
    """Draw the runs, and update what changes once a second while the page is open."""
    with ui.element("div").classes("page"):
        page = _Overview(names, smoothing=_share(request.query_params.get("smooth", "")))

    async def refresh() -> None:
        try:
            found = {name: await run.io_bound(readers.of(name).read) for name in names}
            page.show({name: snapshot for name, snapshot in found.items() if snapshot})  # none: the server is ending
        except (redis.RedisError, SluiceError) as error:
            page.trouble(f"what is shown is old: {error}")

    await refresh()
    ui.run_javascript(f"sluiceCharts({json.dumps(page.chart_ids)})")
    ui.timer(REFRESH_S, refresh)


def _share(text: str) -> float:
    """Return the smoothing of the address; 0 where there is none."""
    try:
        return min(0.98, max(0.0, float(text)))
    except ValueError:
        return 0.0


class _Overview:
    """The elements of the page, and what they showed last."""

    def __init__(self, names: list[str], *, smoothing: float) -> None:
        self._names, self._smoothing = names, smoothing if math.isfinite(smoothing) else 0.0
        self._markers: list[str] = list(SHOWN_MARKERS)
        self._snapshots: dict[str, Snapshot] = {}
        self._trouble = ui.html("", sanitize=False)
        self._heads = {}
        for name in names:
            with ui.element("div").classes("card"):
                self._heads[name] = ui.html("", sanitize=False)
        self._controls()
        self._charts: list[tuple[Any, Any, Chart, list[str]]] = []
        self._flows: dict[str, Any] = {}
        self._tables: dict[tuple[str, str], Any] = {}
        for section, charts in overview.SECTIONS.items():
            ui.html(f"<h1>{section}</h1>", sanitize=False)
            if section == "Pipeline":
                self._pipelines()
            with ui.element("div").classes("charts large" if section == next(iter(overview.SECTIONS)) else "charts"):
                for chart in charts:
                    for shown in [names] if chart.is_overlaid else [[name] for name in names]:
                        self._add(chart, shown)
        for name in names:
            with ui.element("div").classes("tables"):
                for title in _TABLES:
                    with ui.element("div").classes("card" if title in ("events", "queues") else "card wide"):
                        ui.html(f"<h2>{escape(self._titled(title, [name]))}</h2>", sanitize=False)
                        self._tables[name, title] = ui.html("", sanitize=False).classes("scroll")

    @property
    def chart_ids(self) -> list[int]:
        """Return the elements of the charts over steps, which share crosshair and zoom."""
        return [element.id for _, element, chart, _ in self._charts if not chart.is_histogram]

    def _titled(self, title: str, names: list[str]) -> str:
        return title if names == self._names else f"{title} ({names[0]})"

    def _controls(self) -> None:
        with ui.element("div").classes("controls"):
            ui.label("smoothing")
            slider = ui.slider(
                min=0, max=0.98, step=0.02, value=self._smoothing, on_change=lambda e: self._smooth(e.value)
            )
            slider.props('dense aria-label="smoothing"').style("width: 110px")
            if len(self._names) == 1:
                ui.label("mark").classes("next")
                for kind, (sign, colour, _, _) in MARKERS.items():
                    ui.checkbox(
                        f"{sign} {kind}".strip(),
                        value=kind in self._markers,
                        on_change=lambda e, kind=kind: self._mark(kind, is_marked=e.value),
                    ).props("dense size=xs").style(f"color: {colour}")
            ui.label("drag over a chart to zoom in, double click to zoom out").classes("hint")

    def _smooth(self, weight: float) -> None:
        self._smoothing = weight
        names = "&".join(f"run={name}" for name in self._names)
        ui.navigate.history.replace(f"/?{names}" + (f"&smooth={weight:g}" if weight else ""))
        self._draw()

    def _mark(self, kind: str, *, is_marked: bool) -> None:
        self._markers = [name for name in MARKERS if (is_marked if name == kind else name in self._markers)]
        self._draw()

    def _pipelines(self) -> None:
        for name in self._names:
            with ui.element("div").classes("card"):
                if len(self._names) > 1:
                    ui.html(f"<h2>{escape(name)}</h2>", sanitize=False)
                self._flows[name] = ui.html("", sanitize=False)

    def _add(self, chart: Chart, names: list[str]) -> None:
        with ui.element("div").classes("card") as card:
            title = f'<h2 title="{escape(chart.about)}">{escape(self._titled(chart.title, names))}</h2>'
            ui.html(title, sanitize=False)
            self._charts.append((card, ui.echart(options(chart)), chart, names))

    def show(self, snapshots: dict[str, Snapshot]) -> None:
        """Update every element to these snapshots; unchanged content is not sent."""
        self.trouble("")
        self._snapshots = snapshots
        for name, snapshot in snapshots.items():
            _put(self._heads[name], tiles_html(name, snapshot.status, overview.tiles(snapshot)))
            _put(self._flows[name], flow_html(snapshot) if snapshot.has_redis else "only its folder is left")
            for title, table in _TABLES.items():
                if snapshot.has_redis or title in ("ledger", "events"):
                    _put(self._tables[name, title], table_html(table(snapshot)))
        self._draw()

    def _draw(self) -> None:
        """Draw the curves of what was read last. A chart without any is not shown, once there are steps."""
        for card, element, chart, names in self._charts:
            chosen = {name: self._snapshots[name] for name in names if name in self._snapshots}
            has_steps = any(snapshot.steps for snapshot in chosen.values())
            drawn = draw(chart, chosen, smoothing=self._smoothing, markers=self._markers) if has_steps else []
            card.set_visibility(bool(drawn) or not has_steps)
            if element.options["series"] != drawn:
                shown = list(dict.fromkeys(series["name"] for series in drawn if "name" in series))
                element.options["legend"] |= {"data": shown, "show": len(shown) > 1}
                element.options["series"] = drawn
                element.update()

    def trouble(self, text: str) -> None:
        _put(self._trouble, alarms_html([text]) if text else "")


def _put(element: Any, content: str) -> None:
    if element.content != content:
        element.set_content(content)
