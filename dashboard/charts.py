"""Charts of the dashboard (Apache ECharts): curves over trainer steps, smoothed, in colours by name, with event markers.

Colours are readable on light and on dark ground alike. `page.js` adds what takes a browser: crosshair, zoom, numbers, error bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

from sluice.dashboard.snapshots import Snapshot

MAX_POINTS = 500
"Points of one curve; more are averaged down."
MAX_MARKERS = 200
"Newest events that are marked."
_INK, _LINE = "#8a919c", "rgba(128,136,150,0.18)"
COLOURS = ["#3b82c4", "#e08a3c", "#3fa27a", "#c2567a", "#8b6fc9", "#b3a03a", "#4fa9b8", "#9a7b62"]
_FIXED = {name: i for i, names in enumerate([
    ("mean", "policy", "trained", "rollout", "waiting", "norm", "in flight", "age 0", "newest steps"),
    ("max", "generated", "reward", "forward, backward", "learning rate", "credits", "age 1"),
    ("dataset", "optimizer", "high", "age 2", "pass@1"),
    ("clipped", "reference", "publishing", "masked", "low", "dead", "age 3", "first steps"),
    ("trainer", "other", "age 4"),
    ("eval", "equal rewards", "retried", "age 5"),
]) for name in names}  # fmt: skip
"Names that appear in several charts, or side by side in one."
MARKERS = {
    "kills": ("✕", "#c9374b", "solid", ("killed", "ended")),
    "restarts": ("↻", "#3fa27a", "solid", ("restarted",)),
    "settings": ("⚙", "#8b6fc9", "dashed", ("setting", "scaled")),
    "checkpoints": ("", "#8a919c", "dotted", ("checkpoint",)),
}
"Kind of marker -> its sign, colour and line, and the events that it stands for."
Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One named line of a chart."""

    name: str
    points: Points
    "(step, value)"
    is_dashed: bool = False
    has_dots: bool = False
    on_right: bool = False
    errors: tuple[float, ...] = ()
    "standard error of each value; nan where there is none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """What a card of the page shows."""

    title: str
    curves: Callable[[Snapshot], list[Curve]]
    unit: str
    "name of the vertical axis"
    right_unit: str = ""
    "of the axis on the right; empty = there is none"
    is_stacked: bool = False
    is_histogram: bool = False
    "its curves are bars over rewards, not lines over steps"
    about: str = ""
    "one sentence for who reads it for the first time"

    @property
    def is_overlaid(self) -> bool:
        """Whether several runs share one chart; stacks and bars are one per run."""
        return not self.is_stacked and not self.is_histogram


def options(chart: Chart) -> dict[str, Any]:
    """Return the chart without curves."""
    axes = [_value_axis(chart.unit, scale=not (chart.is_stacked or chart.is_histogram))]
    if chart.right_unit:
        axes.append(_value_axis(chart.right_unit, scale=False) | {"splitLine": {"show": False}, "position": "right"})
    return {
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 4, "right": 14, "top": 44, "bottom": 20, "containLabel": True},
        "legend": {
            "top": 0,
            "left": 0,
            "padding": [2, 4],
            "type": "scroll",
            "itemWidth": 12,
            "itemHeight": 8,
            "icon": "roundRect",
            "textStyle": {"color": _INK, "fontSize": 11},
            "pageIconColor": _INK,
            "pageTextStyle": {"color": _INK},
        },
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            "className": "tip",
            "textStyle": {"fontSize": 12},
            "order": "valueDesc",
        },
        "toolbox": {
            "itemSize": 0,
            "showTitle": False,
            "feature": {"dataZoom": {"yAxisIndex": "none", "brushStyle": {"opacity": 0.15}}},
        },
        "xAxis": {
            "type": "category" if chart.is_histogram else "value",
            "name": "reward" if chart.is_histogram else "step",
            "nameLocation": "middle",
            "nameGap": 19,
            "nameTextStyle": {"color": _INK, "fontSize": 11},
            **({} if chart.is_histogram else {"min": "dataMin", "max": "dataMax", "minInterval": 1}),
            "axisLine": {"lineStyle": {"color": _LINE}},
            "axisLabel": {"color": _INK, "fontSize": 11, "hideOverlap": True, ":formatter": "v => sluiceShort(+v)"},
            "splitLine": {"show": False},
        },
        "yAxis": axes,
        "series": [],
    }


def _value_axis(unit: str, *, scale: bool) -> dict[str, Any]:
    return {
        "type": "value",
        "name": unit,
        "nameGap": 8,
        "nameTextStyle": {"color": _INK, "fontSize": 11, "align": "left", "padding": [0, 0, 0, -4]},
        "scale": scale,
        "axisLabel": {"color": _INK, "fontSize": 11, ":formatter": "sluiceShort"},
        "splitLine": {"lineStyle": {"color": _LINE}},
        "splitNumber": 4,
    }


def draw(
    chart: Chart, snapshots: Mapping[str, Snapshot], *, smoothing: float = 0.0, markers: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the series of a chart: of one run with its markers, or of several, each in the colour of its run."""
    series: list[dict[str, Any]] = []
    taken: dict[str, str] = {}
    for run, snapshot in snapshots.items():
        curves = chart.curves(snapshot)
        for place, curve in enumerate(curves):
            if len(snapshots) > 1:
                colour = colour_of(run, taken)
                dashes = ("solid", "dashed", "dotted")[place % 3]
                curve = replace(curve, name=f"{run} {curve.name}" if len(curves) > 1 else run)
            else:
                colour, dashes = colour_of(curve.name, taken), "dashed" if curve.is_dashed else "solid"
            series += _drawn(chart, curve, colour=colour, dashes=dashes, smoothing=smoothing)
    if series and len(snapshots) == 1 and not chart.is_histogram:
        series.append(_markers(next(iter(snapshots.values())), markers))
    return series


