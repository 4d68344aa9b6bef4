"""A role with a model starts without torch's compiler, and has it as soon as somebody wants it."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINS = """
import sys
import sluice.trainer.loop, sluice.workers.reference, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=9, intermediate_size=8)
model = Qwen3ForCausalLM(Qwen3Config(**sizes))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
optimizer.step()
optimizer.zero_grad()
print([name for name in ("sympy", "torch._inductor", "torch.distributed.tensor") if name in sys.modules])
"""
COMPILES = """
import sluice.common.models.causal_lm, torch
{first}
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""


def shown(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    ).stdout


def test_a_model_trains_without_the_compiler() -> None:
    assert shown(TRAINS) == "[]\n"


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import torch._dynamo.config",
        "from torch._dynamo import config",
        "from torch.distributed.fsdp import fully_shard",
    ],
)
def test_who_compiles_has_the_real_compiler(first: str) -> None:
    assert shown(COMPILES.format(first=first)) == "[2.0, 2.0]\n"
