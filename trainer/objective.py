"""What an optimizer step minimises, per micro-batch. Legend: B = sequences, T = completion tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sluice.common.config import LossConfig
from sluice.trainer.loss import policy_loss
from sluice.trainer.micro_batches import MicroBatch

Objective = Callable[[Tensor, MicroBatch, Tensor | None, int], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs [B, T], micro-batch, logprobs before the first of several optimizer steps [B, T] or none, the step's
normaliser) -> (loss, detached metrics): a scalar whose sum over the micro-batches of a step is the step's loss."""


def policy_objective(config: LossConfig) -> Objective:
    """`trainer.loss.policy_loss` on a micro-batch."""

    def objective(
        logprobs: Tensor, batch: MicroBatch, prox: Tensor | None, normaliser: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(
            config,
            policy_logprobs=logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages,
            loss_mask=batch.loss_mask,
            ref_logprobs=batch.ref_logprobs,
            prox_logprobs=prox,
            num_tokens=normaliser,
        )

    return objective
