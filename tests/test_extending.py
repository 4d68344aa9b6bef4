"""The worked examples of extending.md and custom_loss.md, for real; where a user's code is found, and what it never displaces."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from builders import make_config, make_episode, save_tiny_qwen
from test_parallel import make_groups

from sluice.common.config import Config, RewardFunction
from sluice.common.config.file import load_config
from sluice.common.errors import ConfigError, PolicyNotFound
from sluice.common.keys import Keys
from sluice.common.paths import with_absolute_paths
from sluice.common.policies.store import PolicyStore
from sluice.scripts.launcher.preflight import preflight
from sluice.trainer.distributed.parallel import open_policy
from sluice.trainer.step import train_on
from sluice.workers.rewards.loading import load_reward_functions

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS / "extending.md", DOCS / "tutorials" / "custom_loss.md"]
REWARDS = {"functions": [{"function": "sluice.workers.rewards.MathReward"}]}


def write_example(name: str, folder: Path) -> Path:
    """A file of the pages, written out."""
    pages = "".join(page.read_text() for page in PAGES)
    (text,) = re.findall(rf"^```python\n(# {name}\n.*?)^```$", pages, re.M | re.S)
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen(tmp_path_factory.mktemp("model"))


def config_of(model_folder: Path, **trainer: Any) -> Config:
    settings = {"seq_len": 32, "device": "cpu", "warmup_steps": 0, "learning_rate": 0.01, **trainer}
    return make_config(model={"path": str(model_folder)}, trainer=settings, sampling={"max_res_tokens": 20})


def config_file(folder: Path, model: Path, **trainer: Any) -> Path:
    """A run.yaml beside a user's files."""
    data = {"model": {"path": str(model)}, "dataset": {"path": "none"}, "reward": REWARDS, "trainer": trainer}
    (folder / "run.yaml").write_text(str(data))
    return folder / "run.yaml"


def one_step(config: Config) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """A training step on a batch of its own; metrics and weights after it."""
    policy = open_policy(config, end_token_ids=[])
    groups = make_groups(1)
    for reward, group in enumerate(groups):
        group.episodes[-1] = make_episode(group.episodes[-1].completion, reward=-float(reward))
    metrics, _ = train_on(policy, groups, config, step=1)
    return metrics, policy.snapshot(torch.float32)


def test_the_loss_of_the_page_trains(tmp_path: Path, model_folder: Path) -> None:
    path = write_example("losses.py", tmp_path)
    metrics, weights = one_step(config_of(model_folder, loss={"loss": f"{path}:soft_clip", "clip_high": 0.3}))
    _, before = one_step(config_of(model_folder, learning_rate=1e-30))
    assert metrics["grad_norm"] > 0
    assert 0 < metrics["soft_clip/faded"] <= 1
    assert any(not weights[name].equal(before[name]) for name in weights)


