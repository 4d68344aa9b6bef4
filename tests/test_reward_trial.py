"""Reward functions are called once before a run starts: what would fail for every group is said then, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders import for_each, make_config
from harness import quickstart_config, sluice, tiny_folder

from sluice.workers.rewards.trial import Trial, try_rewards

FUNCTIONS = """
import asyncio, multiprocessing, os, subprocess, sys, threading, time

def broken(completions, **kwargs):
    return [1 / (len(text) - len(text)) for text in completions]

def needs(completions, answers, **kwargs):
    return [0.0 for _ in completions]

def indexes(prompt, response, target):
    return float(response.split("<answer>")[1] == target)

def huge(completions, **kwargs):
    return [1e39 for _ in completions]

def sound(completions, answer, log_metric, trainer_state, **kwargs):
    print("loud")
    assert os.environ["SLUICE_RUN_KEY"] == ""
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return [float(text == right) for text, right in zip(completions, answer)]

def leaves_a_thread(completions, **kwargs):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return [0.0 for _ in completions]

def sleeps(completions, **kwargs):
    time.sleep(1000)

async def sleeps_async(completions, **kwargs):
    await asyncio.sleep(1000)

def pools(completions, **kwargs):
    with multiprocessing.Pool(1) as pool:
        return pool.map(len, completions)

def runs_a_program(completions, **kwargs):
    return [float(subprocess.run(["echo", "1"], capture_output=True).stdout) for _ in completions]

def leaves(completions, **kwargs):
    os._exit(3)

def allocates(completions, **kwargs):
    return [len(bytearray(8 << 30)) for _ in completions]
"""


def problems(folder: Path, *names: str, **reward: Any) -> list[str]:
    (folder / "mine.py").write_text(FUNCTIONS)
    functions = [{"function": f"{folder / 'mine.py'}:{name}"} for name in names]
    trial = Trial(
        section="dataset",
        prompt="2 + 2?",
        target="4",
        columns={"answer": "4"},
        completions=["No.", "4"],
        completion_ids=[[1, 2], [3]],
    )
    return try_rewards(make_config(reward={"functions": functions, **reward}), [trial])


def test_every_function_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    found = problems(tmp_path, "broken", "needs", "sound", "indexes", "huge", "pools", "runs_a_program", "allocates")
    for text, message in zip(
        found,
        [
            f"reward function broken raised ZeroDivisionError: division by zero ({tmp_path / 'mine.py'}:5)",
            "reward function needs takes answers, but the columns are answer: did you mean 'answer'? (dataset.path)",
            f"reward function indexes raised IndexError: list index out of range ({tmp_path / 'mine.py'}:11)",
            "reward function huge returned 1e+39: a reward is a float32",
            "reward function pools raised AssertionError: daemonic processes are not allowed to have children",
            "reward function allocates raised MemoryError",
        ],
        strict=True,
    ):
        assert message in text
        assert text.startswith("reward.functions: ") and "\n" not in text
    assert "the first prompt of dataset and the completions ['No.', '4']" in found[0]
    assert problems(tmp_path, "sound", "leaves_a_thread") == []


@for_each(
    ("name", "message"),
    [
        ("sleeps", "sleeps gave no answer within reward.time_limit_s = 1 s (MINE:27)"),
        ("sleeps_async", "sleeps_async gave no answer within reward.time_limit_s = 1 s"),
        ("leaves", "leaves took its process with it, which ended with exit code 3"),
    ],
)
def test_a_function_that_never_returns_is_named(tmp_path: Path, name: str, message: str) -> None:
    first, found = problems(tmp_path, "broken", name, time_limit_s=1.0)
    assert "broken raised ZeroDivisionError" in first
    assert message.replace("MINE", str(tmp_path / "mine.py")) in found


def test_a_run_whose_reward_fails_is_refused_before_it_starts_and_doctor_lists_all(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    functions = [{"function": f"{tmp_path / 'mine.py'}:broken"}]
    config = quickstart_config(tmp_path, tiny=tiny_folder(), reward__functions=functions, evaluation__datasets=[])
    done = sluice("run", str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert f"ZeroDivisionError: division by zero ({tmp_path / 'mine.py'}:5)" in done.stderr
    assert not (tmp_path / "runs").exists()
    functions += [{"function": f"{tmp_path / 'mine.py'}:needs"}]
    config = quickstart_config(tmp_path, tiny=tiny_folder(), reward__functions=functions, evaluation__datasets=[])
    done = sluice("doctor", str(config), cwd=tmp_path)
    assert done.returncode == 2
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem ")]
    assert [name in line for name, line in zip(("broken raised", "needs takes"), problems, strict=True)] == [True, True]
