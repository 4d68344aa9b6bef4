"""Several ranks train as one: the same gradients, publications and checkpoints, on any number of them.

Rank 0 is the test's own process; the others are real trainer processes that follow it.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import for_each, make_completion, make_config, make_episode, make_group, tiny_qwen
from harness import running

from sluice.common.config import Config
from sluice.common.errors import ConfigError, Diverged
from sluice.common.types import Episode, Group
from sluice.trainer.checkpoint import SavedTensors
from sluice.trainer.distributed.parallel import ParallelPolicy, open_policy, pad_micro_batches, shard_by_tokens
from sluice.trainer.distributed.ranks import Ranks
from sluice.trainer.micro_batches import build_micro_batches

STEPS_THAT_SHOW_GRADIENTS = {"learning_rate": 0.5, "eps": 1.0, "max_grad_norm": 100.0, "warmup_steps": 0}
"""With so large an epsilon AdamW moves a weight by about its gradient, not by its sign: equal weights mean equal gradients."""


@contextlib.contextmanager
def joined(size: int, folder: Path) -> Iterator[Ranks]:
    """This process as rank 0, with trainer processes as the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        log = folder / "ranks.log"
        argv = [sys.executable, "-W", "error::UserWarning:trainer", "-m", "sluice.trainer"]
        others = [
            stack.enter_context(running(argv, cwd=folder, log=log, RANK=str(rank), **world)) for rank in range(1, size)
        ]
        for name, value in {**world, "RANK": "0"}.items():
            patch.setenv(name, value)
        patch.setattr("sluice.trainer.distributed.ranks.COLLECTIVE_TIMEOUT_S", 60.0)
        ranks = Ranks.join()
        try:
            yield ranks
            ParallelPolicy(None, ranks).close()  # type: ignore[arg-type]
            assert [process.wait(20) for process in others] == [0] * (size - 1)
        except BaseException:
            print(log.read_text())
            torch.distributed.destroy_process_group()
            raise


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with joined(2, tmp_path_factory.mktemp("two")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen(seed=3, intermediate_size=50, head_dim=8).save_pretrained(folder)
    return folder


def config_of(model_folder: Path, **trainer: Any) -> Config:
    settings = {"local_batch_size": 2, "seq_len": 32, "device": "cpu", **STEPS_THAT_SHOW_GRADIENTS, **trainer}
    sampling = {"group_size": 3, "max_res_tokens": 20}
    return make_config(model={"path": str(model_folder)}, trainer=settings, sampling=sampling)


def make_groups(seed: int, *, num_groups: int = 3, group_size: int = 3) -> list[Group]:
    """Ragged groups, one completion of which has no reward."""
    rng = np.random.default_rng(seed)

    def episode(unscored: bool) -> Episode:
        length = int(rng.integers(1, 20))
        completion = replace(
            make_completion(length=length),
            token_ids=rng.integers(0, 50, length).astype(np.int32),
            rollout_logprobs=rng.normal(-4, 0.1, length).astype(np.float32),
        )
        return make_episode(completion, reward=None if unscored else 1.0)

    return [
        make_group(
            *(episode(unscored=(g, e) == (1, 0)) for e in range(group_size)),
            group_id=f"t{g}",
            prompt_ids=rng.integers(0, 50, int(rng.integers(2, 8))).astype(np.int32),
        )
        for g in range(num_groups)
    ]


def steps(policy: ParallelPolicy, *, first: int, last: int) -> list[dict[str, float]]:
    """Optimizer steps on batches that are a function of the step alone; their metrics."""
    found = []
    for step in range(first, last + 1):
        groups = make_groups(step)
        generator = torch.Generator().manual_seed(step)
        advantages = [torch.randn(len(group.episodes), generator=generator) for group in groups]
        metrics = policy.optimize(groups, advantages, step=step)
        found.append({name: value for name, value in metrics.items() if not name.startswith("time/")})
    return found


def opened(config: Config, ranks: Ranks | None = None) -> ParallelPolicy:
    return open_policy(config, end_token_ids=[], ranks=ranks)


def assert_same_weights(one: ParallelPolicy, other: ParallelPolicy, *, atol: float = 1e-6) -> None:
    torch.testing.assert_close(*(policy.snapshot(torch.float32) for policy in (one, other)), rtol=0, atol=atol)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "num_iterations": 2,
            "gradient_checkpointing": True,
            "loss": {"off_policy": "decoupled", "importance_max": 5.0},
        },
        {"lora": {"rank": 2}},
        {"max_grad_norm": 0.01, "learning_rate": 50.0, "weight_decay": 0.0, "loss": {"aggregation": "sequence_mean"}},
    ],
    ids=["plain", "iterations", "lora", "clipped"],
)
def test_two_ranks_make_the_steps_of_one(
    two_ranks: Ranks, model_folder: Path, parallel: str, settings: dict[str, Any]
) -> None:
    config = config_of(model_folder, parallel=parallel, **settings)
    alone, together = opened(config), opened(config, two_ranks)
    before = alone.snapshot(torch.float32)
    expected, found = (steps(policy, first=1, last=2) for policy in (alone, together))
    assert expected == [pytest.approx(metrics, rel=1e-5, abs=1e-6) for metrics in found]
    assert_same_weights(together, alone)
    moved = [float((weight - before[name]).abs().max()) for name, weight in alone.snapshot(torch.float32).items()]
    assert max(moved) > 0.01, "the steps are too small to show a wrong gradient"
    assert ("max_grad_norm" in settings) == (expected[0]["grad_norm"] > config.trainer.max_grad_norm)
    scored = [(group, e) for group in make_groups(2) for e in group.episodes if e.reward is not None]
    of_last = [(group.prompt_ids, e.completion.token_ids) for group, e in scored]
    (a, *_), (b, *_) = (policy.score(of_last) for policy in (alone, together))
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    for ours, theirs in zip(*(policy.logprobs_of(of_last) for policy in (alone, together)), strict=True):
        assert ours is not None and theirs is not None and ours.max() < 0
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_users_loss_is_that_of_every_rank(two_ranks: Ranks, model_folder: Path, tmp_path: Path) -> None:
    """Also where it replaces another during the run."""
    (tmp_path / "mine.py").write_text(
        "def f(config, tokens):\n    return -tokens.advantages * tokens.log_ratio.sinh()\n"
    )
    config = config_of(model_folder, parallel="ddp", loss={"loss": f"{tmp_path / 'mine.py'}:f"})
    alone, together = opened(config), opened(config_of(model_folder, parallel="ddp"), two_ranks)
    together.configure(config.trainer)
    expected, found = (steps(policy, first=1, last=2) for policy in (alone, together))
    assert expected == [pytest.approx(metrics, rel=1e-5, abs=1e-6) for metrics in found]
    assert_same_weights(together, alone)


