"""`sluice.train` and `sluice.start` as a user calls them: from a script and from the kernel of a notebook, with real roles."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from harness import (
    LEASE,
    ROOT,
    alive,
    children,
    environment,
    fork_server,
    running,
    sluice,
    terminate,
    tiny_folder,
    wait_for,
)
from hub import hub
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

from sluice import load
from sluice.common.config.file import load_config

SMALL = {
    "group_size": 4,
    "dataset__max_req_tokens": 24,
    "sampling__max_res_tokens": 40,
    "replay_buffer__batch_size": 4,
    "trainer": {"seq_len": 64, "local_batch_size": 64, "learning_rate": 2e-4},
    "checkpoint__every_steps": 1000,
    "dashboard__enabled": False,
    **{f"lease__{key}": value for key, value in LEASE.items()},
}
REWARD = """
import json, re, sys
import sluice

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

def answer_of(text):
    found = ANSWER.search(text)
    return found[1].strip() if found else None

def right(completions, target, **columns):
    return [float(answer_of(text) == wanted) for text, wanted in zip(completions, target)]
"""
TRAINED = """
run = sluice.train(steps=3, rewards=[right, {{"function": answer_length, "kwargs": {{"unit": 10}}}}], **{given})
print(json.dumps({{
    "folder": str(run.folder), "rewards": list(run.metrics()["reward/mean"]), "status": run.status()["status"],
    "columns": list(run.samples(count=2).columns), "trained": run.ledger()["trained"], "holds": run.ledger()["holds"],
    "png": run.plot("reward/mean", "entropy")._repr_png_()[:4].decode("latin-1"), "answer": run.chat("What is 47+38?"),
    "exported": sorted(path.name for path in run.export("exported").iterdir()), "torch": "torch" in before,
}}))
"""
LENGTH = """
def answer_length(completions, unit, **columns):
    return [len(text) / unit for text in completions]

