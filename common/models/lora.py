"""LoRA adapters as tensors: the base weight that each pair belongs to, and the merged weights.

    W = W0 + scale * B A        W0 [out, in], A [r, in], B [out, r]; scale = alpha / r; arXiv:2106.09685

An adapter's tensors have the names that peft gives them in its files, so a checkpoint of one is such a file:

    base_model.model.<module>.lora_A.weight, base_model.model.<module>.lora_B.weight   ->   <module>.weight
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sluice.common.errors import DigestMismatch

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@torch.no_grad()
def merge_adapter(
    base: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], *, scale: float
) -> dict[str, torch.Tensor]:
    """Return all weights of a model with the adapter merged in, under the names and in the precision of `base`.

    Computed in float32 and rounded once. Weights without an adapter are the tensors of `base` themselves, so neither may be
    written to. Raises DigestMismatch when the adapter does not belong to this base.
    """
    merged = dict(base)
    modules = {name.removeprefix(PREFIX).removesuffix(_A) for name in adapter if name.endswith(_A)}
    expected = {f"{PREFIX}{module}{suffix}" for module in modules for suffix in (_A, _B)}
    if not modules or adapter.keys() != expected:
        raise DigestMismatch(
            f"not a LoRA adapter: unexpected or missing tensors are {sorted(adapter.keys() ^ expected)[:5]}"
        )
    for module in modules:
        a, b = adapter[f"{PREFIX}{module}{_A}"].float(), adapter[f"{PREFIX}{module}{_B}"].float()
        weight = base.get(f"{module}.weight")
        if weight is None or weight.shape != (b.shape[0], a.shape[1]) or b.shape[1] != a.shape[0]:
            shape = None if weight is None else tuple(weight.shape)
            raise DigestMismatch(
                f"adapter {tuple(b.shape)} x {tuple(a.shape)} of {module} does not fit its weight: {shape}"
            )
        merged[f"{module}.weight"] = (weight.float() + (b @ a) * scale).to(weight.dtype)
    return merged
