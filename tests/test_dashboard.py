"""The dashboard in a real browser over a real run: what it shows against Redis, live, in both themes and widths, and its door."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from builders import for_each, make_config
from harness import only_run, quickstart_config, running_sluice, sluice, tiny_folder, wait_for

from sluice.common.connections.client import connect
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import read_counters
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.monitoring.metric_stream import last_metrics, write_event, write_metrics
from sluice.common.serialization import decode, encode
from sluice.dashboard.charts import COLOURS, colour_of, draw, smoothed
from sluice.dashboard.overview import SECTIONS
from sluice.dashboard.rows import event_text
from sluice.dashboard.snapshots import Readers
from sluice.dashboard.web_samples import distinct, fits, ordered, read_filters, written_filters
from sluice.scripts.launcher.redis_server import EmbeddedServer, start_server
from sluice.scripts.launcher.run_folder import RunFolders

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
RUN = "shown"
KEYS = Keys(RUN)
OpenPage = Callable[..., Any]
HOSTILE = '<script>document.title = "taken"</script><img src=x onerror="document.title=1">'
pytestmark = pytest.mark.timeout(600)  # the first test waits for a model to be made and a run of it


def needs_browser(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")(test))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The Redis of a run of the real command, serving again; the run has served a dashboard of its own while it lasted."""
    folder = tmp_path_factory.mktemp("dashboard")
    steps = {"trainer__num_steps": 6, "sampling__group_size": 4, "checkpoint__every_steps": 3}
    config = quickstart_config(folder, tiny=tiny_folder(), evaluation__datasets=[], dashboard={"port": 0}, **steps)
    with running_sluice("run", str(config), "--name", RUN, cwd=folder) as process:
        page = _address_in(folder / "output.log")
        assert re.search(rf"/\?token=\S{{16,}}&run={RUN}$", page), "others on this machine have no token"
        assert answer_of(page.partition("?")[0]).status_code == 401, "it is asked for from the first moment"
        wait_for(lambda: _is_served(page), timeout=60, what="the run's own dashboard")
        assert page in sluice("status", RUN, cwd=folder).stdout, "sluice status says where it is"
        assert process.wait(280) == 0, (folder / "output.log").read_text()
    assert not _is_served(page), "it ends with the run"
    started = start_server(only_run(folder) / "redis")
    yield started
    started.stop()


def _is_served(page: str) -> bool:
    try:
        token = page.partition("token=")[2].partition("&")[0]
        return f'run="{RUN}"' in answer_of(page.partition("?")[0] + "metrics", Authorization=f"Bearer {token}").text
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    with connect(server.url) as connection:
        yield connection


