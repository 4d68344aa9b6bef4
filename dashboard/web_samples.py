"""The sample browser, and the page of one group's history."""

from __future__ import annotations

import json
import math
from html import escape
from typing import Any
from urllib.parse import quote

import redis
from nicegui import run, ui
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sluice.common.errors import ConfigError
from sluice.dashboard.html import alarms_html, table_html
from sluice.dashboard.rows import assignment_rows, stage_rows
from sluice.dashboard.samples import by_function
from sluice.dashboard.snapshots import Reader
from sluice.dashboard.trace import heading_of, read_trace, reasons_of

PER_PAGE = 5
FULL_AT = 1.0
"Difference of logprobs, in nats, at which a token is shaded most."
SHADES = {
    "none": "plain",
    "difference": "trainer minus sampler, nats",
    "sampler": "sampler's logprob",
    "version": "policy version",
}
_HUES = (210, 30, 150, 280, 60, 330, 190, 100)


async def samples_page(reader: Reader) -> None:
    """Draw trained groups, newest first, with the numbers of each completion."""
    browser = _Browser(reader)
    with ui.element("div").classes("page"):
        with ui.element("div").classes("card filters"):
            for name, label in (("step", "step"), ("version", "version"), ("low", "reward from"), ("high", "to")):
                ui.number(label, on_change=lambda e, name=name: browser.choose(name, e.value)).props(
                    f'dense outlined clearable aria-label="{label}"'
                )
            ui.select(
                SHADES, value="none", label="shade tokens by", on_change=lambda e: browser.choose("shade", e.value)
            ).props("dense outlined options-dense").style("width: 210px")
            ui.button("newer", on_click=lambda: browser.turn(-1)).props("flat dense no-caps")
            ui.button("older", on_click=lambda: browser.turn(1)).props("flat dense no-caps")
            browser.found = ui.label()
        browser.list = ui.element("div").style("display: contents")
    await browser.show()


class _Browser:
    """The chosen filters, and the groups that match."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._chosen: dict[str, Any] = {"shade": "none"}
        self._page = 0
        files = reader.run.assets.get("tokenizer_files", {})
        self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"]) if "tokenizer.json" in files else None
        self.list: Any = None
        self.found: Any = None

    async def choose(self, name: str, value: Any) -> None:
        self._chosen[name] = value
        self._page = self._page if name == "shade" else 0
        await self.show()

    async def turn(self, pages: int) -> None:
        self._page = max(0, self._page + pages)
        await self.show()

    async def show(self) -> None:
        try:
            samples = await run.io_bound(self._reader.samples) or []
        except redis.RedisError as error:
            self.found.set_text(f"Redis cannot be reached: {error}")
            return
        fitting = [sample for sample in samples if fits(sample, self._chosen)]
        self._page = min(self._page, max(0, math.ceil(len(fitting) / PER_PAGE) - 1))
        first = self._page * PER_PAGE
        shown = fitting[first : first + PER_PAGE]
        self.found.set_text(f"{first + 1}–{first + len(shown)} of {len(fitting)}" if shown else "no group fits")
        self.list.clear()
        with self.list:
            for sample in shown:
                content = sample_html(
                    sample, run=self._reader.run.name, shade=self._chosen["shade"], tokenizer=self._tokenizer
                )
                ui.html(content, sanitize=False).classes("card")


def fits(sample: dict[str, Any], chosen: dict[str, Any]) -> bool:
    """Return whether step, version, and the mean reward of a group match the filters."""
    if any(chosen.get(name) is not None and sample[name] != chosen[name] for name in ("step", "version")):
        return False
    rewards = [c["reward"] for c in sample["completions"] if c["reward"] is not None]
    mean = sum(rewards) / len(rewards) if rewards else math.nan
    low, high = chosen.get("low"), chosen.get("high")
    return not (low is not None and not mean >= low) and not (high is not None and not mean <= high)


def sample_html(sample: dict[str, Any], *, run: str, shade: str, tokenizer: Tokenizer | None) -> str:
    """Return one group."""
    trace = f"/trace?run={quote(run)}&group={quote(sample['group'])}"
    prompt = sample["prompt"] if isinstance(sample["prompt"], str) else json.dumps(sample["prompt"], ensure_ascii=False)
    head = (
        f'<h2>step {sample["step"]} · <a href="{escape(trace)}">group {escape(sample["group"])}</a> · policy version '
        f"{sample['version']} · target {escape(str(sample['target']))}</h2>"
    )
    versions = sorted({version for c in sample["completions"] for version, _ in c.get("policy_versions", ())})
    body = "".join(_completion(c, shade=shade, tokenizer=tokenizer, versions=versions) for c in sample["completions"])
    return f'{head}<div class="prompt">{escape(prompt)}</div>{_legend(shade, versions)}{body}'


def _completion(c: dict[str, Any], *, shade: str, tokenizer: Tokenizer | None, versions: list[int]) -> str:
    reward = "unscored" if c["reward"] is None else f"{c['reward']:.3f}"
    scores = "".join(f"<span>{escape(name)} {escape(str(value))}</span>" for name, value in by_function(c).items())
    stats = (
        f'<div class="stats"><span>reward <b>{reward}</b></span>{scores}<span>advantage {c["advantage"]:+.3f}</span>'
        f"<span>{c['tokens']} tokens</span><span>{escape(c['finish_reason'])}</span></div>"
    )
    text = escape(c["text"])
    if shade != "none" and tokenizer is not None and "token_ids" in c:
        text = _tokens(c, shade, tokenizer, versions)
    return f'<div class="completion">{stats}<div class="tokens">{text}</div></div>'


def _tokens(c: dict[str, Any], shade: str, tokenizer: Tokenizer, versions: list[int]) -> str:
    spans = [version for version, count in c["policy_versions"] for _ in range(count)]
    sampled, trained = c["rollout_logprobs"], c.get("policy_logprobs")
    out = []
    for i, piece in enumerate(pieces(tokenizer, c["token_ids"].tolist())):
        if shade == "version":
            colour, title = _tint_of_version(spans[i], versions), f"version {spans[i]}"
        elif shade == "sampler":
            colour, title = _tint(float(sampled[i]) / 3), f"{sampled[i]:.3f} nats"
        elif trained is None:
            colour, title = "transparent", "not kept by this trainer"
        else:
            difference = float(trained[i]) - float(sampled[i])
            colour = _tint(difference / FULL_AT)
            title = f"{difference:+.4f} nats (trainer {trained[i]:.3f}, sampler {sampled[i]:.3f})"
        out.append(f'<span style="background:{colour}" title="{title}">{escape(piece)}</span>')
    return "".join(out)


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    """Return the text that each token adds; the last of several that make one character adds it."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, token) or "" for token in token_ids]


