"""The sample browser."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote, urlencode

import redis
from fastapi import Request
from nicegui import run, ui
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sluice.common.errors import SluiceError
from sluice.common.monitoring.printable import printable
from sluice.dashboard.samples import by_function
from sluice.dashboard.snapshots import Reader

PER_PAGE = 5
FULL_AT = 1.0
"Difference of logprobs, in nats, at which a token is shaded most."
SHADES = {
    "none": "plain",
    "difference": "trainer minus sampler, nats",
    "sampler": "sampler's logprob",
    "version": "policy version",
}
SORTS = {"newest": "newest", "high": "reward, high first", "low": "reward, low first"}
_NUMBERS = {"step": int, "version": int, "low": float, "high": float}
_HUES = (210, 30, 150, 280, 60, 330, 190, 100)


async def samples_page(reader: Reader, request: Request) -> None:
    """Draw trained groups with the numbers of each completion; the filters are in the address."""
    browser = await run.io_bound(_Browser, reader, dict(request.query_params))
    if browser is None:  # the server is ending
        return
    chosen = browser.chosen
    with ui.element("div").classes("page"):
        with ui.element("div").classes("card filters"):
            ui.input(
                "search in text", value=chosen["search"], on_change=lambda e: browser.choose("search", e.value)
            ).props('dense outlined clearable debounce=300 aria-label="search in text"').classes("search")
            for name, label in (("step", "step"), ("version", "version"), ("low", "reward from"), ("high", "to")):
                ui.number(
                    label, value=chosen[name], on_change=lambda e, name=name: browser.choose(name, e.value)
                ).props(f'dense outlined clearable aria-label="{label}"')
            for name, names, label in (("sort", SORTS, "sort by"), ("shade", SHADES, "shade tokens by")):
                ui.select(
                    names, value=chosen[name], label=label, on_change=lambda e, name=name: browser.choose(name, e.value)
                ).props("dense outlined options-dense").classes("choice")
            ui.button("back", on_click=lambda: browser.turn(-1)).props("flat dense no-caps")
            ui.button("more", on_click=lambda: browser.turn(1)).props("flat dense no-caps")
            browser.found = ui.label()
        browser.list = ui.element("div").style("display: contents")
    await browser.show()


class _Browser:
    """The chosen filters, and the groups that match."""

    def __init__(self, reader: Reader, asked: Mapping[str, str]) -> None:
        self._reader = reader
        with reader.opened() as (_, opened):
            self._name = opened.name
            files = opened.assets.get("tokenizer_files", {})
        self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"]) if "tokenizer.json" in files else None
        self.chosen = read_filters(asked)
        self._page = 0
        self.list: Any = None
        self.found: Any = None

    async def choose(self, name: str, value: Any) -> None:
        self.chosen[name] = value or "" if name == "search" else value
        self._page = self._page if name == "shade" else 0
        ui.navigate.history.replace(f"/samples?{urlencode({'run': self._name, **written_filters(self.chosen)})}")
        await self.show()

    async def turn(self, pages: int) -> None:
        self._page = max(0, self._page + pages)
        await self.show()

    async def show(self) -> None:
        try:
            samples = await run.io_bound(self._reader.samples) or []
        except (redis.RedisError, SluiceError) as error:
            self.found.set_text(f"the samples cannot be read: {error}")
            return
        fitting = ordered([sample for sample in samples if fits(sample, self.chosen)], self.chosen["sort"])
        self._page = min(self._page, max(0, math.ceil(len(fitting) / PER_PAGE) - 1))
        first = self._page * PER_PAGE
        shown = fitting[first : first + PER_PAGE]
        self.found.set_text(f"{first + 1}–{first + len(shown)} of {len(fitting)}" if shown else "no group fits")
        self.list.clear()
        with self.list:
            for sample in shown:
                content = sample_html(sample, run=self._name, shade=self.chosen["shade"], tokenizer=self._tokenizer)
                ui.html(content, sanitize=False).classes("card")


def read_filters(asked: Mapping[str, str]) -> dict[str, Any]:
    """Return the filters of an address; what cannot be read is not set."""
    chosen: dict[str, Any] = {"search": asked.get("search", "")}
    for name, kind in _NUMBERS.items():
        try:
            chosen[name] = kind(asked[name])
        except (KeyError, ValueError):
            chosen[name] = None
    chosen["sort"] = asked["sort"] if asked.get("sort") in SORTS else "newest"
    chosen["shade"] = asked["shade"] if asked.get("shade") in SHADES else "none"
    return chosen


def written_filters(chosen: Mapping[str, Any]) -> dict[str, str]:
    """Return what `read_filters` reads, without what is not set."""
    unset = {"search": "", "sort": "newest", "shade": "none"}
    return {name: f"{value:g}" if isinstance(value, float) else str(value)
            for name, value in chosen.items() if value not in (None, unset.get(name))}  # fmt: skip


def fits(sample: dict[str, Any], chosen: Mapping[str, Any]) -> bool:
    """Return whether step, version, mean reward and text of a group match the filters."""
    if any(chosen.get(name) is not None and sample[name] != chosen[name] for name in ("step", "version")):
        return False
    mean, low, high = mean_reward(sample), chosen.get("low"), chosen.get("high")
    if (low is not None and not mean >= low) or (high is not None and not mean <= high):
        return False
    texts = (_prompt(sample), str(sample["target"]), *(c["text"] for c in sample["completions"]))
    return any(chosen.get("search", "").casefold() in text.casefold() for text in texts)


def ordered(samples: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    """Return groups, newest first, in the chosen order; those without a reward come last."""
    if sort == "newest":
        return samples
    sign = -1 if sort == "high" else 1
    return sorted(samples, key=lambda sample: (math.isnan(m := mean_reward(sample)), sign * m))


def mean_reward(sample: dict[str, Any]) -> float:
    """Return the mean over the scored completions; nan where there is none."""
    rewards = [c["reward"] for c in sample["completions"] if c["reward"] is not None]
    return sum(rewards) / len(rewards) if rewards else math.nan


def distinct(completions: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Return the completions by reward, highest first; equal ones once, with their number."""
    counts: dict[str, tuple[dict[str, Any], int]] = {}
    for c in completions:
        same = repr([c["text"], c["reward"], by_function(c), c["advantage"], c["finish_reason"]])
        counts[same] = (counts.get(same, (c, 0))[0], counts.get(same, (c, 0))[1] + 1)
    return sorted(
        counts.values(), key=lambda found: -math.inf if found[0]["reward"] is None else found[0]["reward"], reverse=True
    )