def _drawn(chart: Chart, curve: Curve, *, colour: str, dashes: str, smoothing: float) -> list[dict[str, Any]]:
    """Return the series of one curve: what was measured, faint under the smoothed line, and error bars."""
    if chart.is_histogram:
        return [_bars(curve, colour)]
    line = {
        "type": "line",
        "name": curve.name,
        "color": colour,
        "data": thinned(curve.points),
        "yAxisIndex": int(curve.on_right),
        "showSymbol": curve.has_dots or len(curve.points) == 1,
        "symbolSize": 6,
        "lineStyle": {"width": 1.8, "type": dashes},
    }
    if chart.is_stacked:
        return [line | {"stack": "all", "areaStyle": {"opacity": 0.55}, "lineStyle": {"width": 0.5}}]
    if any(map(math.isfinite, curve.errors)):
        bars = [
            [at, value - error, value + error]
            for (at, value), error in zip(curve.points, curve.errors, strict=True)
            if math.isfinite(error)
        ]
        bar = {"type": "custom", "name": curve.name, "color": colour, "data": bars, ":renderItem": "sluiceErrorBar"}
        return [line, bar | {"encode": {"x": 0, "y": [1, 2]}, "silent": True, "tooltip": {"show": False}}]
    if smoothing and not curve.has_dots and len(curve.points) > 2:
        faint = {"lineStyle": {"width": 1, "opacity": 0.3}, "silent": True, "tooltip": {"show": False}}
        return [line | faint, line | {"data": thinned(smoothed(curve.points, smoothing))}]
    return [line]


def _bars(curve: Curve, colour: str) -> dict[str, Any]:
    bars = {"type": "bar", "name": curve.name, "color": colour, "barGap": "-100%", "barCategoryGap": "8%"}
    data = [[f"{at:.3g}", float(f"{value:.4g}")] for at, value in curve.points]
    return bars | {"data": data, "itemStyle": {"opacity": 0.6, "borderRadius": [2, 2, 0, 0]}}


def _markers(snapshot: Snapshot, kinds: Sequence[str]) -> dict[str, Any]:
    """Return vertical lines where the chosen events happened, one for those of a kind at one step; above each its sign."""
    counts: dict[tuple[str, int], int] = {}
    for event in snapshot.events:
        kind = next((kind for kind in kinds if event["event"] in MARKERS[kind][3]), None)
        if kind:
            counts[kind, int(event["step"])] = counts.get((kind, int(event["step"])), 0) + 1
    lines = []
    for (kind, step), count in list(counts.items())[-MAX_MARKERS:]:
        sign, colour, dashes, _ = MARKERS[kind]
        label = {"show": bool(sign), "formatter": sign + (str(count) if count > 1 else ""), "color": colour}
        style = {"color": colour, "type": dashes, "width": 1.2, "opacity": 0.8 if sign else 0.45}
        lines.append({"xAxis": step, "lineStyle": style, "label": label | {"fontSize": 11, "distance": 2}})
    mark = {"symbol": "none", "silent": True, "animation": False, "data": lines}
    return {"type": "line", "data": [], "markLine": mark}


def colour_of(name: str, taken: dict[str, str]) -> str:
    """Return the colour that a name has on every page, or another one where the chart has given it away."""
    if name not in taken:
        first = _FIXED.get(name, crc32(name.encode()))
        free = [c for i in range(len(COLOURS)) if (c := COLOURS[(first + i) % len(COLOURS)]) not in taken.values()]
        taken[name] = (free or [COLOURS[first % len(COLOURS)]])[0]
    return taken[name]


def curve_of(
    steps: Iterable[dict[str, float]], metric: str, *, scale: float = 1.0, otherwise: float | None = None
) -> Points:
    """Return (step, value) where the metric is finite; `otherwise` where a step has none."""
    found = ((step["step"], step.get(metric, otherwise)) for step in steps)
    return [(at, value * scale) for at, value in found if value is not None and math.isfinite(value)]


def smoothed(points: Points, weight: float) -> Points:
    """Return the exponential moving average, without the bias to its beginning: weight 0 = as it is, to below 1."""
    mean, total, out = 0.0, 0.0, []
    for at, value in points:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append((at, mean / total))
    return out


def thinned(points: Points) -> list[list[float]]:
    """Return at most MAX_POINTS, each the mean of its neighbours; values to five digits."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [[chunk[-1][0], float(f"{sum(v for _, v in chunk) / len(chunk):.5g}")] for chunk in chunks]
