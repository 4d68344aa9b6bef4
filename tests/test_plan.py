"""`sluice plan` says what `sluice run` would start, and starts nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import for_each, make_config
from click.testing import CliRunner

from sluice.common.config.file import load_config
from sluice.scripts import cli
from sluice.scripts.commands.plan import make_plan
from sluice.scripts.launcher.roles import planned_workers

CONFIG = str(Path(__file__).parent.parent / "config" / "gsm8k_qwen3_1.7b.yaml")


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_tutorials_replica_table() -> None:
    """Policy 8, RewardActor 16, Trainer 4, Dataset 2; ReplayBuffer 1 is the one Redis."""
    shown = CliRunner().invoke(cli.cli, ["plan", CONFIG, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    numbers = {role["role"]: (role["min"], role["max"]) for role in found["roles"]}
    assert numbers["rollout"] == (8, 8)
    assert (numbers["reward"], numbers["trainer"], numbers["dataset"]) == ((16, 16), (4, 4), (2, 2))
    assert found["processes"] == {"min": 32, "max": 32}
    assert (found["groups_per_step"], found["groups_in_flight"]) == (2, 4)
    assert any(note.startswith("8 rollout workers for at most 4 groups") for note in found["notes"])


def test_it_counts_what_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    config = make_config(replicas={"rollout": {"min": 1, "max": 4}, "reward": {"min": 2, "max": 6}})
    found = make_plan(config, "x.yaml")
    for at_most, end in ((False, "min"), (True, "max")):
        workers = planned_workers(config, at_most=at_most)
        assert found["processes"][end] == len(workers) + 1  # the trainer
        for role in found["roles"][:-1]:
            assert role[end] == sum(queue == role["role"] for queue, _ in workers)
    (rollout,) = (role for role in found["roles"] if role["role"] == "rollout")
    assert rollout["gpus"] == [["0"], ["1"], ["0"], ["1"]]  # the last is the trainer's
    assert found["roles"][-1]["gpus"] == [["2"]]


def test_the_text_names_every_command_to_type() -> None:
    override = "replicas.reward={min: 1, max: 16}"
    shown = CliRunner().invoke(cli.cli, ["plan", CONFIG, override])
    assert shown.exit_code == 0, shown.output
    for line in (f"sluice create {CONFIG} '{override}' --name NAME", "sluice train --ranks 4", "# 1..16 times"):
        assert line in shown.output
    for queue in ("dataset", "rollout", "reference", "reward", "eval"):
        assert f"  celery -A sluice worker -Q {queue}\n" in shown.output


@for_each(
    ("overrides", "message"),
    [
        (["replicas.rollout={min: 0, max: 2}"], "rollout: min=0 would leave the run without a rollout worker"),
        (["replicas.reward={min: 3, max: 2}"], "max must be at least min"),
        (["replicas.reward={min: 3}"], "neither a count of processes nor {min: 1, max: 4}"),
        (["replicas.reward=-1"], "replicas.reward: -1 is neither a count"),
        (["replicas.trainer={min: 1, max: 2}"], "replicas.trainer"),
        (["replicas={rollout: {min: 1, max: 8}, eval: 0}"], "would hold 2 vLLM engines"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", CONFIG, *overrides])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_range_survives_the_stored_config() -> None:
    config = load_config(CONFIG, ["replicas.rollout={min: 1, max: 7}"])
    assert type(config).model_validate(config.model_dump()) == config
    assert config.replicas.bounds("rollout") == (1, 7)
    assert config.replicas.bounds("reward") == (16, 16)
