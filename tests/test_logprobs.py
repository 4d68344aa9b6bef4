"""Completion logprobs against a model's own logits: values, gradients, pads, chunks, heads that are not plain."""

import numpy as np
import pytest
import torch
from builders import for_each
from transformers import CohereForCausalLM, Gemma2ForCausalLM, Qwen3ForCausalLM

from sluice.common.models import logprobs as logprobs_module
from sluice.common.models.logprobs import _plain_head, completion_logprobs, pad_sequences
from sluice.common.models.truncation import Truncation

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(model_class=Qwen3ForCausalLM, **changes):
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SMALL, **changes})).eval()
    for weight in model.parameters():  # large enough that logits, and soft caps on them, matter
        torch.nn.init.normal_(weight, std=0.3)
    _plain_head(model)  # found by running the model, before a test counts its passes
    return model


def sequences(*lengths, seed=0):
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(0, VOCABULARY, p, dtype=np.int32) for p, _ in lengths]
    completions = [draw.integers(0, VOCABULARY, t, dtype=np.int32) for _, t in lengths]
    return prompts, completions


def naive_logprobs(model, prompt, completion, temperature=1.0):
    """One sequence, no pads, the whole logits: [T] logprobs and [T] entropy."""
    ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    log_p = (logits / temperature).log_softmax(-1)
    return log_p[torch.arange(len(completion)), ids[len(prompt) :]], -(log_p.exp() * log_p).sum(-1)


def test_pads_stand_on_the_right_and_an_empty_prompt_is_refused():
    ids, prompt_lengths, completion_lengths = pad_sequences(
        [np.array([5, 6], np.int32), np.array([7], np.int32)], [np.array([8], np.int32), np.array([], np.int32)]
    )
    assert ids.tolist() == [[5, 6, 8], [7, 0, 0]]
    assert (prompt_lengths.tolist(), completion_lengths.tolist()) == ([2, 1], [1, 0])
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        pad_sequences([np.array([], np.int32)], [np.array([1], np.int32)])


@for_each("temperature", [1.0, 0.7, 0.0])
def test_logprobs_and_entropy_are_those_of_each_sequence_alone(temperature):
    model = tiny_model()
    prompts, completions = sequences((3, 7), (1, 4), (6, 1), (2, 0))
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(
            model, *pad_sequences(prompts, completions), temperature=temperature, with_entropy=True
        )
        assert logprobs.shape == entropy.shape == (4, 7)
        assert logprobs.dtype == entropy.dtype == torch.float32
        for prompt, completion, *rows in zip(prompts, completions, logprobs, entropy, strict=True):
            expected = naive_logprobs(model, prompt, completion, temperature or 1.0)
            for values, naive in zip(rows, expected, strict=True):
                torch.testing.assert_close(values[: len(completion)], naive, atol=2e-5, rtol=1e-5)
                assert not values[len(completion) :].any()


def test_pads_are_invisible_to_values_and_gradients():
    model = tiny_model()
    prompts, completions = sequences((3, 5), (4, 2))

    def gradients(ids, *lengths):
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, ids, *lengths, temperature=0.7, with_entropy=True)
        logprobs.square().sum().backward()
        return logprobs.detach(), [weight.grad.clone() for weight in model.parameters()]

    ids, prompt_lengths, completion_lengths = pad_sequences(prompts, completions)
    wider = torch.full((2, ids.shape[1] + 6), 17)  # another pad id, more pads, pads that are real tokens elsewhere
    for row, *pair in zip(wider, prompts, completions, strict=True):
        tokens = np.concatenate(pair)
        row[: len(tokens)] = torch.from_numpy(tokens)
    narrow = gradients(ids, prompt_lengths, completion_lengths)
    padded = gradients(wider, prompt_lengths, completion_lengths)
    torch.testing.assert_close(padded, narrow, atol=1e-5, rtol=1e-4)

    model.zero_grad()
    pairs = zip(prompts, completions, strict=True)
    sum(naive_logprobs(model, *pair, 0.7)[0].square().sum() for pair in pairs).backward()
    torch.testing.assert_close(narrow[1], [weight.grad for weight in model.parameters()], atol=1e-4, rtol=1e-3)


@for_each("how", [{}, {"truncation": Truncation(top_k=9, min_tokens=2, end_token_ids=(1, 2))}])
def test_chunks_and_recomputation_change_neither_values_nor_gradients(monkeypatch, how):
    model = tiny_model()
    batch = pad_sequences(*sequences((3, 7), (1, 4)))
    results = []
    for chunk_tokens in (4096, 3):
        monkeypatch.setattr(logprobs_module, "RECOMPUTE_ELEMENTS", chunk_tokens * VOCABULARY)
        model.zero_grad()
        logprobs, entropy = completion_logprobs(model, *batch, with_entropy=True, **how)
        assert not entropy.requires_grad
        logprobs.square().sum().backward()
        results.append((logprobs.detach(), entropy, [weight.grad.clone() for weight in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@for_each(
    ("model_class", "changes"),
    [
        (Qwen3ForCausalLM, {"tie_word_embeddings": True}),
        (Gemma2ForCausalLM, {"final_logit_softcapping": 3.0, "sliding_window": 64}),
        (CohereForCausalLM, {"logit_scale": 0.0625}),
    ],
)
def test_models_that_change_their_logits_are_followed(model_class, changes):
    model = tiny_model(model_class, **changes)
    prompts, completions = sequences((3, 5), (4, 2))
    with torch.no_grad():
        logprobs, entropy = completion_logprobs(model, *pad_sequences(prompts, completions))
        for row, *pair in zip(logprobs, prompts, completions, strict=True):
            torch.testing.assert_close(row[: len(pair[1])], naive_logprobs(model, *pair)[0], atol=2e-5, rtol=1e-4)
    assert entropy is None


def test_a_bfloat16_model_scores_in_float32_and_a_batch_without_completion_tokens_has_no_columns():
    model = tiny_model()
    logprobs, _ = completion_logprobs(model, *pad_sequences(*sequences((3, 0), (2, 0))))
    assert logprobs.shape == (2, 0)
    logprobs.sum().backward()
    with torch.no_grad():
        logprobs, _ = completion_logprobs(model.bfloat16(), *pad_sequences(*sequences((3, 5))))
    assert logprobs.dtype == torch.float32
    assert (logprobs[logprobs != 0].bfloat16().float() != logprobs[logprobs != 0]).any()


def test_the_whole_logits_are_never_held(monkeypatch):
    model = tiny_model()
    batch = pad_sequences(*sequences((30, 4), (30, 4)))
    widths, score = [], logprobs_module._score
    monkeypatch.setattr(
        logprobs_module, "_score", lambda inputs, *rest: widths.append(inputs.shape) or score(inputs, *rest)
    )
    monkeypatch.setattr(logprobs_module, "RECOMPUTE_ELEMENTS", 5 * VOCABULARY)
    completion_logprobs(model, *batch)
    assert widths == [(5, 32), (3, 32)]  # hidden states of the 8 completion tokens alone