def _tint(share: float) -> str:
    """Return blue for a share above 0 and red for one below, the more of it the stronger."""
    return f"hsl({215 if share > 0 else 0} 75% 50% / {min(1.0, abs(share)) * 0.6:.2f})"


def _tint_of_version(version: int, versions: list[int]) -> str:
    return f"hsl({_HUES[versions.index(version) % len(_HUES)]} 70% 50% / .28)"


def _legend(shade: str, versions: list[int]) -> str:
    if shade == "version":
        marks = [(_tint_of_version(version, versions), f"version {version}") for version in versions]
    elif shade == "difference":
        marks = [(_tint(-1), f"trainer finds it less likely by {FULL_AT:g} nat"), (_tint(1), "more likely")]
    elif shade == "sampler":
        marks = [(_tint(-1), "the sampler found it unlikely: -3 nats"), (_tint(-0.33), "-1")]
    else:
        return ""
    body = "".join(f'<span><i style="background:{colour}"></i>{text}</span>' for colour, text in marks)
    return f'<div class="legend">{body}</div>'


async def trace_page(reader: Reader, group: str) -> None:
    """Draw one group's history."""
    with ui.element("div").classes("page"):
        field = ui.input("group", value=group).props("dense outlined").style("max-width: 260px")
        address = f"/trace?run={quote(reader.run.name)}&group="
        field.on("keydown.enter", lambda: ui.navigate.to(address + quote(field.value)))
        if group:
            content = await run.io_bound(_trace_html, reader, group) or ""
            ui.html(content, sanitize=False).style("display: contents")


def _trace_html(reader: Reader, group: str) -> str:
    try:
        trace = read_trace(reader.client, reader.run.keys, group)
    except (ConfigError, redis.RedisError) as error:
        return alarms_html([str(error)])
    return (
        f'<div class="card"><h2>{escape(" · ".join(heading_of(trace)))}</h2>'
        f'<div class="scroll">{table_html(stage_rows(trace))}</div>{alarms_html(reasons_of(trace))}</div>'
        f'<div class="card"><h2>stages</h2><div class="scroll">{table_html(assignment_rows(trace))}</div></div>'
    )
