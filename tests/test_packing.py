"""Packed rows against padded ones: values, gradients, isolation, budgets, and the models that must stay padded."""

import itertools
import os

import numpy as np
import pytest
import torch
from builders import for_each
from peft import LoraConfig, get_peft_model
from test_logprobs import sequences, tiny_model
from transformers import (
    FalconH1ForCausalLM,
    Gemma2ForCausalLM,
    GptOssForCausalLM,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from sluice.common.config import TrainerConfig
from sluice.common.models.logprobs import completion_logprobs, pad_sequences, score_sequences
from sluice.common.models.packing import (
    CannotPackError,
    _by_size,
    _by_varlen,
    enable_packing,
    is_packed,
    pack,
    plan_batches,
)
from sluice.trainer.micro_batches import MicroBatch
from sluice.trainer.objective import objective_of
from sluice.trainer.trained_policy import TrainedPolicy, _checkpoint_layers

GROUPS = ((3, 7), (3, 4), (6, 1), (3, 1), (2, 0), (2, 5), (6, 5), (3, 7), (2, 1), (5, 9))
"""Prompts of equal length are the same: groups of 4, 2, 3 and 1."""
RAGGED = ((3, 7), (1, 4), (6, 1), (2, 0), (1, 0), (4, 6), (5, 9))
MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1}
RECURRENT = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def groups(lengths):
    """Sequences whose prompts are equal where their lengths are."""
    prompts, completions = sequences(*lengths)
    return [prompts[lengths.index(next(x for x in lengths if x[0] == len(p)))] for p in prompts], completions


def both(model_class=Qwen3ForCausalLM, **changes):
    """The same model twice: padded, and packed."""
    padded, packed = (tiny_model(model_class, **changes) for _ in range(2))
    assert enable_packing(packed, longest=64) is None
    assert (is_packed(padded), is_packed(packed)) == (False, True)
    return padded, packed


def scored(model, batch):
    """Logprobs, entropy, and the gradient of a sum that weighs every token differently."""
    model.zero_grad()
    logprobs, entropy = completion_logprobs(model, *batch, with_entropy=True)
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
    return logprobs.detach(), entropy, {name: p.grad.clone() for name, p in model.named_parameters()}