def save(policy: ParallelPolicy, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return policy.save(folder)


def assert_same_checkpoint(a: Path, b: Path) -> None:
    for kind in ("model", "optimizer"):
        torch.testing.assert_close(*(SavedTensors(folder, kind).all() for folder in (a, b)), rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 2}}], ids=["weights", "lora"])
def test_a_checkpoint_is_read_by_any_number_of_ranks(
    two_ranks: Ranks, model_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """From two to one, training there, and back to two: nothing is changed on the way, nor what is published."""
    config = config_of(model_folder, parallel="fsdp", **settings)
    together = opened(config, two_ranks)
    steps(together, first=1, last=2)
    digests = save(together, tmp_path / "two")
    assert sorted(digests) == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(digests) == 4, "each rank writes what it holds"
    sizes = [(tmp_path / "two" / name).stat().st_size for name in ("model.safetensors", "model-00001.safetensors")]
    assert min(sizes) > 0.4 * sum(sizes)
    alone = opened(config)
    alone.restore(tmp_path / "two")
    save(alone, tmp_path / "one")
    assert_same_checkpoint(tmp_path / "two", tmp_path / "one")
    for full in (False, True):  # with an adapter: its base weights
        published = (policy.snapshot(torch.bfloat16, full=full) for policy in (together, alone))
        torch.testing.assert_close(*published, rtol=0, atol=0)
    expected = steps(together, first=3, last=3)
    assert steps(alone, first=3, last=3)[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    save(alone, tmp_path / "one-later")
    again = opened(config, two_ranks)
    again.restore(tmp_path / "one-later")
    save(again, tmp_path / "two-later")
    assert_same_checkpoint(tmp_path / "one-later", tmp_path / "two-later")


def test_three_ranks_go_on_from_two(two_ranks: Ranks, model_folder: Path, tmp_path: Path) -> None:
    config = config_of(model_folder, parallel="fsdp")
    together = opened(config, two_ranks)
    steps(together, first=1, last=1)
    save(together, tmp_path / "two")
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_parallel import config_of, joined, opened, save, steps
with joined(3, Path({str(tmp_path)!r})) as ranks:
    config = config_of(Path({str(model_folder)!r}), parallel="fsdp")
    policy = opened(config, ranks)
    policy.restore(Path({str(tmp_path / "two")!r}))
    save(policy, Path({str(tmp_path / "three")!r}))
    steps(policy, first=2, last=2)
    save(policy, Path({str(tmp_path / "three-later")!r}))
"""
    with running([sys.executable, "-c", program], cwd=tmp_path, log=tmp_path / "three.log") as process:
        assert process.wait(240) == 0, (tmp_path / "three.log").read_text()
    assert_same_checkpoint(tmp_path / "two", tmp_path / "three")
    steps(together, first=2, last=2)
    save(together, tmp_path / "two-later")
    later = (SavedTensors(tmp_path / name, "model").all() for name in ("two-later", "three-later"))
    torch.testing.assert_close(*later, rtol=0, atol=1e-6)


def test_shards_are_gathered_in_the_computing_precision_and_added_up_in_float32(
    two_ranks: Ranks, model_folder: Path
) -> None:
    """bfloat16 over two ranks is as far from float32 as bfloat16 on one, and the master weights are float32."""
    halves = config_of(model_folder, parallel="fsdp", autocast="bfloat16")
    exact, alone, together = opened(config_of(model_folder)), opened(halves), opened(halves, two_ranks)
    (expected,), (near,), (found,) = (steps(policy, first=1, last=1) for policy in (exact, alone, together))
    assert found["loss/policy"] == pytest.approx(expected["loss/policy"], rel=0.02)
    assert found["grad_norm"] == pytest.approx(near["grad_norm"], rel=0.02)
    assert_same_weights(together, exact, atol=5e-3)
    assert not all(w.equal(w.bfloat16().float()) for w in together.snapshot(torch.float32).values())


def test_one_gpu_for_several_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda:1 is one GPU for 2 ranks: set trainer.device=cuda"):
        Ranks(rank=1, size=2, local_rank=1).device("cuda:1")


@for_each("num_ranks", [1, 2, 3, 5])
def test_every_episode_goes_to_one_rank_with_its_advantage(num_ranks: int) -> None:
    def rows(groups: list[Group], advantages: list[torch.Tensor]) -> list[tuple[int, float, int]]:
        """(episode, advantage, number of tokens) each."""
        return [
            (id(episode), float(advantage), len(group.prompt_ids) + len(episode.completion.token_ids))
            for group, values in zip(groups, advantages, strict=True)
            for episode, advantage in zip(group.episodes, values, strict=True)
        ]

    groups, advantages = make_groups(7, num_groups=6, group_size=5), [torch.arange(5.0) + 10 * g for g in range(6)]
    for packed in (False, True):
        shards = shard_by_tokens(groups, advantages, num_ranks=num_ranks, packed=packed)
        dealt = [rows(*shard) for shard in shards]
        assert sorted(row for own in dealt for row in own) == sorted(rows(groups, advantages))
        again = [sum(len(g.prompt_ids) * (len(g.episodes) - 1) for g in own) if packed else 0 for own, _ in shards]
        loads = [sum(num for _, _, num in own) - less for own, less in zip(dealt, again, strict=True)]
        assert max(loads) - min(loads) <= 27, "no rank is further from another than the longest sequence"
    assert sum(len(own) for own, _ in shards) <= 6 + 2 * num_ranks, "groups stay together as far as the balance allows"


def test_a_rank_with_fewer_micro_batches_gets_passes_without_a_loss_token() -> None:
    groups = make_groups(1)
    batches = build_micro_batches(groups, [torch.ones(3)] * 3, max_tokens=60)
    assert pad_micro_batches(batches, count=len(batches)) == batches
    first, *idle = pad_micro_batches(batches[:1], count=len(batches))
    assert first is batches[0] and len(idle) == len(batches) - 1 > 0
    assert not any(batch.loss_mask.any() for batch in idle)


def test_a_step_of_fewer_sequences_than_ranks_is_that_of_one(two_ranks: Ranks, model_folder: Path) -> None:
    config = config_of(model_folder, parallel="fsdp")
    group, advantages = make_groups(1, num_groups=1, group_size=1), [torch.ones(1)]
    shards = shard_by_tokens(group, advantages, num_ranks=2)
    assert [len(groups) for groups, _ in shards] == [1, 1]
    assert shards[1][0][0].episodes[0].reward is None
    alone, together = opened(config), opened(config, two_ranks)
    for policy in (alone, together):
        policy.optimize(group, advantages, step=1)
    assert_same_weights(together, alone)


LOSSES: list[dict[str, Any]] = [
    {"loss": {"loss": "grpo", "aggregation": "sequence_mean"}},
    {"loss": {"loss": "gspo", "aggregation": "fixed_horizon", "horizon": 20}},
    {"loss": {"loss": "cispo", "off_policy": "decoupled", "importance_max": 5.0}, "num_iterations": 2},
    {"loss": {"loss": "sapo"}, "packing": "off"},
    {"loss": {"loss": "reinforce"}, "lora": {"rank": 2}},
    {"loss": {"loss": "dppo"}},
    {"mask_truncated": True},
]


def test_what_has_no_gradient_is_not_computed_and_the_step_is_the_same(two_ranks: Ranks, model_folder: Path) -> None:
    ran: list[int] = []
    for settings in LOSSES:
        off, auto = (opened(config_of(model_folder, skip_zero_gradient=s, **settings)) for s in ("off", "auto"))
        spread = opened(config_of(model_folder, **settings), two_ranks)
        for policy in (off, auto):
            layer = policy._policy.model.get_submodule("model.layers.0" if "lora" not in settings else "base_model")
            layer.register_forward_hook(lambda *_: ran.append(1))
        for step, shares in enumerate(
            ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0)), start=1
        ):  # the second has no gradient at all
            groups = make_groups(step)
            advantages = [torch.tensor([2.0, -1.0, 0.0]) * share for share in (*shares, 0.0)]
            counts, found = [], []
            for policy in (off, auto, spread):
                ran.clear()
                found.append(policy.optimize(groups, advantages, step=step))
                counts.append(len(ran))
            assert found[0]["loss/policy"] == pytest.approx(found[1]["loss/policy"], abs=1e-6)
            assert found[1]["loss/policy"] == pytest.approx(found[2]["loss/policy"], abs=1e-6)
            if settings != {"loss": {"loss": "dppo"}}:
                assert counts[1] < counts[0] and (step != 2 or counts[1] == settings.get("num_iterations", 1)), settings
                assert found[1]["loss/left_out_ratio"] >= 2 / 3
            else:
                assert found[1]["loss/left_out_ratio"] == pytest.approx(1 / 9), "the completion without a reward"
        assert_same_weights(auto, off)
        assert_same_weights(spread, off)


def test_ranks_of_a_run_that_diverged_still_hear_rank_0(two_ranks: Ranks, model_folder: Path) -> None:
    policy = opened(config_of(model_folder, parallel="ddp"), two_ranks)
    with pytest.raises(Diverged, match="10 optimizer steps in a row"):
        for step in range(1, 11):
            policy.optimize(make_groups(1), [torch.full([3], torch.nan)] * 3, step=step)
    assert policy.snapshot(torch.float32)