def test_a_users_copy_of_grpo_gives_the_steps_of_grpo(tmp_path: Path, model_folder: Path) -> None:
    """As a loss with an advantage, and as a whole objective."""
    (tmp_path / "mine.py").write_text(
        "from sluice.trainer.loss import _grpo as copied, policy_loss\n"
        "def objective(config, **inputs):\n"
        "    loss, metrics = policy_loss(config, **inputs)\n"
        "    return loss, {'mine/loss': loss.detach()}\n"
        "def centred(groups):\n"
        "    return [(rewards - rewards.nanmean()).nan_to_num() for rewards in groups]\n"
    )
    path = tmp_path / "mine.py"
    expected = one_step(
        config_of(model_folder, advantage="none", skip_zero_gradient="off")
    )  # a user's own computes everything
    for settings in (
        {"loss": {"loss": f"{path}:copied"}, "advantage": f"{path}:centred"},
        {"objective": f"{path}:objective", "advantage": "none"},
    ):
        metrics, weights = one_step(config_of(model_folder, **settings))
        assert metrics["loss/policy"] == expected[0]["loss/policy"]
        torch.testing.assert_close(weights, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("body", "settings", "message"),
    [
        ("def f(config): return 0", {"loss": {"loss": "mine.py:f"}}, r"trainer.loss.loss: '.*mine.py:f' fails .*TypeError"),
        ("def f(config, tokens): return tokens.logprobs.sum()", {"loss": {"loss": "mine.py:f"}}, r"one loss a token"),
        ("def f(config, tokens): return tokens.mask * 1.0", {"loss": {"loss": "mine.py:f"}}, r"does not require grad"),
        ("def g(): pass", {"loss": {"loss": "mine.py:f"}}, r"trainer.loss.loss: .* has no 'f'; did you mean 'g'\?|define it"),
        ("1 / 0", {"objective": "mine.py:f"}, r"trainer.objective: .* failed with ZeroDivisionError"),
        ("def f(groups): return groups", {"advantage": "mine.py:f"}, r"trainer.advantage: .* a finite advantage"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_users_function_is_said_before_anything_starts(
    tmp_path: Path, model_folder: Path, body: str, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "mine.py").write_text(body + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        preflight(with_absolute_paths(load_config(config_file(tmp_path, model_folder, **settings))))
    assert "\n" not in str(caught.value)


def test_a_name_that_is_neither_known_nor_a_path_is_refused() -> None:
    for trainer in ({"loss": {"loss": "grppo"}}, {"advantage": "grppo"}):
        with pytest.raises(ValueError, match=r"'grppo' is not known.*or a path"):
            make_config(trainer=trainer)


def test_a_users_files_are_found_from_the_configs_folder_and_displace_nothing(
    tmp_path: Path, model_folder: Path
) -> None:
    """Not even where they are called as ours, in a checkout that one stands in, or as a module that is installed."""
    for name in ("common", "trainer", "workers", "scripts", "config", "redis", "types"):
        (tmp_path / f"{name}.py").write_text("def f(config, tokens):\n    return -tokens.log_ratio * 7\n")
    path = config_file(tmp_path, model_folder, loss={"loss": "trainer:f"}, advantage="none")
    program = """
import sys
from sluice.common.config.file import load_config
from sluice.common.loading import add_code_folder
config = load_config(sys.argv[1])
add_code_folder(config.code_folder)
from sluice.trainer.objective import check_functions
check_functions(config.trainer)
import redis, types
print([name for name in sys.modules if name in ("common", "workers", "scripts", "config")])
import common
print(sys.modules["trainer"].__file__, common.__file__)
print(redis.__version__, types.FunctionType.__name__)
"""
    argv = [sys.executable, "-c", program, str(path)]  # `python -c`, as `python -m`, puts the present folder first
    shown = subprocess.run(argv, cwd=DOCS.parent, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[:2] == ["[]", f"{tmp_path / 'trainer.py'} {tmp_path / 'common.py'}"]
    assert shown[2].endswith("function")


def test_rewards_are_found_as_modules_of_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they import beside them."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_scores").mkdir()
    (tmp_path / "my_scores" / "length.py").write_text("LIMIT = 3.0\n")
    (tmp_path / "my_scores" / "rewards.py").write_text(
        "from .length import LIMIT\ndef short(prompt, response, target):\n    return LIMIT - len(response)\n"
    )
    entries = [RewardFunction(function="my_scores.rewards.short")]
    (reward,) = load_reward_functions(entries, code_folder=str(tmp_path))
    assert reward.function("", "ab", None) == 1.0
    assert sys.path[0] != str(tmp_path) and str(tmp_path) in sys.path


def test_from_the_loop_to_the_formula_of_a_loss_are_six_calls(tmp_path: Path, model_folder: Path) -> None:
    """Trainer.train -> _train_on -> train_on, and from there as the stack shows."""
    (tmp_path / "traced.py").write_text(
        "import inspect\nfound = []\n"
        "def f(config, tokens):\n"
        "    found[:] = [frame.function for frame in inspect.stack()]\n"
        "    return -tokens.log_ratio * tokens.advantages\n"
    )
    one_step(config_of(model_folder, loss={"loss": f"{tmp_path / 'traced.py'}:f"}))
    names = sys.modules[next(name for name in sys.modules if name.startswith("sluice_user_traced"))].found
    assert names[: names.index("train_on") + 1] == ["f", "policy_loss", "optimize", "optimize", "train_on"]


def test_paths_to_files_are_stored_as_absolute_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    (tmp_path / "grpo").touch()  # a file called as a loss is none
    trainer = {"loss": {"loss": "grpo"}, "advantage": "mine.py:f", "objective": "pkg.mine:g"}
    config = with_absolute_paths(load_config(config_file(tmp_path, Path("m"), **trainer)))
    assert config.code_folder == str(tmp_path)
    assert (config.trainer.loss.loss, config.trainer.objective) == ("grpo", "pkg.mine:g")
    assert config.trainer.advantage == f"{tmp_path / 'mine.py'}:f"


def test_the_transport_of_the_page_carries_policies(
    client: redis.Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole weights and deltas, to a worker that keeps up; and what is not needed any more is freed."""
    names: dict[str, Any] = {}
    exec(compile(write_example("object_store.py", tmp_path).read_text(), "object_store.py", "exec"), names)
    url = f"file://{tmp_path}/store"
    monkeypatch.setattr("sluice.common.policies.reader.open_transport", lambda *_: names["ObjectStoreTransport"](url))
    config = make_config(policy_store={"keep": 2, "full_every": 2}).policy_store
    trainer, worker = PolicyStore(client, keys, config), PolicyStore(client, keys, config)
    weights = {"w": torch.zeros(4000, dtype=torch.bfloat16), "b": torch.ones(3)}
    for version in range(6):
        weights = {**weights, "w": weights["w"].clone().index_fill_(0, torch.tensor([version]), version + 1)}
        manifest = trainer.publish(version, weights, step=version, parent=version - 1)
        found = worker.fetch(version)[1]
        assert all(found[name].equal(weights[name]) for name in weights)
        assert (version == 0) == (manifest.base < 0)
    with pytest.raises(PolicyNotFound):
        worker.fetch(1)
    stored = {int(path.name.split("-")[1]) for path in (tmp_path / "store").iterdir()}
    assert stored == {0, 4, 5}
    successor = PolicyStore(client, keys, config)
    trainer._transport.write(2, weights)  # what a killed trainer left
    successor.publish(6, weights, step=6, parent=5)
    assert 2 not in {int(path.name.split("-")[1]) for path in (tmp_path / "store").iterdir()}
