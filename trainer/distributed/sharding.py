"""One policy over several ranks: what wraps it, and which part of a tensor a rank holds.

    ddp     every rank holds all weights; gradients are added up once per optimizer step
    fsdp    every rank holds its rows of every weight (FSDP2); a layer is whole only while it computes, and gradients are
            added up at every micro-batch, so that no rank ever holds all of them

Gradients are sums over ranks, not means: each micro-batch's loss is already divided by the step's normaliser.
A sharded tensor lies in equal pieces along its first axis, rank after rank, the last ones shorter (torch.chunk).

One rank must not load torch's distributed packages, which take seconds: they are imported where there are several, and a
sharded tensor or module is known by its methods.
"""

# annotations are objects here, not texts: ddp checks those of `_add_up`
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sluice.common.errors import ConfigError
from sluice.trainer.distributed.ranks import Ranks


def is_sharded(ranks: Ranks, *, parallel: str, device: torch.device) -> bool:
    """Whether a rank holds only its rows. parallel: `ddp`, `fsdp`, or `auto`: fsdp on GPUs, ddp on CPUs."""
    return ranks.size > 1 and (parallel == "fsdp" or (parallel == "auto" and device.type != "cpu"))


def distributed(
    module: nn.Module, ranks: Ranks, *, parallel: str, device: torch.device, compute: torch.dtype
) -> nn.Module:
    """The module to run forward with gradients; `module` itself for a single rank and, sharded in place, for fsdp.

    parallel: as in `is_sharded`. compute: the precision in which fsdp gathers the
    layers' weights; gradients are reduced in float32. Weights must be equal on all ranks before (ddp copies rank 0's).
    Raises ConfigError where no layers are found to shard.
    """
    if ranks.size == 1:
        return module.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if not is_sharded(ranks, parallel=parallel, device=device):
        wrapped = DistributedDataParallel(module.to(device), gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, _add_up)
        return wrapped
    mesh = init_device_mesh(device.type, (ranks.size,))
    # the embedding, the head and the residual stream stay in float32, as under autocast on one rank
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other operation
    return module


def without_reduction(module: Any) -> AbstractContextManager[Any]:
    """For all but the last micro-batch of a step: ddp keeps gradients local; fsdp would have to keep them whole."""
    return module.no_sync() if hasattr(module, "no_sync") else nullcontext()


def release(module: Any) -> None:
    """After a forward pass without a backward one: fsdp's root module lets go of the weights that it gathered."""
    if hasattr(module, "reshard"):
        module.reshard()


def gathered(tensor: Any, dtype: torch.dtype) -> Tensor:
    """All of a tensor in a dtype. Of a sharded one every rank must ask; it travels in that dtype."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if _is_distributed(tensor) else tensor


def _is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Any, ranks: Ranks) -> Tensor | None:
    """What this rank keeps of a tensor in a checkpoint: its rows, or all where it is not sharded (rank 0); none = nothing."""
    if _is_distributed(tensor):
        local = tensor.to_local().detach()
        return local if local.shape[0] else None
    return tensor.detach() if ranks.rank == 0 else None


def own_rows(tensor: Any, ranks: Ranks) -> tuple[Tensor, int | None]:
    """This rank's memory of a tensor, and the row of the whole at which it begins; none = it is the whole."""
    if not _is_distributed(tensor):
        return tensor.detach(), None
    local = tensor.to_local().detach()
    rows_each = -(-tensor.shape[0] // ranks.size)
    start = min(ranks.rank * rows_each, tensor.shape[0])
    assert local.shape[0] == min(rows_each, tensor.shape[0] - start), "a weight is sharded in another way than by rows"
    return local, start


def _layers(module: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the first list of modules on the way down, which experts and the like only stand inside of."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            return part
    raise ConfigError("trainer.parallel=fsdp finds no list of layers in this model: set trainer.parallel=ddp")


def _add_up(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """As ddp's own reduction, without the division by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