@for_each(
    ("model_class", "changes"),
    [
        (Qwen3ForCausalLM, {}),  # grouped heads
        (Qwen3ForCausalLM, {"tie_word_embeddings": True}),
        (LlamaForCausalLM, {"num_key_value_heads": 4}),
        (GraniteForCausalLM, {"logits_scaling": 4.0}),  # the head is not plain
    ],
)
def test_packed_rows_give_the_logprobs_and_gradients_of_padded_ones(model_class, changes):
    padded, packed = both(model_class, **changes)
    for lengths in (RAGGED, ((3, 5),), ((2, 6), (4, 4), (5, 3)), ((1, 0), (3, 0))):
        batch = pad_sequences(*sequences(*lengths))
        for found, expected in zip(scored(packed, batch), scored(padded, batch), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    batch = pad_sequences(*groups(GROUPS))
    for found, expected in zip(scored(packed, batch), scored(padded, batch), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_in_float64_packed_and_padded_differ_by_rounding_alone(monkeypatch):
    def norm(self, x):  # transformers' own computes in float32
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm)
    padded, packed = both()
    ids, prompt_lengths, completion_lengths = pad_sequences(*sequences(*RAGGED))
    ids[4, :2] = ids[5, :2] = ids[0, :2]
    lengths, prefix_lengths = prompt_lengths + completion_lengths, prompt_lengths.clamp(max=2)
    row = pack(ids, prefix_lengths, lengths)
    expected = padded.double().model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = packed.double().model(**row.inputs, use_cache=False).last_hidden_state[0]
    assert len(hidden) == int(lengths.sum()) - 2, "rows 0 and 5 have two tokens in common, and row 4 is one token"
    found = [hidden[row.place(torch.full((n,), i), torch.arange(n))] for i, n in enumerate(lengths.tolist())]
    for i, values in enumerate(found):
        torch.testing.assert_close(values, expected[i, : lengths[i]], atol=1e-11, rtol=1e-11)
    for rows in (found, [expected[i, :n] for i, n in enumerate(lengths)]):
        sum(values.square().sum() for values in rows).backward()
    for (name, one), other in zip(packed.named_parameters(), padded.parameters(), strict=True):
        if "lm_head" not in name:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_layers_are_packed_again_in_the_backward_pass(autocast):
    kept, recomputed = both()[1], both()[1]
    _checkpoint_layers(recomputed)
    batch = pad_sequences(*groups(GROUPS))
    calls = []
    recomputed.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, found = scored(kept, batch), scored(recomputed, batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert len(calls) == 2  # forward, and again in backward
    assert len(set(calls)) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near_float32_and_the_same_packed_and_padded_on_this_device(autocast):
    device = os.environ.get("SLUICE_TEST_DEVICE", "cpu")  # scripts/gpu_check: there the varlen kernel runs
    batch = [tensor.to(device) for tensor in pad_sequences(*groups((*GROUPS, (90, 150), (30, 150), (90, 40))))]
    exact, _, _ = scored(tiny_model().to(device), batch)
    padded, packed = (model.to(device, torch.float32 if autocast else torch.bfloat16) for model in both())
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        (expected, _, gradients), (found, _, packed_gradients) = scored(padded, batch), scored(packed, batch)
    for one, other in ((expected, exact), (found, exact), (found, expected)):
        assert one.dtype == torch.float32
        assert float((one - other).abs().mean()) < 0.1
    for name, gradient in gradients.items():
        assert float((packed_gradients[name] - gradient).norm()) < 0.2 * float(gradient.norm()), name


def test_a_token_never_sees_another_sequence():
    _, model = both()
    prompts, completions = groups(GROUPS)
    with torch.no_grad():
        before, _ = completion_logprobs(model, *pad_sequences(prompts, completions))
        for changed, (side, rows) in itertools.product(range(len(GROUPS)), enumerate((prompts, completions))):
            other = [(row + 1) % 60 if i == changed else row for i, row in enumerate(rows)]
            pair = (other, completions) if side == 0 else (prompts, other)
            after, _ = completion_logprobs(model, *pad_sequences(*pair))
            rest = torch.arange(len(GROUPS)) != changed
            torch.testing.assert_close(after[rest], before[rest], atol=1e-6, rtol=1e-6)
            assert torch.allclose(after[changed], before[changed], atol=1e-4) == (len(completions[changed]) == 0)


def test_no_pad_and_no_last_token_runs_through_a_packed_model():
    padded, packed = both()
    ran = []
    for model in (padded, packed):
        model.model.layers[0].mlp.register_forward_hook(
            lambda module, inputs, output: ran.append(output.shape[:-1].numel())
        )
        completion_logprobs(model, *pad_sequences(*sequences((3, 7), (1, 4), (2, 0))))
    assert ran == [3 * 10, 9 + 4 + 1]  # a row without completion: one token, so that no batch is empty
    completion_logprobs(packed, *pad_sequences(*groups(((3, 7), (3, 4), (3, 1), (1, 4)))))
    assert ran[2:] == [3 + 6 + 3 + 0 + 4], "a prompt once"


@for_each("packed", [False, True])
def test_many_sequences_are_scored_in_the_order_given_within_the_budget(packed):
    model = both()[packed]
    prompts, completions = sequences(*RAGGED, (7, 11))
    pairs = list(zip(prompts, completions, strict=True))
    shapes = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:-1]))
    with torch.no_grad():
        rows = score_sequences(model, pairs, max_batch_tokens=20)
        for pair, row in zip(pairs, rows, strict=True):
            alone, _ = completion_logprobs(model, *pad_sequences([pair[0]], [pair[1]]))
            np.testing.assert_allclose(row, alone[0].numpy(), atol=1e-5)
    batches = shapes[: -len(pairs)]
    assert all(shape.numel() <= 20 for shape in batches)
    assert len(batches) == (4 if packed else 5)  # 18, 14, 10 + 10, 7 + 5 + 2 + 1; padded: 18, 14, 2 x 10, 2 x 7, 2 x 2


@for_each("packed", [False, True])
@for_each("seed", range(20))
def test_batches_are_as_few_and_as_even_as_their_order_allows(seed, packed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 30, 9).tolist()
    batches = plan_batches(
        [(np.full(1, i, np.int32), np.zeros(n - 1, np.int32)) for i, n in enumerate(lengths)],
        max_tokens=40,
        packed=packed,
    )
    cost = lambda batch: sum(batch) if packed else len(batch) * batch[0]  # noqa: E731
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    ordered = sorted(lengths, reverse=True)
    assert [lengths[i] for batch in batches for i in batch] == ordered
    best = None
    for cuts in range(2**8):  # every way to cut the order
        ends = [i + 1 for i in range(8) if cuts >> i & 1]
        parts = [ordered[a:b] for a, b in zip([0, *ends], [*ends, 9], strict=True)]
        if all(cost(part) <= 40 for part in parts):
            found = (len(parts), max(cost(part) for part in parts))
            best = found if best is None else min(best, found)
    assert (len(batches), max(cost([lengths[i] for i in batch]) for batch in batches)) == best


def test_a_batch_counts_an_equal_prompt_once():
    pairs = [(np.full(8, i % 3, np.int32), np.zeros(n, np.int32)) for i, n in enumerate((2, 9, 4, 3, 1, 5, 2, 2, 4))]
    assert plan_batches(pairs, max_tokens=24, packed=True) == [[1, 7, 4], [5, 2, 8], [3, 0, 6]]
    assert [len(batch) for batch in plan_batches(pairs, max_tokens=24, packed=False)] == [1, 1, 2, 2, 2, 1]


