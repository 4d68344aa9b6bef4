"""What a row, a completion or a user's error holds never acts on a terminal: it is escaped in displays, messages and logs."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import redis
from builders import admit_one, for_each, make_config, make_ledger, publish_policy, push_group
from harness import ROOT, environment

from sluice.common.keys import Keys
from sluice.common.monitoring.heartbeats import send_heartbeat
from sluice.common.monitoring.metric_stream import write_samples
from sluice.common.monitoring.printable import escape_log_records, printable
from sluice.common.run import RunRecord, create_run
from sluice.common.serialization import encode
from sluice.common.types import SamplingParams, Task

HOSTILE = "say \x1b[2J\x1b]0;title\x07 \x1b]52;c;QUJD\x07 \x9b31m \x7f \r gone\b\u202e"
SHOWN = r"say \x1b[2J\x1b]0;title\x07 \x1b]52;c;QUJD\x07 \x9b31m \x7f \r gone\x08\u202e"
ACTS = [character for character in HOSTILE if not character.isprintable()]


@for_each(
    ("text", "expected"),
    [
        (HOSTILE, SHOWN),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("é 漢字 👩\u200d🚀 \u00a0 עברית", "é 漢字 👩\u200d🚀 \u00a0 עברית"),
        ("\ud800 \u2028 \u2066", r"\ud800 \u2028 \u2066"),
        ("", ""),
    ],
)
def test_only_what_a_terminal_acts_on_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == printable(expected) == expected


def test_log_lines_are_escaped_with_their_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    escape_log_records()
    try:
        log = logging.getLogger("sluice.test")
        log.warning("group %s: %s", "t1", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("it failed")
    finally:
        logging.setLogRecordFactory(before)
    assert SHOWN in caplog.text and "ValueError" in caplog.text
    assert not [character for character in ACTS if character in caplog.text]


PROGRAM = """
import json, sys
from sluice.scripts.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit:
        pass
    print("=====", flush=True)
"""


def outputs(commands: list[list[str]], *, folder: Path, is_terminal: bool, **env: str) -> list[str]:
    """What each command prints, into a pipe or a terminal; there without its colours and line ends."""
    argv = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    env = environment(**env, PYTHONPATH=str(ROOT), COLUMNS="300", LINES="60", TERM="xterm")
    reader, writer = pty.openpty() if is_terminal else os.pipe()
    process = subprocess.Popen(argv, cwd=folder, env=env, stdin=writer, stdout=writer, stderr=writer)
    os.close(writer)
    text = b""
    with suppress(OSError):  # a terminal whose process has ended
        while more := os.read(reader, 1 << 16):
            text += more
    os.close(reader)
    assert process.wait(30) == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.decode().replace("\r\n", "\n")) if is_terminal else text.decode()
    return plain.split("=====\n")[:-1]


def test_prompts_completions_and_errors_are_shown_escaped(
    client: redis.Redis, keys: Keys, tmp_path: Path, redis_url: str
) -> None:
    create_run(client, keys.run, make_config(), assets={}, folder=str(tmp_path))
    RunRecord(client, keys).set_status("running")
    publish_policy(client, keys, 0)
    ledger = make_ledger(client, keys)
    group = admit_one(ledger)
    sampling = SamplingParams(n=2, max_tokens=8)
    task = Task(
        group_id=group,
        prompt_ids=np.array([5], np.int32),
        prompt=HOSTILE,
        target=HOSTILE,
        columns={},
        sampling=sampling,
    )
    ledger.store(group, "task", encode(task.to_wire()))
    ledger.store(group, "rollout", encode({"completions": [{"text": HOSTILE}] * 2}), version=0)
    ledger.config = make_config(lease={"max_attempts": 1})
    claim = ledger.claim(group, "reward", fields=())
    assert claim
    ledger.fail(claim, reason="RewardError", detail=f"{HOSTILE} at x.py:1\nTraceback {HOSTILE}")
    completion = {"reward": 1.0, "rewards": {}, "advantage": 0.5, "tokens": 3, "finish_reason": "stop", "text": HOSTILE}
    sample = {"step": 1, "group": "t9", "version": 0, "prompt": HOSTILE, "target": HOSTILE, "completions": [completion]}
    write_samples(client, keys, [sample], kept=10)
    for _ in range(4):
        other = push_group(ledger, until="rollout")
        claim = ledger.claim(other, "reward", fields=())
        assert claim
        ledger.fail(claim, reason="RewardError", detail=HOSTILE)
    send_heartbeat(client, keys, "reward@host:1", {"role": "reward", "alarm": HOSTILE})
    shows = [["samples"], ["dead"], ["dead", "--show", group], ["trace", group], ["trace", HOSTILE], ["status"]]
    data = [[words[0], "--json"] for words in (shows[0], shows[1], shows[-1])]
    for is_terminal in (False, True):
        env = {"SLUICE_REDIS_URL": redis_url, "SLUICE_RUN": keys.run}
        texts = outputs([*shows, *data], folder=tmp_path, is_terminal=is_terminal, **env)
        for words, text in zip([*shows, *data], texts, strict=True):
            assert not [character for character in ACTS if character in text], (words, is_terminal, text)
            assert "52;c;QUJD" in text, (words, is_terminal, text)
            if words in shows:
                assert r"\x1b]52;c;QUJD\x07" in text, (words, is_terminal, text)
    assert any(HOSTILE in alarm for alarm in json.loads(texts[-1])["alarms"]), "JSON is exact"
