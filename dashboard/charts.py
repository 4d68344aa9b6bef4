"""Options of the dashboard's charts (Apache ECharts). Colours are readable on light and on dark ground alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

MAX_POINTS = 500
"Points of one curve; more are averaged down."
_INK, _LINE = "#8a919c", "rgba(128,136,150,0.18)"
COLOURS = ["#3b82c4", "#e08a3c", "#3fa27a", "#c2567a", "#8b6fc9", "#b3a03a", "#4fa9b8", "#9a7b62"]
Points = list[tuple[float, float]]


def chart(title: str, *, unit: str = "", stacked: bool = False) -> dict[str, Any]:
    """Return an empty chart over trainer steps."""
    return {
        "color": COLOURS,
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "title": {"text": title, "left": 0, "top": 0, "textStyle": {"fontSize": 13, "fontWeight": 600, "color": _INK}},
        "grid": {"left": 8, "right": 12, "top": 56, "bottom": 4, "containLabel": True},
        "legend": {
            "top": 24,
            "padding": [2, 4],
            "left": 0,
            "type": "scroll",
            "itemWidth": 12,
            "itemHeight": 8,
            "icon": "roundRect",
            "textStyle": {"color": _INK, "fontSize": 11},
            "pageIconColor": _INK,
            "pageTextStyle": {"color": _INK},
        },
        "tooltip": {"trigger": "axis", "confine": True, "textStyle": {"fontSize": 12}, "order": "valueDesc"},
        "xAxis": {
            "type": "value",
            "min": "dataMin",
            "max": "dataMax",
            "minInterval": 1,
            "axisLine": {"lineStyle": {"color": _LINE}},
            "axisLabel": {"color": _INK, "fontSize": 11, "hideOverlap": True},
            "splitLine": {"show": False},
        },
        "yAxis": {
            "type": "value",
            "scale": not stacked,
            "axisLabel": {"color": _INK, "fontSize": 11, "formatter": f"{{value}}{unit}"},
            "splitLine": {"lineStyle": {"color": _LINE}},
            "splitNumber": 4,
        },
        "series": [],
    }


def line(name: str, points: Points, *, dashed: bool = False, dots: bool = False) -> dict[str, Any]:
    """Return a curve of (step, value)."""
    return {
        "type": "line",
        "name": name,
        "data": thinned(points),
        "showSymbol": dots or len(points) == 1,
        "symbolSize": 6,
        "lineStyle": {"width": 1.8, "type": "dashed" if dashed else "solid"},
    }


def area(name: str, points: Points) -> dict[str, Any]:
    """Return a layer of a stack."""
    return line(name, points) | {"stack": "all", "areaStyle": {"opacity": 0.55}, "lineStyle": {"width": 0.5}}


def curve(steps: Iterable[dict[str, float]], metric: str, *, otherwise: float | None = None) -> Points:
    """Return (step, value) where the metric is finite; `otherwise` where a step has none."""
    found = ((step["step"], step.get(metric, otherwise)) for step in steps)
    return [(at, value) for at, value in found if value is not None and math.isfinite(value)]


def thinned(points: Points) -> list[list[float]]:
    """Return at most MAX_POINTS, each the mean of its neighbours; values to five digits."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [[chunk[-1][0], float(f"{sum(v for _, v in chunk) / len(chunk):.5g}")] for chunk in chunks]
