"""`sluice runs compare`: where runs differ, what came of them, and their curves, from Redis or from what a run folder holds.

a run on the Redis of SLUICE_REDIS_URL   its config in force; steps from its folder where that is here, else from Redis
a folder, or a name under runs/          config.yaml and metrics.jsonl alone: no server is needed, nor started
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import click
import yaml
from rich.table import Table

from sluice.common.connections.client import connect
from sluice.common.connections.secrets import secret
from sluice.common.disk import read_json_lines
from sluice.common.errors import ConfigError
from sluice.common.monitoring.metric_stream import read_metrics
from sluice.common.operations.control import effective
from sluice.common.run import list_runs, open_run
from sluice.dashboard.terminal import sparkline
from sluice.scripts.options import Json, UserPath, console, echo_json, example

_SHOWN = (
    "step",
    "reward/mean",
    "loss/policy",
    "entropy",
    "grad_norm",
    "staleness/mean",
    "completions/mean_length",
    "throughput/trained_tokens_per_s",
)
"""Metrics of which the last values are printed; --json holds all."""
_DRAWN = (
    ("reward/mean", "reward"),
    ("loss/policy", "policy loss"),
    ("entropy", "entropy (nats)"),
    ("grad_norm", "gradient norm"),
    ("completions/mean_length", "completion length (tokens)"),
    ("staleness/mean", "policy age (steps)"),
    ("off_policy/mismatch_kl", "sampler and trainer: KL (nats)"),
    ("throughput/trained_tokens_per_s", "trained tokens/s"),
)
"""Metrics that are drawn, where a run has them, and the names of their axes."""
_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}svg{max-width:100%;height:auto}"
    "td{padding:.2em 1em .2em 0;border-bottom:1px solid #ddd;overflow-wrap:anywhere}"
)
Curve = list[tuple[int, float]]
"""(step, value), ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One run, as far as it is compared."""

    config: dict[str, Any]
    "by dotted key; as it was when the run ended"
    steps: list[dict[str, Any]]
    "metrics of each trainer step; of one that was trained again after a crash, the last ones"
    evaluations: list[dict[str, Any]]
    "entries that hold results of evaluations"

    @classmethod
    def of(cls, config: dict[str, Any], lines: Iterable[dict[str, Any]]) -> Compared:
        """Sort the lines of metrics.jsonl, or the entries of the stream."""
        config, steps, evaluations = dict(_flat(config)), {}, []
        for line in lines:
            if "reward/mean" in line:
                steps[int(line["step"])] = line
            if any(name.startswith("eval/") for name in line):
                evaluations.append(line)
            if line.get("control") in config:
                config[line["control"]] = line["new"]
        return cls(config=config, steps=[steps[step] for step in sorted(steps)], evaluations=evaluations)

    def last_metrics(self) -> dict[str, Any]:
        """Return the newest value of every metric of the last steps."""
        return {name: value for line in self.steps[-20:] for name, value in line.items()}

    def curve(self, metric: str) -> Curve:
        found = ((int(line["step"]), line.get(metric)) for line in self.steps)
        return [(step, float(value)) for step, value in found if value is not None and _is_number(value)]

    def evaluated(self, dataset: str, score: str) -> Curve:
        """Return a score of a set at the steps whose policies were evaluated, which are reported some steps later."""
        trained = {int(line["version"]): int(line["step"]) for line in self.steps if "version" in line}
        found = {}
        for line in self.evaluations:
            value = line.get(f"eval/{dataset}/{score}")
            if value is not None and _is_number(value):
                version = int(line[f"eval/{dataset}/version"])
                found[trained.get(version, int(line["step"]) if version else 0)] = float(value)
        return sorted(found.items())

    def scores(self) -> dict[str, float]:
        """Return the newest value of every score of every set."""
        found = {name: value for line in self.evaluations for name, value in line.items() if name.startswith("eval/")}
        return {name: float(value) for name, value in found.items() if not name.endswith("/version")}

    @property
    def datasets(self) -> list[str]:
        """Sets that were evaluated."""
        found = (name for line in self.evaluations for name in line if name.endswith("/pass@1"))
        return list(dict.fromkeys(name.removeprefix("eval/").removesuffix("/pass@1") for name in found))


@click.command(
    epilog=example(
        "sluice runs compare first second", "sluice runs compare runs/a runs/b --png curves.png --html curves.html"
    )
)
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...")
@click.option(
    "--png", type=UserPath(dir_okay=False, path_type=Path), metavar="FILE", help="Draw the curves into a file."
)
@click.option(
    "--html", type=UserPath(dir_okay=False, path_type=Path), metavar="FILE", help="All of it as a page without scripts."
)
@Json
def compare(names: tuple[str, ...], png: Path | None, html: Path | None, as_json: bool) -> None:
    """Show where configs differ, the last metrics and evaluations, and the curves, side by side; runs or their folders."""
    shown = [Path(name).name for name in names]
    labels = [short if shown.count(short) == 1 else name for short, name in zip(shown, names, strict=True)]
    runs = {label: read_run(name) for label, name in zip(labels, names, strict=True)}
    keys = dict.fromkeys(key for run in runs.values() for key in run.config)
    differing = [key for key in keys if len({repr(run.config.get(key)) for run in runs.values()}) > 1]
    if png:
        _write(png, draw(runs, "png"))
    if html:
        _write(html, page(runs, differing, draw(runs, "svg")))
    if as_json:
        configs = {key: {name: run.config.get(key) for name, run in runs.items()} for key in differing}
        metrics = {name: finite(run.last_metrics()) for name, run in runs.items()}
        scores = {name: finite(run.scores()) for name, run in runs.items()}
        echo_json({"runs": list(runs), "config": configs, "metrics": metrics, "evaluations": scores})
        return
    _print(runs, differing)
    for file in filter(None, (png, html)):
        click.echo(f"curves: {file}")


def read_run(name: str) -> Compared:
    """Read a run by its name or its folder. Raises ConfigError."""
    if secret("SLUICE_REDIS_URL") and "/" not in name:
        with closing(connect()) as client:
            if name in list_runs(client):
                run = open_run(client, name)
                config = effective(client, run).model_dump(mode="json")
                lines = list(read_json_lines(Path(run.folder) / "metrics.jsonl"))
                return Compared.of(config, lines or [metrics for _, metrics in read_metrics(client, run.keys)])
    folder = next((path for path in (Path(name), Path("runs") / name) if (path / "config.yaml").is_file()), None)
    if folder is None:
        raise ConfigError(
            f"{name} is neither a run folder nor the name of one under runs/, and no run of SLUICE_REDIS_URL"
        )
    return Compared.of(yaml.safe_load((folder / "config.yaml").read_text()), read_json_lines(folder / "metrics.jsonl"))


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def draw(runs: dict[str, Compared], form: str) -> bytes:
    """Draw a chart per metric and evaluation set, a colour per run, as png or svg. Raises ConfigError where there is no step."""
    from matplotlib.figure import Figure

    charts: list[tuple[str, dict[str, Curve], bool]] = []
    for dataset in dict.fromkeys(name for run in runs.values() for name in run.datasets):
        curves = {name: run.evaluated(dataset, "pass@1") for name, run in runs.items()}
        charts.append((f"{dataset}: greedy accuracy", curves, True))
    charts += [(label, {name: run.curve(metric) for name, run in runs.items()}, False) for metric, label in _DRAWN]
    charts = [chart for chart in charts if any(chart[1].values())]
    if not charts:
        raise ConfigError(f"{', '.join(runs)}: there is no trained step to draw yet")
    num_rows = math.ceil(len(charts) / 2)
    figure = Figure(figsize=(12, 3 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, 2, squeeze=False).flat
    for (label, curves, has_dots), axis in zip(charts, axes, strict=False):
        for number, (name, points) in enumerate(curves.items()):
            axis.plot(
                *zip(*points, strict=True) if points else ([], []),
                "o-" if has_dots else "-",
                color=f"C{number}",
                label=name,
            )
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        if has_dots:
            axis.set_ylim(0, 1.02)
    for axis in list(axes):  # an odd number of charts
        axis.set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(runs)))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=form, dpi=110)
    return drawn.getvalue()


def page(runs: dict[str, Compared], differing: list[str], curves: bytes) -> bytes:
    """Make a page of the curves and the tables, complete in one file."""
    title = escape(", ".join(runs))
    body = [f"<h1>{title}</h1>", "<svg" + curves.decode().partition("<svg")[2]]
    for heading, rows in _tables(runs, differing).items():
        cells = [["", *runs], *rows]
        lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        body.append(f"<h2>{heading}</h2><table>{lines}</table>")
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
    return f"{head}<body>{''.join(body)}</body></html>\n".encode()


def _print(runs: dict[str, Compared], differing: list[str]) -> None:
    terminal = console()
    for title, rows in _tables(runs, differing).items():
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name in runs:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        terminal.print(table)


def _tables(runs: dict[str, Compared], differing: list[str]) -> dict[str, list[list[str]]]:
    """Return title -> rows, each a name and a cell per run."""
    scores = dict.fromkeys(key for run in runs.values() for key in run.scores())
    return {
        "config, where it differs": [
            [key, *(_cell(run.config.get(key)) for run in runs.values())] for key in differing
        ],
        "last metrics": [[key, *(_cell(run.last_metrics().get(key)) for run in runs.values())] for key in _SHOWN],
        "last evaluations": [[key, *(_cell(run.scores().get(key)) for run in runs.values())] for key in scores],
        "curves": [[label, *(_bars(run.curve(metric)) for run in runs.values())] for metric, label in _DRAWN],
    }


def _bars(points: Curve) -> str:
    """Return a curve as first value, bars and last value."""
    values = [value for _, value in points]
    return f"{values[0]:.4g} {sparkline(values, width=24)} {values[-1]:.4g}" if values else "-"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what JSON does not have: nan and the infinities."""
    return {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf; a list is one value."""
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
