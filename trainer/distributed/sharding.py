"""One policy over several ranks: what wraps it, and which rows of a tensor a rank holds.

    ddp     every rank holds all weights; gradients are added up once per optimizer step
    fsdp    every rank holds its rows of every weight (FSDP2); a layer is complete only while it computes, and gradients are
            added up at every micro-batch, so that no rank ever holds all of them

Gradients are sums over ranks, not means: each micro-batch's loss is already divided by the step's normaliser.
A sharded tensor is split into equal pieces along its first axis, in rank order, the last ones shorter (torch.chunk).

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
    """Return whether a rank holds only its rows. parallel: `ddp`, `fsdp`, or `auto`: fsdp on GPUs, ddp on CPUs."""
    return ranks.size > 1 and (parallel == "fsdp" or (parallel == "auto" and device.type != "cpu"))


def distributed(
    module: nn.Module, ranks: Ranks, *, parallel: str, device: torch.device, compute: torch.dtype
) -> nn.Module:
    """Return the module to run forward with gradients; `module` itself for a single rank and, sharded in place, for fsdp.

    parallel: as in `is_sharded`. compute: the precision in which fsdp gathers the layers' weights; gradients are reduced in
    float32. Weights must be equal on all ranks before (ddp copies rank 0's).
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
    """Keep gradients local, for all but the last micro-batch of a step: with ddp only; fsdp would have to keep them all."""
    return module.no_sync() if hasattr(module, "no_sync") else nullcontext()


def release(module: Any) -> None:
    """Free the weights that fsdp's root module gathered in a forward pass without a backward one."""
    if hasattr(module, "reshard"):
        module.reshard()


def gathered(tensor: Any, dtype: torch.dtype) -> Tensor:
    """Return a full tensor in a dtype. For a sharded one every rank must call it; it travels in that dtype."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if _is_distributed(tensor) else tensor


def _is_distributed(tensor: Any) -> bool:
    """Return whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Any, ranks: Ranks) -> Tensor | None:
    """Return what this rank writes of a tensor into a checkpoint: its rows, or all where it is not sharded (rank 0)."""
    if _is_distributed(tensor):
        local = tensor.to_local().detach()
        return local if local.shape[0] else None
    return tensor.detach() if ranks.rank == 0 else None


def own_rows(tensor: Any, ranks: Ranks) -> tuple[Tensor, int | None]:
    """Return this rank's memory of a tensor, and its first row in the full tensor; none = it is the full tensor."""
    if not _is_distributed(tensor):
        return tensor.detach(), None
    local = tensor.to_local().detach()
    rows_each = -(-tensor.shape[0] // ranks.size)
    start = min(ranks.rank * rows_each, tensor.shape[0])
    assert local.shape[0] == min(rows_each, tensor.shape[0] - start), "a weight is sharded in another way than by rows"
    return local, start


def _layers(module: nn.Module) -> nn.ModuleList:
    """Return the decoder's layers: the outermost list of modules (experts and the like are inside of it)."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and len(part):
            return part
    raise ConfigError("trainer.parallel=fsdp finds no list of layers in this model: set trainer.parallel=ddp")


def _add_up(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduce as ddp does, without the division by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
