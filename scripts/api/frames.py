"""What a run did as tables and curves: read from its folder, or from its Redis."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.common.disk import read_json_lines
from sluice.common.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def read_metrics(folder: Path) -> DataFrame:
    """Return a row per trainer step, a column per metric. A step that was trained again after a crash is there once."""
    import pandas

    rows: dict[int, dict[str, Any]] = {}
    for entry in read_json_lines(folder / "metrics.jsonl"):
        if "version" in entry:  # neither a stall nor a change of a setting
            step = int(entry.pop("step"))
            rows[step] = rows.get(step, {}) | entry
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index()


def samples_frame(samples: list[dict[str, Any]]) -> DataFrame:
    """Return a row per completion of trained groups."""
    import pandas

    rows = []
    for sample in samples:
        of_group = {name: sample[name] for name in ("step", "group", "version", "prompt", "target")}
        for completion in sample["completions"]:
            scores = {f"reward/{name}": score for name, score in completion["rewards"].items()}
            kept = {name: completion[name] for name in ("reward", "advantage", "tokens", "finish_reason")}
            rows.append({**of_group, "completion": completion["text"], **kept, **scores, **completion.get("extra", {})})
    return pandas.DataFrame(rows)


def draw(metrics: DataFrame, names: tuple[str, ...], *, title: str) -> Figure:
    """Draw metrics over steps; without names the reward, and pass@1 of every evaluation. Raises ConfigError."""
    from matplotlib.figure import Figure

    class Chart(Figure):
        def _repr_png_(self) -> bytes:
            """Show it in a notebook, whether or not pyplot is used there."""
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    chosen = names or ("reward/mean", *(name for name in metrics.columns if name.endswith("/pass@1")))
    figure = Chart(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name in chosen:
        if name not in metrics.columns:
            hint = did_you_mean(name, metrics.columns) or "`run.metrics().columns` lists them"
            raise ConfigError(f"{title} has no metric {name!r} yet; {hint}")
        values = metrics[name].dropna()
        steps = _evaluated_steps(metrics, name) if name.startswith("eval/") else values.index
        axis.plot(steps, values, "o-" if name.startswith("eval/") else "-", label=name)
    axis.set(xlabel="optimizer step", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _evaluated_steps(metrics: DataFrame, name: str) -> list[int]:
    """Return the steps whose policies were evaluated, where the trainer reports the results some steps later."""
    versions = metrics[f"{name.rpartition('/')[0]}/version"][metrics[name].notna()]
    trained = {int(version): int(step) for step, version in metrics["version"].items()}
    return [trained.get(int(version), 0) for version in versions]
