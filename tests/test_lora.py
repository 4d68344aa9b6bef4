"""LoRA: only the adapter moves, it is merged as peft merges, and it is checkpointed and exported as an adapter."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from builders import for_each, make_config, micro_batch
from harness import quickstart_config, tiny_folder
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sluice.common.config import Config
from sluice.common.config.trainer import LoraConfig
from sluice.common.errors import ConfigError, DigestMismatch
from sluice.common.models.causal_lm import load_pretrained, load_weights, named_weights
from sluice.common.models.lora import merge_adapter
from sluice.common.policies.canary import CanarySequence, adapter_share, is_adapter_missing, random_sequences
from sluice.scripts.launcher import launch, preflight
from sluice.trainer.adapter import Adapter, check_base
from sluice.trainer.checkpoint import TrainerState, random_state, save_checkpoint
from sluice.trainer.export import export_checkpoint
from sluice.trainer.trained_policy import TrainedPolicy

VOCAB = 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True)),
}
A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"
IDS = torch.arange(3, 15)[None]


def build(architecture: str = "qwen3") -> Any:
    torch.manual_seed(0)
    return MODELS[architecture]()


def new_policy(model: Any = None, **trainer: Any) -> TrainedPolicy:
    """The same adapter on the same base every time."""
    model = model or build()
    torch.manual_seed(0)
    settings = {"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 1e-2, "warmup_steps": 0, **trainer}
    return TrainedPolicy.of_run(model, make_config(trainer=settings))


def trained(policy: TrainedPolicy) -> TrainedPolicy:
    for step in (1, 2, 3):
        policy.optimize([micro_batch(step, vocab_size=VOCAB)], step=step)
    return policy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float = 0.0) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=atol)


def test_a_worked_merge_leaves_other_weights_the_very_tensors_of_the_base() -> None:
    base = {"m.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "norm.weight": torch.ones(2)}
    adapter = {A: torch.tensor([[1.0, 1.0]]), B: torch.tensor([[1.0], [2.0]])}
    merged = merge_adapter(base, adapter, scale=2.0)
    assert merged["m.weight"].tolist() == [[3.0, 4.0], [7.0, 8.0]]  # W0 + 2 [[1, 1], [2, 2]]
    assert merged["norm.weight"] is base["norm.weight"]
    assert base["m.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]], "the base serves the next version"


def test_a_merge_into_bfloat16_rounds_once() -> None:
    base = {"m.weight": torch.tensor([[1.0]], dtype=torch.bfloat16)}
    adapter = {A: torch.tensor([[0.003], [0.002]]), B: torch.tensor([[1.0, 1.0]])}  # each alone is rounded away
    merged = merge_adapter(base, adapter, scale=1.0)["m.weight"]
    assert (merged.dtype, merged.item()) == (torch.bfloat16, 1 + 2**-7)


@for_each(
    "adapter",
    [
        {A: torch.ones(1, 3)},  # no B
        {A.replace("m.l", "n.l"): torch.ones(1, 3), B.replace("m.l", "n.l"): torch.ones(2, 1)},  # another module
        {A: torch.ones(2, 3), B: torch.ones(2, 1)},  # another rank
        {A: torch.ones(1, 2), B: torch.ones(2, 1)},  # another shape
        {},
        {"m.weight": torch.ones(2, 3)},  # whole weights
    ],
)
def test_an_adapter_of_another_model_is_not_merged(adapter: dict[str, torch.Tensor]) -> None:
    with pytest.raises(DigestMismatch, match="adapter"):
        merge_adapter({"m.weight": torch.zeros(2, 3)}, adapter, scale=1.0)


@pytest.mark.parametrize("architecture", MODELS)
def test_only_the_adapter_moves_and_it_is_merged_as_peft_merges(architecture: str) -> None:
    plain = {name: weight.detach().clone() for name, weight in named_weights(build(architecture)).items()}
    policy = new_policy(build(architecture))
    before = policy.snapshot(torch.float32)
    assert_equal(policy.snapshot(torch.float32, full=True), plain)
    trained(policy)
    after = policy.snapshot(torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in after.values()), "an adapter is small: it is never rounded"
    assert len(after) == 2 * 2 * 7, "A and B of two layers' seven linear layers; not of the head"
    assert [name for name in after if after[name].equal(before[name])] == []
    assert_equal(policy.snapshot(torch.float32, full=True), plain)
    moving = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("/")[0] for name in policy._optimizer_tensors()} == moving
    merged = merge_adapter(plain, after, scale=2.0)
    fresh = build(architecture)
    load_weights(fresh, merged)
    torch.testing.assert_close(logits(fresh), logits(policy.model), rtol=0, atol=1e-5)
    assert (logits(fresh) - logits(build(architecture))).abs().max() > 0.1
    assert policy.adapter is not None
    assert_equal(merged, named_weights(policy.adapter._peft.merge_and_unload()), atol=1e-6)


def test_a_fresh_adapter_is_its_base_and_the_canary_tells_both() -> None:
    policy = new_policy()
    [first, _] = policy.score(random_sequences(VOCAB))
    assert first.base_logprobs is not None and np.array_equal(first.logprobs, first.base_logprobs)
    expected = TrainedPolicy.of_run(build(), make_config()).score(random_sequences(VOCAB))[0]
    assert expected.base_logprobs is None
    np.testing.assert_allclose(first.logprobs, expected.logprobs, atol=1e-6)
    later = trained(policy).score(random_sequences(VOCAB))[0]
    assert later.base_logprobs is not None and np.array_equal(later.base_logprobs, first.base_logprobs)
    assert np.abs(later.logprobs - later.base_logprobs).max() > 0.01
    assert all(weight.requires_grad for weight in policy.adapter.weights().values())  # type: ignore[union-attr]


def test_named_modules_alone_get_an_adapter() -> None:
    policy = new_policy(lora={"rank": 2, "target_modules": ["self_attn.q_proj", "v_proj"]})
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in policy.snapshot(torch.float32)}
    assert modules == {"q_proj", "v_proj"}


@for_each("name", ["qproj", "lm_head", "embed_tokens"])
def test_target_modules_that_are_no_linear_layers_of_the_model_are_refused(name: str) -> None:
    lora = LoraConfig(target_modules=("q_proj", name))
    with pytest.raises(ConfigError, match=rf"no linear layer is called {name} \(there are .*q_proj"):
        Adapter(build(), lora)


def test_layers_whose_weights_lie_otherwise_are_refused() -> None:
    shape = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ConfigError, match=r"c_attn is a Conv1D; name linear layers only"):
        Adapter(GPT2LMHeadModel(shape), LoraConfig())


def test_a_missing_peft_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'sluice-rl\[lora\]'"):
        new_policy()


def test_a_run_is_refused_before_anything_starts_where_peft_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    settings = {"trainer__lora": {"rank": 2}, "output_dir": str(tmp_path / "runs")}
    config = quickstart_config(tmp_path, tiny=tiny_folder(3), **settings)
    with pytest.raises(ConfigError, match=r"pip install 'sluice-rl\[lora\]'"):
        launch.run_to_the_end(str(config), [], name=None, resume=None)
    assert not (tmp_path / "runs").exists()


def test_recomputed_activations_change_no_gradient() -> None:
    plain, recomputed = trained(new_policy()), trained(new_policy(gradient_checkpointing=True))
    assert_equal(recomputed.snapshot(torch.float32), plain.snapshot(torch.float32), atol=1e-6)


def save(folder: Path, policy: TrainedPolicy, *, step: int = 3) -> Path:
    state = TrainerState(step=step, version=step, cursor=0, random_state=random_state(), base_digest=policy.base_digest)
    return save_checkpoint(folder, state, write=policy.save, keep=2)


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    path = save(tmp_path, trained(new_policy()))
    base_bytes = sum(weight.nbytes for weight in named_weights(build()).values())
    adapter_bytes = sum(tensor.nbytes for tensor in new_policy().snapshot(torch.float32).values())
    assert adapter_bytes < (path / "model.safetensors").stat().st_size < adapter_bytes + 8192 < base_bytes


def test_a_checkpoint_of_another_kind_of_training_is_refused(tmp_path: Path) -> None:
    policy = new_policy()
    with pytest.raises(ConfigError, match=r"holds a LoRA adapter, but trainer\.lora is none"):
        check_base(policy.base_digest, "")
    with pytest.raises(ConfigError, match=r"holds full weights, but trainer\.lora is set"):
        check_base("", policy.base_digest)
    changed = build()
    next(changed.parameters()).data[0, 0] += 1
    with pytest.raises(ConfigError, match=r"on other weights than those of model\.path"):
        check_base(policy.base_digest, new_policy(changed).base_digest)
    with pytest.raises(ConfigError, match=r"of another trainer\.lora \(alpha / rank\)"):
        check_base(policy.base_digest, new_policy(lora={"rank": 4, "alpha": 9.0}).base_digest)
    path = save(tmp_path, policy)
    for other in ({"rank": 2}, {"rank": 4, "target_modules": ["q_proj"]}):
        with pytest.raises(ConfigError, match=r"another trainer\.lora \(rank or target_modules\)"):
            new_policy(lora=other).restore(path)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run that has trained an adapter on a copy of the tiny model."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_folder(3) / "model", tmp_path / "model")
    model = {"path": str(tmp_path / "model"), "revision": "v1.2"}  # which a folder does not have
    config = make_config(model=model, trainer={"lora": {"rank": 4, "alpha": 8.0}})
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    save(folder / "checkpoints", changed_adapter(config))
    return folder


def changed_adapter(config: Config) -> TrainedPolicy:
    policy = TrainedPolicy.of_run(load_pretrained(config.model.path), config)
    assert policy.adapter is not None
    with torch.no_grad():
        for weight in policy.adapter.weights().values():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.1)
    return policy


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PeftModel asks it
def test_an_export_is_merged_and_the_adapter_alone_loads_in_peft(run_folder: Path, tmp_path: Path) -> None:
    assert export_checkpoint(run_folder, tmp_path / "merged") == 3
    assert export_checkpoint(run_folder, tmp_path / "adapter", adapter=True) == 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (tmp_path / "merged" / "tokenizer.json").is_file() and not list((tmp_path / "merged").glob("*adapter*"))
    on_base = peft.PeftModel.from_pretrained(load_pretrained(str(tmp_path / "model")), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), logits(on_base), rtol=0, atol=1e-5)
    assert_equal(named_weights(merged), named_weights(on_base.merge_and_unload()), atol=1e-6)
    assert (logits(merged) - logits(load_pretrained(str(tmp_path / "model")))).abs().max() > 0.1
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1.2"


def test_an_export_upon_changed_weights_or_of_an_adapter_that_is_none_is_refused(
    run_folder: Path, tmp_path: Path
) -> None:
    config = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(make_config(model={"path": str(tmp_path / "model")}).to_yaml())
    with pytest.raises(ConfigError, match="leave --adapter out"):
        export_checkpoint(run_folder, tmp_path / "x", adapter=True)
    with pytest.raises(ConfigError, match=r"trainer\.lora is none"):
        export_checkpoint(run_folder, tmp_path / "x")
    (run_folder / "config.yaml").write_text(config)
    other = load_pretrained(str(tmp_path / "model"))
    with torch.no_grad():
        other.get_output_embeddings().weight[0, 0] += 1
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="was that folder changed"):
        export_checkpoint(run_folder, tmp_path / "x")


def canary(*, effect: float, base_logprobs: bool = True) -> list[CanarySequence]:
    generator = np.random.default_rng(0)
    base = generator.uniform(-3, -1, (2, 32)).astype(np.float32)
    moved = (effect * generator.standard_normal((2, 32))).astype(np.float32)
    ids = np.arange(32, dtype=np.int32)
    return [
        CanarySequence(prompt_ids=ids, token_ids=ids, logprobs=b + m, base_logprobs=b.copy() if base_logprobs else None)
        for b, m in zip(base, moved, strict=True)
    ]


def test_the_share_of_an_adapters_effect_that_a_sampler_shows() -> None:
    ids, logprobs, base = (
        np.array([1, 2], np.int32),
        np.array([-1.0, -2.0], np.float32),
        np.array([-2.0, -1.0], np.float32),
    )
    ours = CanarySequence(prompt_ids=ids[:1], token_ids=ids, logprobs=logprobs, base_logprobs=base)
    # d = (1, -1), e = found - base = (1, 0): <e, d> / <d, d> = 1/2; scatter (1/2, 1/2): sqrt(1/2 / 1 / 2) = 1/2
    assert adapter_share([ours], [np.array([-1.0, -1.0], np.float32)]) == pytest.approx((0.5, 0.5))
    assert adapter_share([ours], [ours.logprobs]) == pytest.approx((1.0, 0.0))
    assert adapter_share([ours], [np.array([np.nan, 0.0], np.float32)]) is None, "the plain difference says it"
    for nothing in ([], canary(effect=0.0), canary(effect=1.0, base_logprobs=False)):
        assert adapter_share(nothing, [sequence.logprobs for sequence in nothing]) is None


@for_each("effect", [0.02, 0.1])
def test_a_missing_adapter_is_told_within_a_bfloat16_samplers_noise_and_a_served_one_never_accused(
    effect: float,
) -> None:
    sequences = canary(effect=effect)
    for seed in range(100):
        noise = 0.015 * np.random.default_rng(seed).standard_normal((2, 32)).astype(np.float32)
        served = adapter_share(sequences, [s.logprobs + n for s, n in zip(sequences, noise, strict=True)])
        bases = [s.base_logprobs for s in sequences if s.base_logprobs is not None]
        ignored = adapter_share(sequences, [b + n for b, n in zip(bases, noise, strict=True)])
        assert served is not None and not is_adapter_missing(*served)
        assert effect < 0.1 or (ignored is not None and is_adapter_missing(*ignored))
