"""Groups of one step that were sampled with different parameters: each is scored with its own, wherever logprobs are made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import make_completion, make_config
from harness import wait_for
from test_logprobs import naive_logprobs, sequences, tiny_model

from sluice.common.serialization import decode, encode
from sluice.common.types import Episode, Group, SamplingParams
from sluice.trainer.distributed.parallel import ParallelPolicy
from sluice.trainer.micro_batches import build_micro_batches
from sluice.trainer.step import train_on
from sluice.trainer.trained_policy import TrainedPolicy
from sluice.workers.reference import ReferenceModel

TEMPERATURES = (1.0, 0.5, 2.0, 0.5)


def groups_of(model, *, temperatures=TEMPERATURES) -> list[Group]:
    """One group per temperature whose rollout_logprobs are those of the model at it, by the naive formula."""
    prompts, completions = sequences(*((3, 4 + i) for i in range(2 * len(temperatures))))
    found = []
    for number, temperature in enumerate(temperatures):
        episodes = []
        for i in (2 * number, 2 * number + 1):
            logprobs = naive_logprobs(model, prompts[2 * number], completions[i], temperature)[0].detach().numpy()
            made = make_completion(length=len(logprobs))
            completion = replace(made, token_ids=completions[i], rollout_logprobs=logprobs)
            episodes.append(Episode(completion=completion, reward=float(i % 2), rewards={}, ref_logprobs=None))
        sampling = SamplingParams(n=2, max_tokens=16, temperature=temperature, seed=number)
        made_of = {"policy_version": 0, "prompt": "", "target": None, "timestamps": {}, "sampling": sampling}
        found.append(Group(group_id=f"t{number}", prompt_ids=prompts[2 * number], episodes=episodes, **made_of))
    return found


def ratio_max(groups: list[Group], model) -> float:
    config = make_config(trainer={"seq_len": 64, "device": "cpu"})  # the run was created at temperature 1
    policy = TrainedPolicy.of_run(model, config)
    metrics, _ = train_on(ParallelPolicy(policy), groups, config, step=1)
    return metrics["off_policy/ratio_max"]


def test_a_mixed_batch_is_on_policy_when_each_group_is_scored_as_it_was_sampled() -> None:
    model = tiny_model()
    groups = groups_of(model)
    assert ratio_max(groups, tiny_model()) == pytest.approx(1.0, abs=1e-4)
    forgotten = [replace(group, sampling=None) for group in groups]
    assert ratio_max(forgotten, tiny_model()) > 1.5, "the test would see a trainer that takes the run's temperature"


def test_rows_sampled_alike_share_passes_and_others_do_not() -> None:
    groups = groups_of(tiny_model())
    batches = build_micro_batches(groups, [torch.zeros(2)] * 4, max_tokens=1000)
    assert [batch.sampling and batch.sampling.temperature for batch in batches] == [1.0, 0.5, 2.0]
    assert [len(batch.input_ids) for batch in batches] == [2, 4, 2]
    alike = [replace(group, sampling=replace(group.sampling, temperature=0.7)) for group in groups if group.sampling]
    assert len(build_micro_batches(alike, [torch.zeros(2)] * 4, max_tokens=1000)) == 1


def test_a_group_keeps_how_it_was_sampled_on_its_way() -> None:
    (group,) = groups_of(tiny_model(), temperatures=(0.5,))
    again = Group.from_wire(decode(encode(group.to_wire())))
    assert again.sampling == group.sampling
    before = {name: value for name, value in group.to_wire().items() if name != "sampling"}
    assert Group.from_wire(before).sampling is None


def test_the_reference_scores_each_group_as_it_was_sampled() -> None:
    model = tiny_model()
    reference = ReferenceModel(model, max_batch_tokens=1000)
    groups = groups_of(model)

    def score(group: Group) -> list[np.ndarray]:
        pairs = [(group.prompt_ids, episode.completion.token_ids) for episode in group.episodes]
        assert group.sampling is not None
        return reference.forward(pairs, sampling=group.sampling.distribution)

    with ThreadPoolExecutor(len(groups)) as pool:
        with reference._model_lock:  # until all of them wait, so that they are computed together
            futures = [pool.submit(score, group) for group in groups]
            wait_for(lambda: len(reference._waiting) == len(groups), timeout=10, what="all groups to wait")
        rows = [future.result(timeout=30) for future in futures]
    for group, scored in zip(groups, rows, strict=True):
        for row, episode in zip(scored, group.episodes, strict=True):
            np.testing.assert_allclose(row, episode.completion.rollout_logprobs, atol=1e-4)
