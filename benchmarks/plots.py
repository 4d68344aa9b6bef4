"""The plots of docs/benchmarks.md, drawn from what is recorded in benchmarks/results.

    python benchmarks/plots.py             writes docs/images/benchmark-<name>.svg
    python benchmarks/plots.py --quick     draws them all into a temporary folder: shows that it works

Each file names the digest of the result that it shows, so that a test can tell when it is out of date. Colours of text, lines
and ground are CSS variables with a value for light and one for dark: the reader's setting decides.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose names would hide others

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.shared.report import RESULTS, ROOT
from benchmarks.shared.tables import Report

IMAGES = ROOT / "docs" / "images"
GROUND, INK, FAINT = "#fffefd", "#010203", "#040506"
"""Stand-ins: `themed` puts a CSS variable in the place of each."""
THEMES = {
    GROUND: ("ground", "#ffffff", "#14181f"),
    INK: ("ink", "#1c2330", "#e6e9ef"),
    FAINT: ("faint", "#d5dae1", "#3a4250"),
}
SERIES = ("#3b82f6", "#e07b39", "#2a9d6f", "#b45fcf", "#d64550", "#8a8f98")
"""Readable on both grounds."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sluice",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
}
TREATMENTS = {
    "none": "none",
    "bypass": "bypass: clip on the sampler's ratio (default)",
    "truncate": "decoupled: token_truncate",
    "mask": "decoupled: token_mask",
}
MARKERS = {"SIGKILL": "x", "SIGTERM": "v", "SIGSTOP": "|", "network cut": "s"}


def staleness(report: Report) -> Figure:
    """Held-out accuracy by policy age and off-policy treatment, a heat map for each learning rate."""
    ages, rates = report["settings"]["ages"], report["settings"]["learning_rates"]
    figure, panels = pyplot.subplots(1, len(rates), figsize=(9.6, 2.7), sharey=True, layout="constrained")
    for axes, rate in zip(panels, rates, strict=True):
        means = [[_accuracy(report["runs"], treatment, age, rate) for age in ages] for treatment in TREATMENTS]
        axes.imshow(means, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for row, values in enumerate(means):
            for column, value in enumerate(values):
                colour = "#ffffff" if value < 0.6 else "#10151c"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.set_title(f"learning rate {rate:g}")
        axes.set_xticks(range(len(ages)), [str(age) for age in ages])
        axes.set_yticks(range(len(TREATMENTS)), list(TREATMENTS.values()))
        axes.set_xlabel("age of every batch, optimizer steps")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def _accuracy(runs: Sequence[Report], treatment: str, age: int, rate: float) -> float:
    """Return the mean over the seeds."""
    wanted = {"treatment": treatment, "age": age, "learning_rate": rate}
    return fmean(run["greedy"] for run in runs if wanted.items() <= run.items())


def chaos(report: Report) -> Figure:
    """The newest run with a time line: the trainer's step over time, and below it every signal by role."""
    run = next(run for run in reversed(report["runs"]) if "timeline" in run)
    steps, signals = run["timeline"]["steps"], run["timeline"]["signals"]
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9.6, 4.4), sharex=True, layout="constrained", height_ratios=(3, 2)
    )
    above.step([at for at, _ in steps], [step for _, step in steps], where="post", color=SERIES[0])
    above.set_ylabel("trainer's step")
    above.grid(axis="y")
    lost = f"{run['lost']} groups lost, {run['trained_twice']} trained twice, {sum(run['ledger']['dead'].values())} dead-lettered"
    above.set_title(f"{run['signals']} signals, {run['ledger']['trained']:,} groups trained: {lost}", loc="left")
    roles = sorted({role for _, role, _ in signals})
    for colour, (kind, marker) in zip(SERIES[4:3:-1] + SERIES[1:4], MARKERS.items(), strict=True):
        hits = [(at, roles.index(role)) for at, role, name in signals if name == kind]
        if hits:
            below.scatter(*zip(*hits, strict=True), marker=marker, color=colour, label=kind, s=36)
    below.set_yticks(range(len(roles)), roles)
    below.set_ylim(-0.6, len(roles) - 0.4)
    below.set_xlabel("seconds from the first step")
    below.grid(axis="x")
    below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=len(MARKERS))
    return figure


def pipeline(report: Report) -> Figure:
    """Groups per second over the number of rollout workers, and the cost of a group over the backlog."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
    fleets = {int(number): fleet for number, fleet in report["workers"].items()}
    for key, label, style in (("ideal_s", "ideal", "--"), ("makespan_s", "measured", "o-")):
        left.plot(list(fleets), [fleet["groups"] / fleet[key] for fleet in fleets.values()], style, label=label)
    _logarithmic(left, list(fleets), both=True)
    left.set_title("groups per second; latencies are simulated by sleeping", loc="left")
    left.set_xlabel("rollout workers")
    left.legend()
    backlog = {int(number): found["total_ms_per_group"] for number, found in report["backlog"].items()}
    right.plot(list(backlog), list(backlog.values()), "o-")
    _logarithmic(right, list(backlog))
    right.set_ylim(bottom=0)
    right.set_title("ms of the ledger per group", loc="left")
    right.set_xlabel("groups that wait")
    return figure


def _logarithmic(axes: Axes, ticks: list[int], *, both: bool = False) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    if both:
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    axes.grid()


PLOTS: dict[str, Callable[[Any], Figure]] = {"staleness": staleness, "chaos": chaos, "pipeline": pipeline}
"""Result in benchmarks/results -> what draws it."""


def digest_of(name: str) -> str:
    """Return what a plot of that result carries."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()[:16]


def draw(name: str, folder: Path) -> Path:
    """Draw the plot of one result into a folder and return the file."""
    with matplotlib.rc_context(STYLE):
        figure = PLOTS[name](json.loads((RESULTS / f"{name}.json").read_text()))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    path = folder / f"benchmark-{name}.svg"
    path.write_text(themed(text.getvalue(), f"{name}.json {digest_of(name)}"))
    return path


def themed(svg: str, source: str) -> str:
    """Return the drawing with variables for its colours, and its source in a comment."""
    light, dark = ("".join(f"--{name}:{values[i]};" for name, *values in THEMES.values()) for i in range(2))
    for stand_in, (name, *_) in THEMES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    head, opening, rest = svg.partition("<svg")
    attributes, _, body = rest.partition(">")
    return "".join(
        line.rstrip() + "\n" for line in f"{head}<!-- {source} -->\n{opening}{attributes}>{style}{body}".splitlines()
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="draw into a temporary folder")
    parser.add_argument("--out", type=Path, help="folder; default docs/images")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="sluice-plots-") as made:
        folder = arguments.out or (Path(made) if arguments.quick else IMAGES)
        folder.mkdir(parents=True, exist_ok=True)
        for name in PLOTS:
            print(draw(name, folder).name)


if __name__ == "__main__":
    main()
