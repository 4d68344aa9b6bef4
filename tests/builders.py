"""Small builders with keyword arguments: a config, a ledger, payloads, and a group pushed through all its stages."""

from __future__ import annotations

import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis
import yaml

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger.ledger import Ledger
from sluice.common.ledger.scripts import Scripts
from sluice.common.run import Run
from sluice.common.serialization import encode
from sluice.common.types import Completion, Episode, Group, SamplingParams, Scores, Task

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

    from sluice.trainer.micro_batches import MicroBatch

_MINIMAL: dict[str, Any] = {
    "model": {"path": "model"},
    "dataset": {"path": "train.jsonl", "max_req_tokens": 8},
    "sampling": {"group_size": 2, "max_res_tokens": 8},
    "reward": {"functions": [{"function": "sluice.workers.rewards.MathReward"}]},
    "trainer": {"seq_len": 16, "num_steps": 1_000_000},
}


def for_each(
    names: str | tuple[str, ...], cases: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `pytest.mark.parametrize`, but one test: for many cases that cost next to nothing. A failure names its case."""
    names, cases = ((names,), [(case,) for case in cases]) if isinstance(names, str) else (names, list(cases))

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def every(**fixtures: Any) -> None:
            for case in cases:
                values = dict(zip(names, case, strict=True))
                try:
                    test(**fixtures, **values)
                except BaseException as error:
                    error.add_note(f"in the case {values}")
                    raise

        signature = inspect.signature(test)
        others = [parameter for name, parameter in signature.parameters.items() if name not in names]
        every.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return every

    return decorate


def minimal(**sections: Any) -> dict[str, Any]:
    """Data of a small valid config; a keyword replaces keys of one section: minimal(replay_buffer={"batch_size": 4})."""
    data = {name: dict(value) for name, value in _MINIMAL.items()}
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return data


def make_config(**sections: Any) -> Config:
    """That config."""
    return Config.model_validate(minimal(**sections))


def refusal(*overrides: str, text: str | None = None) -> str:
    """The message with which overrides of that config, or of a text, are refused."""
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(_MINIMAL) if text is None else text, overrides=overrides, source="x.yaml")
    return str(caught.value)


def make_ledger(client: redis.Redis, keys: Keys, *, worker: str = "w", **sections: Any) -> Ledger:
    """A ledger over `make_config(**sections)`."""
    return Ledger(client, keys, make_config(**sections), worker=worker)


def make_run(keys: Keys, folder: Path, **sections: Any) -> Run:
    """A run over `make_config(**sections)` that is not in Redis."""
    return Run(name=keys.run, keys=keys, config=make_config(**sections), assets={}, folder=str(folder))


def tiny_qwen(*, seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """A model of a few thousand weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "eos_token_id": 1}
    return Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes}))


def save_tiny_qwen(folder: Path, **changes: Any) -> Path:
    """`tiny_qwen` with a tokenizer of one letter per token."""
    tiny_qwen(**changes).save_pretrained(folder)
    for name, content in letter_tokenizer(50).items():
        (folder / name).write_bytes(content)
    return folder


def started_ledger(client: redis.Redis, keys: Keys, *, version: int = 0, worker: str = "w", **sections: Any) -> Ledger:
    """The same in a run that has published the versions 0 to `version`."""
    for published in range(version + 1):
        publish_policy(client, keys, published)
    return make_ledger(client, keys, worker=worker, **sections)