before = set(sys.modules)
"""


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """What a small run is called with; its rows in memory."""
    tiny = tiny_folder()
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()[:200]]
    return {
        **SMALL,
        "model": str(tiny / "model"),
        "dataset": rows,
        "policy_store__path": str(folder / "policies"),
        **more,
    }


def script(folder: Path, text: str) -> list[str]:
    (folder / "job.py").write_text(text)
    return [sys.executable, "-P", "job.py"]


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def output(folder: Path) -> str:
    return (folder / "output.log").read_text()


def steps_of(folder: Path) -> int:
    """Steps that the one run in a folder has reported."""
    return sum(path.read_text().count('"reward/mean"') for path in folder.glob("runs/*/metrics.jsonl"))


def test_a_script_trains_with_functions_of_its_own_and_looks_at_what_came_out(tmp_path: Path) -> None:
    text = REWARD + LENGTH + TRAINED.format(given=arguments(tmp_path))
    with running(script(tmp_path, text), cwd=tmp_path, log=tmp_path / "output.log") as process:
        assert process.wait(200) == 0, output(tmp_path)
    told = json.loads(output(tmp_path).splitlines()[-1])
    folder = run_folder(tmp_path)
    assert (told["folder"], told["status"], told["trained"], told["holds"]) == (str(folder), "finished", 12, True)
    assert len(told["rewards"]) == 3
    assert {"prompt", "completion", "advantage", "reward/right", "reward/answer_length"} <= set(told["columns"])
    assert told["png"] == "\x89PNG" and told["answer"] and "model.safetensors" in told["exported"]
    assert not told["torch"], "a program that only starts runs need not load torch"
    assert len(list(folder.glob("rewards_*.py"))) == 2 and (folder / "rows.jsonl").is_file()
    assert "step 3/3  reward" in output(tmp_path) and "ledger     admitted 12" in output(tmp_path)
    assert not [path for path in folder.rglob("*") if path.stat().st_mode & 0o077], "no other user reads it"


def test_ctrl_c_ends_the_run_in_order_and_it_can_be_resumed(tmp_path: Path) -> None:
    text = REWARD + f"run = sluice.train(steps=100000, rewards=right, name='mine', **{arguments(tmp_path)!r})"
    with running(script(tmp_path, text), cwd=tmp_path, log=tmp_path / "output.log") as process:
        wait_for(lambda: steps_of(tmp_path) >= 2, timeout=60, what="two steps")
        family = children(process.pid)
        assert terminate(process, number=signal.SIGINT, timeout=100) != 0
        assert not alive(family)
    folder = run_folder(tmp_path)
    assert "stopping: the trainer finishes its step" in output(tmp_path) and "KeyboardInterrupt" in output(tmp_path)
    done = json.loads((folder / "summary.json").read_text())["steps"]
    assert done >= 2 and list((folder / "checkpoints").glob(f"step-*{done}"))
    text = "import sluice\nrun = sluice.start(resume='runs/mine')\n"
    text += f"run.set({{'trainer.num_steps': {done + 100}}})\n"
    text += "run.pause()\nprint(run.status()['paused'] is not None)\nrun.resume()\nrun.stop()\n"
    text += "print(sluice.load('runs/mine').status()['status'])"
    with running(script(tmp_path, text), cwd=tmp_path, log=tmp_path / "output.log") as process:
        assert process.wait(100) == 0, output(tmp_path)
    assert "True" in output(tmp_path) and output(tmp_path).splitlines()[-1] == "stopped"


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    text = REWARD + f"sluice.train(steps=100000, rewards=right, **{arguments(tmp_path)!r})"
    with running(script(tmp_path, text), cwd=tmp_path, log=tmp_path / "output.log") as process:
        wait_for(lambda: steps_of(tmp_path) >= 1, timeout=60, what="a step")
        family = children(process.pid)
        (trainer,) = [p for p in family if "sluice.trainer" in " ".join(p.cmdline())]
        trainer.suspend()  # it cannot finish its step
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping: " in output(tmp_path), timeout=20, what="the first to be heard")
        began = time.monotonic()
        assert terminate(process, number=signal.SIGINT, timeout=60) != 0
        assert time.monotonic() - began < 30
        wait_for(lambda: not alive(family), timeout=10, what="all processes to end")


def test_what_is_wrong_is_raised_in_the_words_of_the_command_line_and_leaves_nothing(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n')
    given = arguments(tmp_path, dataset=str(rows), steps=2)
    text = REWARD + (
        "for asked in ({}, {'dataset__target_column': 'answer'}):\n"
        f"    try:\n        sluice.train(rewards=broken, **{given!r}, **asked)\n"
        "    except sluice.SluiceError as error:\n        print(type(error).__name__, error, file=open('said', 'a'))\n"
    )
    text = text.replace(
        "for asked",
        "def broken(completions, target, **columns):\n    return [1 / 0 for text in completions]\n\nfor asked",
    )
    with running(script(tmp_path, text), cwd=tmp_path, log=tmp_path / "output.log") as process:
        assert process.wait(100) == 0, output(tmp_path)
    column, reward = (tmp_path / "said").read_text().splitlines()
    assert (
        column.startswith("ConfigError dataset.target_column = 'target'") and "has the columns prompt, answer" in column
    )
    assert reward.startswith("ConfigError reward.functions: ") and "ZeroDivisionError" in reward
    assert not list((tmp_path / "runs").iterdir()), "nothing has begun"
    assert "error: " not in output(tmp_path), "it is raised, not printed"


Kernel = tuple[KernelManager, BlockingKernelClient]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """A notebook's kernel in the folder of the test."""
    fork_server()  # a process of ours that is no child of the kernel
    manager, client = start_new_kernel(cwd=str(tmp_path), env=environment(PYTHONPATH=str(ROOT)), startup_timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def executed(client: BlockingKernelClient, code: str, *, begun: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run a cell; what it shows by MIME type, and its `error`. `begun` is called once the cell runs."""
    shown: dict[str, Any] = {}

    def note(message: dict[str, Any]) -> None:
        content = message["content"]
        shown.update(content.get("data", {}))
        if message["msg_type"] == "error":
            shown["error"] = "\n".join(content["traceback"])

    if begun is None:
        client.execute_interactive(code, timeout=200, output_hook=note)
        return shown
    identity = client.execute(code)
    begun()
    while True:
        message = client.get_iopub_msg(timeout=100)
        if message["parent_header"].get("msg_id") == identity:
            note(message)
            if message["content"].get("execution_state") == "idle":
                return shown


def test_a_notebooks_interrupt_ends_the_run_in_order_and_the_next_cells_have_it(tmp_path: Path, kernel: Kernel) -> None:
    manager, client = kernel
    executed(client, REWARD)

    def interrupt() -> None:
        wait_for(lambda: steps_of(tmp_path) >= 2, timeout=60, what="two steps")
        manager.interrupt_kernel()

    cell = f"run = sluice.train(steps=100000, rewards=[right], **{arguments(tmp_path)!r})"
    shown = executed(client, cell, begun=interrupt)
    assert "error" not in shown, shown["error"]
    assert "<progress" in shown["text/html"] and "<polyline" in shown["text/html"] and "ledger" in shown["text/html"]
    assert shown["text/plain"].count("step") < 60 and "\x1b[" not in shown["text/plain"]
    after = executed(client, "run.status()['status'], len(run.metrics()) >= 2")
    assert after["text/plain"] == "('stopped', True)"


def test_killing_the_notebooks_process_leaves_no_process_behind(tmp_path: Path, kernel: Kernel) -> None:
    _, client = kernel
    executed(client, REWARD)
    shown = executed(
        client, f"import os\nrun = sluice.start(steps=100000, rewards=[right], **{arguments(tmp_path)!r})\nos.getpid()"
    )
    pid = int(shown["text/plain"])
    wait_for(lambda: steps_of(tmp_path) >= 1, timeout=60, what="a step")
    family = children(pid)
    names = " ".join(alive(family))
    assert all(part in names for part in ("sluice.scripts.api.child", "sluice.trainer", "-Q reward")), names
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(family), timeout=40, what="all processes to end")
    folder = run_folder(tmp_path)
    done = json.loads((folder / "summary.json").read_text())["steps"]
    assert list((folder / "checkpoints").glob(f"step-*{done}")), "it ended in order"


def test_the_notebook_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tiny_folder(700))
    for name, value in environment(PYTHONPATH=str(ROOT)).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "docs" / "tutorials" / "python.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [str(output.get("data", {}).get("text/plain", output.get("text", ""))) for output in shown]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("admitted 192 = trained 192" in text for text in texts)
    assert "(192, 192, True)" in texts and "'stopped'" in texts
    assert any("<answer>" in text for text in texts)
    assert "an object of type _thread.lock" in texts[-1]
    assert not [
        process for process in psutil.Process().children(recursive=True) if "api.child" in " ".join(process.cmdline())
    ]


def test_commands_read_a_run_of_python_chat_answers_line_by_line_and_export_uploads(tmp_path: Path) -> None:
    text = REWARD + f"sluice.train(steps=2, rewards=right, name='mine', **{arguments(tmp_path)!r})"
    with running(script(tmp_path, text), cwd=tmp_path, log=tmp_path / "output.log") as process:
        assert process.wait(100) == 0, output(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = sluice("ledger", str(tmp_path / "runs" / "mine"), "--json", cwd=elsewhere)
    assert json.loads(done.stdout)["trained"] == 8, done.stderr
    assert (
        load_config(tmp_path / "runs" / "mine" / "run.yaml").to_yaml()
        == (tmp_path / "runs" / "mine" / "config.yaml").read_text()
    )
    assert load(tmp_path / "runs" / "mine").wait().status()["status"] == "finished"
    lines = tmp_path / "lines.txt"
    lines.write_text("What is 47+38?\n\nWhat is 12+13?\n")
    command = f"{sys.executable} -P -m sluice.scripts.cli chat runs/mine --max-tokens 40 < lines.txt"
    with running(["bash", "-c", command], cwd=tmp_path, log=tmp_path / "chat.log", PYTHONPATH=str(ROOT)) as process:
        assert process.wait(60) == 0
    answers = (tmp_path / "chat.log").read_text().splitlines()
    assert len(answers) >= 2 and "<think>" in answers[0], answers
    refused = sluice("chat", "runs/mine", "--checkpoint", "best", cwd=tmp_path)
    assert refused.returncode == 2 and "names no best checkpoint" in refused.stderr
    pushed("runs/mine", cwd=tmp_path)


def pushed(run: str, *, cwd: Path) -> None:
    """Check `sluice export --push-to-hub` on a hub that takes a model, one that refuses it, and none."""

    def push(**env: str) -> tuple[int, str]:
        argv = [sys.executable, "-P", "-m", "sluice.scripts.cli", "export", run, "--push-to-hub", "me/model"]
        log = cwd / f"push-{len(list(cwd.glob('push-*')))}.log"
        with running(
            argv, cwd=cwd, log=log, PYTHONPATH=str(ROOT), HF_HOME=str(cwd / "hf"), HF_HUB_OFFLINE="0", **env
        ) as process:
            return process.wait(100), log.read_text()

    with hub() as server:
        code, said = push(HF_ENDPOINT=server.url, HF_TOKEN="hf_token")
        assert code == 0 and f"is at {server.url}/me/model" in said, said
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= server.files.keys()
    assert server.created == [{"name": "model", "organization": "me", "visibility": "private"}]
    assert b"Step 2 of the run `mine`" in server.files["README.md"]
    with hub(refuses=True) as server:
        code, said = push(HF_ENDPOINT=server.url, HF_TOKEN="hf_token")
    assert code == 2 and "error: upload to me/model: 403 Forbidden" in said and "Traceback" not in said, said
    code, said = push(HF_ENDPOINT="http://127.0.0.1:1", HF_TOKEN="hf_token")
    assert code == 2 and "error: upload to me/model: " in said and "Traceback" not in said, said
    code, said = push(HF_TOKEN="")
    assert code == 2 and "no token of the Hugging Face Hub" in said