def _prompt(sample: dict[str, Any]) -> str:
    return sample["prompt"] if isinstance(sample["prompt"], str) else json.dumps(sample["prompt"], ensure_ascii=False)


def sample_html(sample: dict[str, Any], *, run: str, shade: str, tokenizer: Tokenizer | None) -> str:
    """Return one group."""
    trace = f"/trace?run={quote(run)}&group={quote(sample['group'])}"
    head = (
        f'<h2>step {sample["step"]} · <a href="{escape(trace)}">group {_shown(sample["group"])}</a> · policy version '
        f"{sample['version']} · target {_shown(str(sample['target']))}</h2>"
    )
    versions = sorted({version for c in sample["completions"] for version, _ in c.get("policy_versions", ())})
    body = "".join(
        _completion(c, count, shade=shade, tokenizer=tokenizer, versions=versions)
        for c, count in distinct(sample["completions"])
    )
    return f'{head}<div class="prompt">{_shown(_prompt(sample))}</div>{_legend(shade, versions)}{body}'


def _shown(text: str) -> str:
    return escape(printable(text))


def _completion(c: dict[str, Any], count: int, *, shade: str, tokenizer: Tokenizer | None, versions: list[int]) -> str:
    reward = "unscored" if c["reward"] is None else f"{c['reward']:.3f}"
    scores = "".join(f"<span>{_shown(name)} {_shown(_value(value))}</span>" for name, value in by_function(c).items())
    side = "up" if c["advantage"] > 0 else "down" if c["advantage"] < 0 else ""
    times = f'<span class="times">{count}×</span>' if count > 1 else ""
    advantage = f'<b class="{side}">{c["advantage"]:+.3f}</b>'
    stats = (
        f'<div class="stats">{times}<span>reward <b>{reward}</b></span>{scores}<span>advantage {advantage}</span>'
        f"<span>{c['tokens']} tokens</span><span>{escape(c['finish_reason'])}</span></div>"
    )
    text = _shown(c["text"])
    if shade != "none" and tokenizer is not None and "token_ids" in c:
        text = _tokens(c, shade, tokenizer, versions)
    return f'<div class="completion {side}">{stats}<div class="tokens">{text}</div></div>'


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
        out.append(f'<span style="background:{colour}" title="{title}">{_shown(piece)}</span>')
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