def letter_tokenizer(vocab_size: int) -> dict[str, bytes]:
    """Files of a tokenizer with one letter per token: id 0 is U+4E00."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(0x4E00 + token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def publish_policy(client: redis.Redis, keys: Keys, version: int, **made: int | None) -> int:
    """Move the policy pointer without weights; version n was trained in step n from version n - 1, or as `made` says."""
    usual = {"parent": version - 1, "step": version, "incarnation": 1}
    parent, step, incarnation = (usual[name] if made.get(name) is None else made[name] for name in usual)
    return int(Scripts(client, keys)("publish", version, parent, step, incarnation, f"digest-{version}", 0))


def task_payload(group_id: str, *, group_size: int = 2, target: str = "2") -> bytes:
    task = Task(
        group_id=group_id,
        prompt_ids=np.array([5, 6], np.int32),
        prompt="1+1",
        target=target,
        columns={"level": 1},
        sampling=SamplingParams(n=group_size, max_tokens=8),
    )
    return encode(task.to_wire())


def make_completion(*, version: int = 0, length: int = 3) -> Completion:
    return Completion(
        token_ids=np.arange(length, dtype=np.int32),
        rollout_logprobs=np.full(length, -0.5, np.float32),
        policy_versions=((version, length),),
        finish_reason="stop",
        text="2",
    )


def make_episode(completion: Completion, **changes: Any) -> Episode:
    """A scored completion."""
    return Episode(**{"completion": completion, "reward": 1.0, "rewards": {}, "ref_logprobs": None, **changes})


def make_group(*episodes: Episode, **changes: Any) -> Group:
    """A group of these episodes, on a prompt of three tokens."""
    parts = {"group_id": "t0", "policy_version": 0, "prompt": "", "target": None, "timestamps": {}}
    return Group(**{**parts, "prompt_ids": np.full(3, 50, np.int32), "episodes": list(episodes), **changes})


def rollout_payload(*, version: int = 0, group_size: int = 2) -> bytes:
    return encode({"completions": [make_completion(version=version).to_wire()] * group_size, "worker": "w"})


def random_completions(group_size: int, num_tokens: int) -> list[dict[str, Any]]:
    """As an engine returns them: random tokens and logprobs, four characters of text a token."""
    draw = np.random.default_rng(0)
    return [
        Completion(
            token_ids=draw.integers(0, 150_000, num_tokens).astype(np.int32),
            rollout_logprobs=-draw.random(num_tokens, np.float32),
            policy_versions=((0, num_tokens),),
            finish_reason="stop",
            text="word" * num_tokens,
        ).to_wire()
        for _ in range(group_size)
    ]


def reward_payload(*, rewards: tuple[float | None, ...] = (1.0, 0.0), name: str = "MathReward") -> bytes:
    return encode(Scores(reward=list(rewards), by_function={name: list(rewards)}).to_wire())


def evaluated_payload(*, rewards: tuple[float | None, ...], name: str = "MathReward", answer: str = "2") -> bytes:
    """Return the reward of an evaluation's group: every completion gives the same answer, in 3 tokens."""
    scores = Scores(reward=list(rewards), by_function={name: list(rewards)}).to_wire()
    count = len(rewards)
    return encode({**scores, "answers": [answer] * count, "lengths": [3] * count, "clipped": [False] * count})


def reference_payload(*, group_size: int = 2, length: int = 3) -> bytes:
    return encode([np.full(length, -0.25, np.float32)] * group_size)


def part_payload(group_id: str, stage: str) -> bytes:
    """Return what a worker would store for one stage."""
    others = {"rollout": rollout_payload, "reward": reward_payload, "reference": reference_payload}
    return task_payload(group_id) if stage == "task" else others[stage]()


def admit_one(ledger: Ledger) -> str:
    """Admit one group; fails when there is no credit."""
    admission = ledger.admit(1)
    assert admission.cursors, f"nothing admitted: {admission.stopped_by}"
    return f"t{admission.cursors[0]}"


def push_group(
    ledger: Ledger, *, version: int = 0, until: str = "ready", group_id: str | None = None, target: str = "2"
) -> str:
    """Admit a group (unless one is given) and store its results up to and including stage `until`: task, rollout or ready."""
    group_id = group_id or admit_one(ledger)
    assert ledger.store(group_id, "task", task_payload(group_id, target=target)) == ["rollout"]
    if until == "task":
        return group_id
    following = ledger.store(group_id, "rollout", rollout_payload(version=version), version=version)
    assert following is not None
    if until == "rollout":
        return group_id
    for stage in following:
        assert ledger.store(group_id, stage, part_payload(group_id, stage)) == []
    return group_id


_cursors = itertools.count()


def file_groups(ledger: Ledger, versions: list[int]) -> list[str]:
    """Ready groups of the given versions, however many: admission without a bound, and few round trips."""
    unbounded, holder = (10**9, 10**12, 10**6, 10**6), f"files/{next(_cursors)}"
    reply = ledger.scripts("admit", len(versions), *unbounded, 60_000, holder, "task")
    group_ids = [f"t{int(cursor)}" for cursor in reply[2:]]
    with ledger.client.pipeline(transaction=False) as pipe:
        for group_id, version in zip(group_ids, versions, strict=True):
            ledger.store(group_id, "task", task_payload(group_id), client=pipe)
            ledger.store(group_id, "rollout", rollout_payload(version=version), version=version, client=pipe)
            ledger.store(group_id, "reward", reward_payload(), client=pipe)
        pipe.execute()
    return group_ids


def micro_batch(seed: int, *, vocab_size: int = 50) -> MicroBatch:
    """Four random rows of 4 prompt and 6 completion tokens."""
    import torch

    from sluice.trainer.micro_batches import MicroBatch

    generator = torch.Generator().manual_seed(seed)
    return MicroBatch(
        input_ids=torch.randint(0, vocab_size, (4, 10), generator=generator),
        prompt_lengths=torch.full((4,), 4),
        completion_lengths=torch.full((4,), 6),
        rollout_logprobs=-4.0 + torch.rand(4, 6, generator=generator) * 0.1,
        ref_logprobs=None,
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]),
        loss_mask=torch.ones(4, 6, dtype=torch.bool),
    )
