"""Reports as Markdown tables, and the page that shows the recorded ones (docs/benchmarks.md).

A table is between `<!-- begin NAME -->` and `<!-- end NAME -->`; NAME is that of the report in benchmarks/results. Nothing
there is written by hand. Cells are templates of `str.format` over what a benchmark found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Report = dict[str, Any]


def table_of(report: Report) -> str:
    """Return where and when it was measured, then the tables."""
    machine = report["machine"]
    where = [machine["date"], machine["cpu"], f"{machine['cores']} cores", machine.get("gpu"), report.get("synthetic")]
    where += [f"{name} {machine[name]}" for name in ("torch", "vllm", "trl", "commit") if machine.get(name)]
    if machine.get("load_average_1min") is not None:
        where.append(f"load {machine['load_average_1min']} at the start")
    heading = "QUICK, measures nothing: " if report["quick"] else "Measured "
    absent = "".join(f" Missing: {text}." for text in report.get("missing", ()))
    name = re.sub(r"_(cpu|cuda)$", "", report["benchmark"])
    return f"{heading}{', '.join(filter(None, where))}.{absent}\n\n" + "\n\n".join(TABLES[name](report))


def fill(page: str, reports: Mapping[str, Report]) -> str:
    """Return the page with the table of each report in its place. Raises ValueError where one has none, or a place no report."""
    places = re.findall(r"<!-- begin (\w+) -->", page)
    if sorted(places) != sorted(reports):
        raise ValueError(f"the page has places for {sorted(places)}, there are reports of {sorted(reports)}")
    for name, report in reports.items():
        before, begin, rest = page.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        page = f"{before}{begin}{table_of(report)}\n{end}{after}"
    return page


def markdown(lines: Iterable[Iterable[Any]]) -> str:
    """Return one table; the first line is its header."""
    header, *others = [[str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *others])


def down(records: Iterable[Report], columns: dict[str, str]) -> str:
    """Return a table with a line for each record; columns: title -> template."""
    return markdown([columns, *([template.format(**record) for template in columns.values()] for record in records)])


def across(records: Mapping[str, Report], lines: dict[str, str]) -> str:
    """Return a table with a column for each record; lines: title -> template."""
    return markdown(
        [["", *records], *([title, *(text.format(**r) for r in records.values())] for title, text in lines.items())]
    )


def seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def quickstart(report: Report) -> list[str]:
    head, large, peers = report["headline"], report.get("large"), report["seeds"][0]["trl"]
    pairs = zip(head["eval_before"], head["eval_after"], strict=True)
    kinds = " / ".join(head["training_share"]).replace("_", " ")
    lines = {
        "held-out greedy accuracy, before -> after (each seed)": ", ".join(f"{a:g} -> {b:g}" for a, b in pairs),
        "wall / CPU seconds of `sluice run`, start-up and evaluations included": (
            f"{head['shipped_wall_s']:.0f} / {head['shipped_cpu_s']:.0f}"
        ),
    }
    for share, title in (
        ("training_share", f"CPU of the loop, %: {kinds}"),
        ("shipped_share", "the same with evaluations"),
    ):
        lines[title] = " / ".join(f"{100 * value:.0f}" for value in head[share].values())
    lines["everything else: ms per group / per Celery message"] = (
        f"{head['else_ms_per_group']:.1f} / {head['else_ms_per_message']:.1f}"
    )
    if large:
        share = large["steady"]["share"]["everything_else"]
        lines[f"everything else at {large['num_parameters'] / 1e6:.0f} M parameters, %"] = f"{100 * share:.1f}"
    who = " / ".join(["Sluice", *(f"TRL ({peer['threads']} thread{'s' * (peer['threads'] > 1)})" for peer in peers)])
    for clock, since in (("wall_s", "first step"), ("with_start_up_s", "process's start")):
        race = head[f"to_threshold_{clock}"]
        title = f"seconds from the {since} to {report['settings']['threshold']} accuracy: {who}"
        lines[title] = " / ".join(map(seconds, [race["sluice"], *race["trl_by_threads"]]))
        lines[title] += f" ({race['ratio']:.2f} of the faster TRL's)" if race["ratio"] else ""
    return [markdown([("median of the seeds", ""), *lines.items()])]


def chaos(report: Report) -> list[str]:
    def signals(run: Report, kind: str) -> str:
        found = {name.removesuffix(f" {kind}"): n for name, n in run["signals_by_role"].items() if name.endswith(kind)}
        return f"{sum(found.values())} ({', '.join(f'{role} {n}' for role, n in sorted(found.items())) or 'none'})"

    kinds = ("SIGKILL", "SIGTERM", "SIGSTOP", "network cut")
    runs = {}
    for number, run in enumerate(report["runs"], 1):
        derived: Report = {kind: signals(run, kind) for kind in kinds}
        derived["again"] = sum(run["restarts"].values())
        derived["dropped"] = sum(run["ledger"]["dropped"].values())
        other = run.get("undisturbed")
        derived["other"] = f"{other['eval_after']:g} in {other['wall_s']:.0f} s" if other else "-"
        runs[f"run {number}"] = {**run, **derived}
    lines = {
        "signals": "{signals}",
        **{kind: f"{{{kind}}}" for kind in kinds},
        "processes started again": "{again}",
        "steps (of them trained again after a rollback)": "{steps} ({steps_trained_again_after_a_rollback})",
        "admitted = trained + dropped": "{ledger[admitted]} = {ledger[trained]} + {dropped}",
        "**groups lost / trained twice / missing from checkpoints**": (
            "**{lost} / {trained_twice} / {groups_missing_from_checkpoints}**"
        ),
        "seconds to the next step: median / longest": "{median_recovery_s} / {longest_recovery_s}",
        "accuracy before -> after": "{eval_before:g} -> {eval_after:g} in {wall_s:.0f} s",
        "undisturbed": "{other}",
    }
    return [across(runs, lines)]


def publication(report: Report) -> list[str]:
    lines = {
        "elements that change": "{codec[changed_share]:.2%}",
        "delta, of the bytes of the weights": "**{codec[payload_share]:.2%}**",
        "CPU s: encode / apply / plain copy": "{codec[encode_s]:.2f} / {codec[apply_s]:.2f} / {codec[copy_s]:.2f}",
        "in plain copies: encode / apply": "{codec[encode_to_copy]:.1f} / {codec[apply_to_copy]:.1f}",
        "wall s through a directory: publish / fetch": "{directory[publish_s]:.2f} / {directory[fetch_s]:.2f}",
        "the same, full weights": "{directory[first_publish_s]:.2f} / {directory[first_fetch_s]:.2f}",
        "wall s through Redis: publish / fetch": "{redis[publish_s]:.2f} / {redis[fetch_s]:.2f}",
        "the same with full weights": "{redis[first_publish_s]:.2f} / {redis[first_fetch_s]:.2f}",
        "pause of generation / a copy would be, s": "{directory[pause_s]:.4f} / {directory[load_weights_s]:.4f}",
    }
    return [across({f"learning rate {rate}": found for rate, found in report["by_lr"].items()}, lines)]


def pipeline(report: Report) -> list[str]:
    flow, cpu = report["throughput"], report["throughput"]["cpu_ms_per_group"]
    totals = {int(size): found["total_ms_per_group"] for size, found in report["backlog"].items()}
    backlog = [("ms of the ledger per group", *(f"{total:.2f}" for total in totals.values()))]
    backlog += [("over that with the fewest", *(f"{total / totals[min(totals)]:.2f}" for total in totals.values()))]
    rates = {
        "groups/s": "**{groups_per_s[pipeline]:.0f}**",
        "bare Celery, as many no-ops: groups/s": "{groups_per_s[celery_noop]:.0f}",
        "pipeline over it": "{pipeline_over_celery_noop:.2f}",
        "one client of bare Redis: groups/s": "{groups_per_s[bare_redis]:.0f}",
        "the pipeline over it": "{pipeline_over_bare_redis:.2f}",
    }
    makespans = [f"{fleet['ratio']:.2f}" for fleet in report["workers"].values()]
    return [
        down([flow], rates),
        markdown([("CPU ms per group", *cpu), (f"{sum(cpu.values()):.1f}", *cpu.values())]),
        markdown([("groups that wait", *(f"{size:,}" for size in totals)), *backlog]),
        markdown([("rollout workers (slept)", *report["workers"]), ("makespan over the ideal", *makespans)]),
    ]


def training_step(report: Report) -> list[str]:
    columns = {
        "model": "{model}", "lengths": "{lengths}", "side": "{side}", "s per step": "{s:.3f}", "sluice over it": "{over}",
        "tokens/s": "{tokens_per_s:,}", "pads": "{pad_share:.0%}", "of the FLOPs": "{flop_share:.2f}",
        "peak MB over weights": "{peak_mb_over_weights:,.0f}",
    }  # fmt: skip
    records = [
        {"model": found["model"], "lengths": kind, "side": name, "over": batch["sluice_over"].get(name, ""), **side}
        for kind in ("equal", "ragged")
        for found in report["results"]
        for batch in [found["batches"][kind]]
        for name, side in batch["sides"].items()
        if "error" not in side
    ]
    return [down(records, columns)]


def staleness(report: Report) -> list[str]:
    cells: dict[tuple[float, str], dict[int, list[str]]] = {}
    for run in sorted(report["runs"], key=lambda run: (run["learning_rate"], run["age"], run["seed"])):
        by_age = cells.setdefault((run["learning_rate"], run["treatment"]), {})
        by_age.setdefault(run["age"], []).append(f"{run['greedy']:.2f}")
    ages = sorted({run["age"] for run in report["runs"]})
    lines = [(*cell, *(" ".join(by_age[age]) for age in ages)) for cell, by_age in cells.items()]
    return [markdown([("learning rate", "treatment", *(f"age {age}" for age in ages)), *lines])]


def generation(report: Report) -> list[str]:
    peers = {f"over {peer}": f"{{engine_over[{peer}]:.2f}}x" for peer in report["results"][0]["engine_over"]}
    columns = {"model": "{model}", "sequences": "{sequences}", "tokens per CPU s": "{tokens_per_cpu_s[engine]:,}"}
    return [down(report["results"], columns | peers | {"of the limit": "{limit[engine_fraction]:.0%}"})]


def generation_costs(report: Report) -> list[str]:
    size = {"model": "{model}", "rows": "{rows}"}
    long = size | {"tokens of the long one": "{long_tokens}"}
    steps = {
        f"{name.replace('_', ' ')}, ms": f"{{step_ms[{name}]:.1f}}"
        for name in ("smallest_pass", "short_only", "together", "apart")
    }
    swap = {
        "pause of a swap, ms: median / longest": "{pause_ms[median]:.1f} / {pause_ms[max]:.1f}",
        "a decode step": "{decode_step_ms:.1f}",
        "a plain copy of the weights": "{plain_copy_ms:.1f}",
    }
    return [down(report["long_row"], long | steps), down(report["swap"], size | swap)]


def engines(report: Report) -> list[str]:
    columns = {
        "engine": "{engine}", "tokens/s": "{best:,}", "under five updates": "{tokens_per_s_under_updates:,}",
        "pause per update, s": "{pause_s_per_update:.3f}", "start, s": "{start_s:.0f}",
    }  # fmt: skip
    found = {name: result for name, result in report["results"].items() if "tokens_per_s" in result}
    records = [{**result, "engine": name, "best": max(result["tokens_per_s"])} for name, result in found.items()]
    others = [
        f"{name}: {text}" for name, other in report["results"].items() if name not in found for text in other.values()
    ]
    settings = "{size}, {dtype}, {groups} groups of 8".format(**report["settings"])
    return [settings, down(records, columns), *others]


def lora(report: Report) -> list[str]:
    merge = {
        "weights": "{full_bytes:,} bytes", "adapter": "{adapter_bytes:,} bytes", "CPU s of a merge": "{merge_cpu_s:.2f}",
        "of a copy of the weights": "{copy_cpu_s:.2f}",
    }  # fmt: skip
    rounding = {"learning rate": "{learning_rate:g}", "steps": "{step}", "effect, nats": "{effect:.2g}"}
    left = {f"left in {t}": f"{{{t}[share]:.2f}} ± {{{t}[error]:.2f}}" for t in ("bfloat16", "float16")}
    return [down([report["merge"]], merge), down(report["rounding"], rounding | left)]


def sync_baseline(report: Report) -> list[str]:
    columns = {
        "step": "{step}", "greedy": "{greedy:.3f}", "sampled": "{sampled:.3f}", "CPU s": "{cpu_s:.1f}", "wall s": "{wall_s:.1f}",
        "generated tokens": "{generated_tokens:,}",
    }  # fmt: skip
    return [down(report["evaluations"], columns)]


def start(report: Report) -> list[str]:
    names = {
        "first_step_s": "first trained step, s",
        "first_step_cpu_s": "the same, CPU s",
        "restart_s": "restart of a killed worker, s",
    }
    return [
        markdown(
            [
                ["", *report["medians"]],
                *([title, *(f"{m[key]:g}" for m in report["medians"].values())] for key, title in names.items()),
            ]
        )
    ]


TABLES: dict[str, Callable[[Report], list[str]]] = {
    function.__name__: function
    for function in (
        quickstart, chaos, publication, pipeline, training_step, staleness, generation, generation_costs, engines, lora,
        start, sync_baseline,
    )
}  # fmt: skip