@for_each(
    ("model_class", "changes", "reason"),
    [
        (MistralForCausalLM, {"sliding_window": 64}, "sliding_window"),
        (Gemma2ForCausalLM, {"attn_implementation": "eager"}, "softcap"),
        (Llama4ForCausalLM, {**MIXTURE, "attention_chunk_size": 64}, "other than the causal one"),
        (GptOssForCausalLM, {**MIXTURE, "attn_implementation": "eager"}, "s_aux"),
        (FalconH1ForCausalLM, RECURRENT, "differ from each alone"),  # recurrent layers beside attention
    ],
)
def test_a_model_that_asks_for_more_stays_padded_and_as_it_was(model_class, changes, reason):
    model = tiny_model(model_class, **changes)
    batch = pad_sequences(*sequences(*RAGGED))
    with torch.no_grad():
        before, _ = completion_logprobs(model, *batch)
        implementation = model.config._attn_implementation
        assert reason in enable_packing(model, longest=64)
        assert not is_packed(model)
        assert model.config._attn_implementation == implementation
        assert torch.equal(completion_logprobs(model, *batch)[0], before)


def test_a_packed_model_refuses_a_mask_that_it_would_not_honour_and_leaves_no_trace_where_it_is_saved(tmp_path):
    _, model = both()
    ids = torch.randint(0, 60, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
        with pytest.raises(CannotPackError, match="mask"):
            model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    model.save_pretrained(tmp_path)
    assert "sluice" not in (tmp_path / "config.json").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PeftModel asks it
def test_a_model_inside_peft_is_packed():
    padded, packed = (
        get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        for _ in range(2)
    )
    packed.load_state_dict(padded.state_dict())
    assert enable_packing(packed, longest=64) is None
    assert is_packed(packed)
    batch = pad_sequences(*sequences(*RAGGED))
    found, expected, bare = (completion_logprobs(m, *batch)[0] for m in (packed, padded, tiny_model()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, bare, atol=1e-2)


@for_each("key_heads", [4, 2])
def test_the_varlen_kernel_is_called_as_it_asks(key_heads, monkeypatch):
    """The kernel runs on GPUs; here another one takes its arguments, and aligns the last query with the last key as it does."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [1, 2, 3, 8, 9], [1, 2, 3, 0, 0]])
    row = pack(ids, torch.tensor([3, 1, 3, 3]), torch.tensor([5, 2, 5, 3]))
    layout = row.layout
    assert layout.groups == ((2, 2, 5), (1, 3, 3), (1, 2, 2))
    assert row.inputs["input_ids"].tolist() == [[4, 5, 8, 9, 1, 2, 3, 6, 7]]
    assert row.inputs["position_ids"].tolist() == [[3, 4, 3, 4, 0, 1, 2, 0, 1]]
    assert layout.keys.tolist() == [4, 5, 6, 0, 1, 4, 5, 6, 2, 3, 4, 5, 6, 7, 8]

    def kernel(
        query, key, value, query_offsets, key_offsets, longest_query, longest_key, *, scale, window_size, enable_gqa
    ):
        assert (longest_query, longest_key, window_size, enable_gqa) == (3, 5, (-1, 0), True)
        parts = []
        for i in range(len(query_offsets) - 1):
            q = query[query_offsets[i] : query_offsets[i + 1]].transpose(0, 1)
            k, v = (x[key_offsets[i] : key_offsets[i + 1]].transpose(0, 1) for x in (key, value))
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
            parts.append(attended.transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    query = torch.randn(9, 4, 8)
    key, value = (torch.randn(9, key_heads, 8)[layout.keys] for _ in range(2))
    found, expected = _by_varlen(query, key, value, layout, 0.5), _by_size(query, key, value, layout, 0.5, 0.0)
    torch.testing.assert_close(found, expected)


def test_a_trainer_step_is_the_same_packed_and_padded():
    input_ids, prompt_lengths, completion_lengths = pad_sequences(*sequences(*RAGGED))
    width = int(completion_lengths.max())
    batch = MicroBatch(
        input_ids=input_ids,
        prompt_lengths=prompt_lengths,
        completion_lengths=completion_lengths,
        rollout_logprobs=-torch.rand(len(RAGGED), width, generator=torch.Generator().manual_seed(0)),
        ref_logprobs=None,
        advantages=torch.linspace(-1, 1, len(RAGGED)),
        loss_mask=torch.arange(width) < completion_lengths.unsqueeze(-1),
    )
    metrics = {}
    for packing in ("auto", "off"):
        config = TrainerConfig(packing=packing, learning_rate=1e-3, device="cpu")
        policy = TrainedPolicy(tiny_model(), config, objective=objective_of(config))
        metrics[packing] = policy.optimize([batch], step=1)
    assert metrics["auto"]["padding_share"] == 0.0
    assert metrics["off"]["padding_share"] == pytest.approx(1 - 49 / (7 * 14))
    assert metrics["auto"]["loss/policy"] == pytest.approx(metrics["off"]["loss/policy"], abs=1e-6)
    assert metrics["auto"]["grad_norm"] == pytest.approx(metrics["off"]["grad_norm"], rel=1e-5)