@pytest.fixture(scope="module")
def address(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A dashboard on loopback."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with running_sluice("dashboard", "--port", "0", cwd=folder, SLUICE_REDIS_URL=server.url):
        yield _address_in(folder / "output.log")


def _address_in(log: Path) -> str:
    (found,) = wait_for(lambda: re.findall(r"http://\S+", log.read_text()), timeout=60, what="the dashboard's address")
    return str(found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[OpenPage]:
    """Opens a page of the dashboard; whatever it asks for must come from there, and its console must stay empty."""
    opened: list[tuple[Any, list[str]]] = []

    def open_(path: str = "/", *, width: int = 1280, height: int = 800, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page, trouble = context.new_page(), []
        page.on(
            "request", lambda r: trouble.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
        )
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        opened.append((context, trouble))
        page.goto(address.rstrip("/") + path)
        return page

    yield open_
    for context, trouble in opened:
        assert trouble == []
        context.close()


def keep(page: Any, name: str) -> None:
    """A picture, where SLUICE_SCREENSHOTS names a folder."""
    if folder := os.environ.get("SLUICE_SCREENSHOTS"):
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def tile(page: Any, name: str) -> Any:
    return page.locator(f'[data-tile="{name}"]')


def wait_text(locator: Any, text: str) -> None:
    from playwright.sync_api import expect

    expect(locator).to_have_text(text, timeout=20_000)


@needs_browser
def test_the_overview_shows_what_redis_holds_and_follows_it_without_a_reload(
    open_page: OpenPage, client: redis.Redis
) -> None:
    counters, metrics = read_counters(client, KEYS), last_metrics(client, KEYS)
    page = open_page(f"/?run={RUN}")
    wait_text(tile(page, "step"), "6 / 6")
    wait_text(tile(page, "reward"), f"{metrics['reward/mean']:.3f}")
    wait_text(tile(page, "ledger"), "holds")
    assert page.locator("td", has_text=f"trained {counters.trained}").count() == 1
    assert page.locator("canvas").count() >= 15
    keep(page, "overview-light")
    assert page.title() == f"{RUN} · Sluice"
    assert page.locator(".flow .node b").all_text_contents() == [
        "dataset",
        "rollout",
        "reward",
        "reference",
        "buffer",
        "trainer",
    ]
    assert page.locator(".page h1").all_text_contents() == ["Learning", "Off-policy", "Throughput", "Pipeline"]
    reward_chart = int(page.locator(".nicegui-echart").first.get_attribute("id").removeprefix("c"))
    stats = {"role": "reward", "running": 1, "idle_fraction": 0.25, "alarm": "disk full"}
    send_heartbeat(client, KEYS, "reward@host:7", stats)
    write_event(client, KEYS, "setting", who="ada@h", key="paused", old="false", new="true")
    write_event(client, KEYS, "killed", process="rollout-0", how="was killed by SIGKILL")
    entries = [entry for entry, _ in client.xrevrange(KEYS.events, count=2)]
    write_metrics(client, KEYS, {**metrics, "step": 7, "reward/mean": 0.123}, max_length=100)
    wait_text(tile(page, "step"), "7 / 6")
    wait_text(tile(page, "reward"), "0.123")
    page.locator("td", has_text="reward@host:7").wait_for(timeout=20_000)
    assert page.locator("td", has_text="75%").count() == 1
    assert page.locator("td", has_text="paused: false → true, by ada@h").count() == 1
    assert page.locator("td", has_text="rollout-0 was killed by SIGKILL").count() == 1
    marked = "id => getElement(id).chart.getOption().series.at(-1).markLine.data.map(line => line.label.formatter)"
    assert page.evaluate(marked, reward_chart) == ["⚙", "✕"]
    zoom = "{type: 'dataZoom', dataZoomIndex: 0, startValue: 2, endValue: 4}"
    page.evaluate(f"id => getElement(id).chart.dispatchAction({zoom})", reward_chart)
    zooms = "id => getElement(id).chart.getModel().getComponent('xAxis').axis.scale.getExtent()[0]"
    ids = [int(i) for i in page.eval_on_selector_all(".nicegui-echart", "all => all.map(e => e.id.slice(1))")]
    assert sum(page.evaluate(zooms, i) == 2 for i in ids) >= 15, "one zoom for all charts over steps"
    client.hincrby(KEYS.counts("train"), "admitted", 1)
    client.hset(KEYS.run_record, "status", "running")
    wait_text(tile(page, "ledger"), "BROKEN")
    page.locator(".alarm", has_text="no trainer is running").wait_for(timeout=20_000)
    client.hincrby(KEYS.counts("train"), "admitted", -1)
    client.hset(KEYS.run_record, "status", "finished")
    wait_text(tile(page, "ledger"), "holds")
    page.locator(".alarm").wait_for(state="detached", timeout=20_000)
    client.xdel(KEYS.events, *entries)
    client.delete(KEYS.process("reward@host:7"))
    client.xdel(KEYS.metrics, client.xrevrange(KEYS.metrics, count=1)[0][0])


@needs_browser
@for_each(
    ("path", "width", "height", "scheme"),
    [
        (path, *size, scheme)
        for path in ("/", "/samples", "/trace", "/dead", "/config", "/logs")
        for size in ((1440, 900), (1280, 800), (390, 844))
        for scheme in ("light", "dark")
    ],
)
def test_no_page_scrolls_sideways_and_the_ground_follows_the_system(
    open_page: OpenPage, path: str, width: int, height: int, scheme: str
) -> None:
    page = open_page(path, width=width, height=height, scheme=scheme)
    page.locator(".bar").wait_for(timeout=20_000)
    page.wait_for_function(f"document.body.classList.contains('body--{scheme}')", timeout=20_000)
    if path in ("/", "/samples"):
        page.locator(".card h2").first.wait_for(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(value) for value in re.findall(r"\d+", colour)[:3]) / 3
    assert (brightness < 60) == (scheme == "dark"), colour
    keep(page, f"{path.strip('/') or 'overview'}-{width}-{scheme}")
    if scheme == "light":
        page.get_by_label("light or dark").click()
        page.wait_for_function("document.body.classList.contains('body--dark')", timeout=20_000)
        page.reload()
        page.wait_for_function("document.body.classList.contains('body--dark')", timeout=20_000)


@needs_browser
def test_samples_are_text_filtered_shaded_and_lead_to_their_trace(open_page: OpenPage, client: redis.Redis) -> None:
    samples = [decode(fields[b"sample"]) for _, fields in client.xrevrange(KEYS.samples)]
    hostile = {**samples[0], "step": 99, "group": "t<b>9</b>", "prompt": HOSTILE}
    hostile["completions"] = [{**hostile["completions"][0], "text": HOSTILE}]
    entry = client.xadd(KEYS.samples, {"sample": encode(hostile)})
    page = open_page(f"/samples?run={RUN}")
    page.locator(".tokens", has_text=HOSTILE).first.wait_for(timeout=20_000)
    assert page.title() == f"samples · {RUN} · Sluice"
    assert page.locator(".card script, .card img, .card b b").count() == 0, "it is text and never markup"
    client.xdel(KEYS.samples, entry)
    shown = 1 + sum(len(distinct(sample["completions"])) for sample in samples[:4])
    assert page.locator(".completion").count() == shown, "of the newest five groups"
    for sample in samples:  # the same policy in the sampler and in the trainer, but for the age of what was sampled
        for c in sample["completions"]:
            assert c["policy_logprobs"].shape == c["rollout_logprobs"].shape == (c["tokens"],)
            if sample["step"] == 1:
                assert abs(c["policy_logprobs"] - c["rollout_logprobs"]).max() < 1e-3
    page.get_by_label("step", exact=True).fill("2")
    of_step = [sample for sample in samples if sample["step"] == 2]
    page.get_by_text(f"1–{len(of_step)} of {len(of_step)}").wait_for(timeout=20_000)
    assert page.locator(".completion").count() == sum(len(distinct(sample["completions"])) for sample in of_step)
    first, _ = distinct(of_step[0]["completions"])[0]
    page.wait_for_function("location.search.includes('step=2')", timeout=20_000)
    page.reload()
    page.get_by_text(f"1–{len(of_step)} of {len(of_step)}").wait_for(timeout=20_000)
    assert page.locator(".tokens").first.text_content() == first["text"]
    page.locator(".q-select", has_text="shade tokens by").click()
    page.get_by_role("option", name="sampler's logprob").click()
    token = page.locator(".tokens span[title]").first
    token.wait_for(timeout=20_000)
    assert token.get_attribute("title") == f"{first['rollout_logprobs'][0]:.3f} nats"
    assert page.locator(".tokens").first.locator("span").count() == first["tokens"]
    keep(page, "samples-shaded")
    page.get_by_role("link", name=f"group {of_step[0]['group']}").click()
    page.locator("td", has_text="sampled for a batch").wait_for(timeout=20_000)
    assert page.locator("td", has_text=of_step[0]["work"]["w:rollout"].rpartition("/")[0]).count() == 1
    keep(page, "trace")


@needs_browser
def test_two_runs_stand_side_by_side_and_one_that_is_not_there_is_named(
    open_page: OpenPage, client: redis.Redis
) -> None:
    other = Keys("other")
    for name, value in client.hgetall(KEYS.run_record).items():
        client.hset(other.run_record, name, value)
    write_metrics(client, other, {**last_metrics(client, KEYS), "reward/mean": 0.5}, max_length=10)
    client.hset("sluice:runs", "other", time.time())
    page = open_page(f"/?run={RUN}&run=other")
    wait_text(tile(page, "reward").nth(1), "0.500")
    assert page.locator(".card h2", has_text="other").count() >= 1
    keep(page, "two-runs")
    page = open_page("/?run=nobody")
    page.locator(".alarm", has_text="there is no run 'nobody' here").wait_for(timeout=20_000)
    client.hdel("sluice:runs", "other")
    for key in client.scan_iter(other.root + "*"):
        client.delete(key)


def answer_of(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, timeout=20)


def test_on_loopback_only_its_own_names_are_answered(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    assert answer_of(address + "metrics").status_code == 200
    for headers, status in (
        ({}, 200),
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": f"rebound.example:{port}"}, 403),
        ({"Origin": "http://elsewhere.example"}, 403),
    ):
        assert answer_of(address, **headers).status_code == status, headers


def test_other_machines_need_the_token(server: EmbeddedServer, tmp_path: Path) -> None:
    for options, env in ((("--host", "0.0.0.0"), {}), ((), {"SLUICE_DASHBOARD_TOKEN": "short"})):
        refused = sluice("dashboard", *options, cwd=tmp_path, SLUICE_REDIS_URL=server.url, **env)
        assert refused.returncode == 2
        assert "token" in refused.stderr
    token = "correct-horse-battery"
    (tmp_path / "token").write_text(token + "\n")
    options = ("--host", "0.0.0.0", "--port", "0", "--token-file", "token")
    with running_sluice("dashboard", *options, cwd=tmp_path, SLUICE_REDIS_URL=server.url):
        url = _address_in(tmp_path / "output.log").replace("0.0.0.0", "127.0.0.1")
        for path in ("", "metrics", "samples", "_nicegui_ws/socket.io/?EIO=4&transport=polling"):
            assert answer_of(url + path).status_code == 401, path
        assert answer_of(url, Authorization=f"Bearer {token}").status_code == 200
        assert answer_of(url, Authorization="Bearer correct-horse-batterz").status_code == 401
        moved = answer_of(f"{url}samples?run={RUN}&token={token}")
        assert (moved.status_code, moved.headers["location"]) == (303, f"/samples?run={RUN}")
        cookie, _, limits = moved.headers["set-cookie"].partition("; ")
        assert token not in cookie
        assert limits == "HttpOnly; Path=/; SameSite=strict"
        assert answer_of(url, Cookie=cookie).status_code == 200
        assert server.url not in (tmp_path / "output.log").read_text()


def test_the_pages_write_nothing(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    """Over a user that may not write: every page answers."""
    allowed = ("~*", "+@read", "+@connection", "+info", "+time", "+evalsha", "+eval", "+script|load", "+script|exists")
    client.execute_command("ACL", "SETUSER", "viewer", "on", ">looking-only-123", *allowed)
    port = server.url.rpartition(":")[2]
    viewer = f"redis://viewer:looking-only-123@127.0.0.1:{port}"
    with running_sluice("dashboard", "--port", "0", cwd=tmp_path, SLUICE_REDIS_URL=viewer):
        url = _address_in(tmp_path / "output.log")
        assert f'sluice_ledger_holds{{run="{RUN}",set="train"}} 1.0' in answer_of(url + "metrics").text
        for path in ("", *(f"{page}?run={RUN}&group=t0" for page in ("samples", "trace", "dead", "config", "logs"))):
            assert answer_of(url + path).status_code == 200
        log = (tmp_path / "output.log").read_text()
        assert "NOPERM" not in log and "Traceback" not in log
    client.execute_command("ACL", "DELUSER", "viewer")


def test_the_trace_of_a_group_is_printed(server: EmbeddedServer, client: redis.Redis, tmp_path: Path) -> None:
    kept = decode(client.xrevrange(KEYS.samples, count=1)[0][1][b"sample"])["group"]
    env = {"SLUICE_REDIS_URL": server.url}
    found = json.loads(sluice("trace", kept, RUN, "--json", cwd=tmp_path, **env).stdout)
    assert (found["where"], found["step"]) == ("trained", 6)
    assert (found["stages"][0]["stage"], found["stages"][-1]["stage"]) == ("admitted", "leased")
    assert all(stage["since_last_s"] >= 0 for stage in found["stages"])
    holders = {stage["stage"]: stage["held_by"].partition("@")[0] for stage in found["assignments"]}
    assert holders == {"task": "dataset", "rollout": "rollout", "reward": "reward", "reference": "reference"}
    assert "generated" in sluice("trace", kept, cwd=tmp_path, **env).stdout
    missing = sluice("trace", "t99999", cwd=tmp_path, **env)
    assert missing.returncode == 2
    assert "is not in flight, not a dead letter" in missing.stderr


def test_a_name_has_one_colour_and_two_names_of_a_chart_never_the_same() -> None:
    assert colour_of("rollout", {}) == colour_of("rollout", {}) == COLOURS[0]
    taken: dict[str, str] = {}
    assert len({colour_of(f"f{i}", taken) for i in range(len(COLOURS))}) == len(COLOURS)


def test_smoothing_begins_at_the_first_value() -> None:
    # weight 0.5: (0.5 * 4) / 0.5 = 4, then (0.5 * 2 + 0.5 * 0) / 0.75
    assert smoothed([(1, 4.0), (2, 0.0)], 0.5) == [(1, 4.0), (2, pytest.approx(4 / 3))]


def test_samples_are_searched_sorted_and_equal_completions_are_one() -> None:
    def completion(text: str, reward: float | None) -> dict[str, Any]:
        return {"text": text, "reward": reward, "rewards": {}, "advantage": 0.0, "finish_reason": "stop"}

    def sample(step: int, *completions: dict[str, Any]) -> dict[str, Any]:
        return {"step": step, "version": step, "prompt": "2+2", "target": "4", "completions": list(completions)}

    low, high = sample(1, completion("five", 0.0), completion("FOUR", 0.5)), sample(2, *[completion("four", 1.0)] * 3)
    unscored = sample(3, completion("four", None))
    assert [(c["text"], count) for c, count in distinct(low["completions"])] == [("FOUR", 1), ("five", 1)]
    assert [count for _, count in distinct(high["completions"])] == [3]
    assert ordered([unscored, low, high], "high") == [high, low, unscored]
    assert ordered([unscored, high, low], "low") == [low, high, unscored]
    asked = {"search": "five", "low": "0.2", "step": "x", "sort": "high"}
    chosen = read_filters(asked)
    assert written_filters(chosen) == {"search": "five", "low": "0.2", "sort": "high"}
    assert fits(low, chosen) and not fits(high, chosen)


def test_of_a_folder_without_redis_the_files_are_shown(redis_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(make_config().to_yaml())
    line = {"version": 1, "time": 1.0, "reward/mean": 0.25, "eval/held/pass@1": 0.5, "eval/held/pass@1_stderr": 0.1}
    changed = {"step": 1, "time": 2.0, "control": "paused", "who": "ada", "old": False, "new": True, "entry": "1-0"}
    lines = [{"step": 1, **line, "eval/held/version": 0.0}, {"step": 2, **line, "eval/held/version": 1.0}, changed]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"step": 3, "rew')
    readers = Readers(connect(redis_url), ("old",), RunFolders(tmp_path / "runs"))
    assert readers.names() == ["old"]
    snapshot = readers.of("old").read()
    assert (snapshot.has_redis, snapshot.status["step"], [s["step"] for s in snapshot.steps]) == (False, 2, [1, 2])
    assert event_text(snapshot.events[0]) == "paused: False → True, by ada"
    drawn = {c.title: draw(c, {"old": snapshot}, markers=["settings"]) for charts in SECTIONS.values() for c in charts}
    assert [series["type"] for series in drawn["Evaluation"]] == ["line", "custom", "line"]
    assert drawn["Reward"][-1]["markLine"]["data"][0]["xAxis"] == 1
    assert drawn["Entropy"] == []
