"""The trial of a run's reward functions before it starts: each is called once, in a process of its own, so that what fails with
every completion, hangs or ends its process is said then, and not by a run that only loses groups.

    preflight  --JSON on stdin: functions, prompts-->  python -m sluice.workers.rewards.trial
               <--report, lines of JSON: calls, problems; or, over the time limit, its stack

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sluice.common.config import Config
from sluice.common.config.schema import RewardConfig
from sluice.common.errors import ConfigError, RewardError
from sluice.common.parent import die_with
from sluice.common.policies.signing import RUN_KEY
from sluice.workers.rewards.loading import LoadedReward, load_reward_functions
from sluice.workers.rewards.scoring import limit_memory, score_group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sluice.workers.prompt_source import Prompt

_LOAD_S = 600.0
"""Seconds for the import of the functions: a class may load a model."""
_FRAME = re.compile(r'File "(.+)", line (\d+)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One call of every function."""

    section: str
    "config section of the dataset that the prompt is from"
    prompt: Any
    target: str | None
    columns: dict[str, Any]
    completions: list[str]
    completion_ids: list[list[int]]

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, *, section: str) -> Trial:
        """Make a trial with a short completion, and the target as another."""
        completions = ["No.", prompt.target or "Yes."]
        return cls(
            section=section,
            prompt=prompt.prompt,
            target=prompt.target,
            columns=prompt.columns,
            completions=completions,
            completion_ids=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions],
        )


def try_rewards(config: Config, trials: Sequence[Trial]) -> list[str]:
    """Call every reward function once for each trial; return what is wrong with them, a sentence each."""
    reward = config.reward
    given = {
        "reward": reward.model_dump(mode="json"),
        "code_folder": config.code_folder,
        "max_steps": config.trainer.num_steps,
        "trials": [asdict(trial) for trial in trials],
    }
    calls = len(reward.functions) * len(trials)
    with tempfile.TemporaryFile("w+") as report, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(report.fileno()), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | {RUN_KEY: "", f"{RUN_KEY}_FILE": ""},  # as reward workers, which run user code, have it
            pass_fds=(report.fileno(),),
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(given).encode(), timeout=_LOAD_S + calls * reward.time_limit_s)
            ended = f"ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"did not end within {_LOAD_S:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        for file in (report, output):
            file.seek(0)
        return _problems(report.read(), output.read(), ended=ended, time_limit_s=reward.time_limit_s)


def _problems(report: str, output: str, *, ended: str, time_limit_s: float) -> list[str]:
    """Read the report: lines of JSON, each a call or a problem; the last may be missing, or the stack of a call over its time."""
    lines = [json.loads(line) for line in report.splitlines() if line.startswith("{")]
    problems: list[str] = [line["problem"] for line in lines if "problem" in line]
    if lines and "done" in lines[-1]:
        return problems
    calls = [line for line in lines if "name" in line]
    if not calls:
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        return [f"reward.functions: the process that imports them {ended}: {last}"]
    name, file = calls[-1]["name"], calls[-1]["file"]
    if re.search(r"^Timeout \(", report, re.MULTILINE):
        places = [f" ({path}:{line})" for path, line in _FRAME.findall(report) if path == file]
        what = f"gave no answer within reward.time_limit_s = {time_limit_s:g} s{places[0] if places else ''}"
    else:
        what = f"took its process with it, which {ended}"
    return [*problems, _told(f"reward function {name} {what}", calls[-1])]


def _told(text: str, call: dict[str, Any]) -> str:
    return (
        f"reward.functions: {text}. It was called once before the start, with the first prompt of {call['section']} and the "
        f"completions {call['completions']}: correct it, it must score any text"
    )


def _problem(reward: LoadedReward, trial: Trial, config: RewardConfig, *, max_steps: int) -> str | None:
    """Call a function; return what is wrong with it."""
    call = asdict(trial)
    section = call.pop("section")
    if text := reward.missing(trial.columns, has_target=trial.target is not None):
        return f"reward.functions: reward function {reward.name} {text} ({section}.path)"
    state = {"global_step": 0, "max_steps": max_steps}
    try:
        score_group([reward], aggregation=config.aggregation, trainer_state=state, **call)
    except RewardError as error:
        return _told(str(error), asdict(trial))
    return None


def main() -> None:
    report_fd, parent = map(int, sys.argv[1:])
    die_with(parent)
    multiprocessing.current_process().daemon = True  # as prefork children are: they may not have any of their own
    given = json.load(sys.stdin)
    config = RewardConfig.model_validate(given["reward"])
    with open(report_fd, "w", buffering=1) as report:
        try:
            rewards = load_reward_functions(config.functions, code_folder=given["code_folder"])
        except ConfigError as error:
            rewards = []
            print(json.dumps({"problem": str(error)}), file=report)
        limit_memory(config.memory_limit_mib)
        failed: set[str] = set()
        for trial in (Trial(**trial) for trial in given["trials"]):
            for reward in (each for each in rewards if each.name not in failed):
                call = {
                    "name": reward.name,
                    "file": reward.file,
                    "section": trial.section,
                    "completions": trial.completions,
                }
                print(json.dumps(call), file=report)
                # a thread of the C library's, which needs not the interpreter
                faulthandler.dump_traceback_later(config.time_limit_s, exit=True, file=report)
                if text := _problem(reward, trial, config, max_steps=given["max_steps"]):
                    failed.add(reward.name)
                    print(json.dumps({"problem": text}), file=report)
                faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"done": True}), file=report)
    os._exit(0)  # a user's thread may never end


if __name__ == "__main__":
    main()
