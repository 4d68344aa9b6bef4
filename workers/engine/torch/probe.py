"""Whether the torch engine decodes a model exactly: a batch of ragged prompts, each completion scored afresh.

What it cannot serve shows here, by whatever name: windows, recurrent or other states than keys and values, positions or
biases that depend on the batch, masks of a form of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sluice.common.errors import ConfigError
from sluice.common.models.probe import COMPARED, difference, draw_ids, fresh_logprobs, probe_lengths
from sluice.common.types import Completion, SamplingParams
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.serving import SequenceGroup
from sluice.workers.engine.torch.running_batch import RunningBatch

_ADVICE = (
    "Use another model, set trainer.seq_len (or rollout.max_model_len) below its window or original length, or use "
    "rollout.engine=vllm"
)


@torch.inference_mode()
def check_decoding(model: PreTrainedModel, *, max_model_len: int, bound: float) -> None:
    """Check that prefill and decoding give every token the logprob of a fresh forward pass. Raises ConfigError.

    model: in eval mode, with any finite weights, on its device. bound: in nats (`common.models.probe.difference`).
    """
    name = f"the torch engine cannot serve {type(model).__name__}"

    def decoded(seed: int) -> tuple[list[Tensor], list[Tensor]]:
        completions = _decode(model, max_model_len=max_model_len, seed=seed)
        found = [torch.from_numpy(completion.rollout_logprobs) for _, completion in completions]
        expected = [
            fresh_logprobs(
                model, torch.cat([prompt, torch.from_numpy(one.token_ids).to(prompt)]), count=len(one.token_ids)
            )
            for prompt, one in completions
        ]
        return found, expected

    needs = f"it needs a decoder whose whole state is the keys and values of every token. {_ADVICE}"
    differs = difference(model, decoded, longest=max_model_len, bound=bound, refused=name, advice=needs)
    if differs is not None:
        raise ConfigError(
            f"{name} exactly: logprobs differ from those of each sequence alone by {differs:.2g} nats. It needs full attention "
            f"over all tokens (no window), with positions that do not depend on the batch or its mask. {_ADVICE}"
        )


def _decode(model: PreTrainedModel, *, max_model_len: int, seed: int) -> list[tuple[Tensor, Completion]]:
    """Return prompts and completions of a batch to which rows are added while others run."""
    lengths = probe_lengths(model.config, longest=max_model_len)
    groups = []
    for i, length in enumerate(lengths, start=seed):
        new = min(COMPARED, length - 1)
        sampling = SamplingParams(n=1, max_tokens=new, seed=i)
        prompt = draw_ids(model, length - new, seed=i).int().cpu().numpy()
        groups.append(
            SequenceGroup(request=GenerationRequest(group_id=f"probe {i}", prompt_ids=prompt, sampling=sampling))
        )
    batch = RunningBatch(model, eos_token_ids=(), max_sequences=len(groups), max_model_len=max_model_len)
    batch.admit(groups[::2], version=0)
    finished = batch.step()
    if groups[1::2]:
        batch.admit(groups[1::2], version=0)
    while batch.sequences:
        finished += batch.step()
    return [
        (torch.from_numpy(sequence.group.request.prompt_ids).long().to(model.device), completion)
        for sequence, completion in finished
    ]
