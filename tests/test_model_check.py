"""A model is exact in every role, or refused in words before the start: by running it, not by the names in its config."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from builders import for_each, letter_tokenizer, make_config
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from sluice.common.config import PromptConfig
from sluice.common.data.prompt_reader import PromptReader
from sluice.common.errors import ConfigError
from sluice.common.models.assets import ModelAssets, read_assets
from sluice.common.models.causal_lm import named_weights
from sluice.common.models.logprobs import _plain_head
from sluice.common.models.probe import LOADED, probe_lengths
from sluice.common.types import SamplingParams
from sluice.scripts.launcher.preflight import check_model, preflight
from sluice.trainer.trained_policy import TrainedPolicy
from sluice.workers.engine import GenerationRequest
from sluice.workers.engine.torch.engine import TorchEngine
from sluice.workers.engine.torch.probe import check_decoding

SEQ_LEN = 100
VOCABULARY = 300
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE: dict[str, Any] = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 64, "pad_token_id": 0}
EXPERTS: dict[str, Any] = {**WIDE, "num_local_experts": 4}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2}
GPT_NEO: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 256,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
OPT: dict[str, Any] = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8, "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

EXACT: dict[str, PreTrainedConfig] = {
    "a window longer than any sequence": t.MistralConfig(**WIDE, sliding_window=SEQ_LEN + 12),
    "a local window longer than any sequence": t.GPTNeoConfig(**GPT_NEO, window_size=SEQ_LEN + 12),
    "as many learned positions as tokens": t.GPT2Config(**GPT, n_positions=SEQ_LEN),
    "a head with a transform": t.ModernBertDecoderConfig(**WIDE, layer_types=["full_attention"] * 2),
    "jitter in training": t.PhimoeConfig(**EXPERTS, router_jitter_noise=0.5, input_jitter_noise=0.5),
    "layers skipped in training, dropout": t.OPTConfig(**OPT, layerdrop=0.5, dropout=0.5),
    "linear biases of any row": t.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=2, n_layers=2),
    "rope scaled by the config alone": t.LlamaConfig(**WIDE, rope_parameters={**DYNAMIC, "rope_type": "linear"}),
    "a text model in a multimodal config": t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**WIDE, head_dim=16).to_dict()
    ),
}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "longrope": (
        t.Phi3Config(
            **WIDE, max_position_embeddings=512, original_max_position_embeddings=32, rope_parameters=LONGROPE
        ),
        "exactly",
    ),
    "dynamic NTK": (t.LlamaConfig(**WIDE, max_position_embeddings=32, rope_parameters=DYNAMIC), "exactly"),
    "a local window that only the batch exceeds": (t.GPTNeoConfig(**GPT_NEO, window_size=SEQ_LEN), "no window"),
    "a local window": (t.GPTNeoConfig(**GPT_NEO, window_size=16), "no window"),
    "a sliding window": (t.Gemma3TextConfig(**WIDE, head_dim=16, sliding_window=16), "no window"),
    "few learned positions": (t.GPT2Config(**GPT, n_positions=64), "cannot run sequences of 68 tokens"),
    "ALiBi": (t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2), "keys and values"),
    "recurrent": (t.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "keys and values"),
    "convolutions": (t.Lfm2Config(**WIDE, layer_types=["conv", "full_attention"]), "keys and values"),
    "not causal": (t.BertConfig(**WIDE), "exactly"),
    "encoder-decoder": (t.T5Config(d_model=32, d_ff=64, num_layers=2, vocab_size=VOCABULARY), "is an encoder-decoder"),
    "decoder of an encoder-decoder": (t.BartConfig(vocab_size=VOCABULARY, d_model=32), "is an encoder-decoder"),
    "multimodal": (t.Qwen2VLConfig(), "qwen2_vl as a causal language model; it is multimodal"),
}


def assets_of(config: PreTrainedConfig) -> ModelAssets:
    plain = config.to_dict()
    plain.pop("dtype", None)
    return ModelAssets(config=plain, tokenizer_files={}, eos_token_ids=(1,))


def model_of(config: PreTrainedConfig) -> Any:
    """Weights so large that every part of the model shows in its logprobs."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # it would write to it
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


@for_each("name", REFUSED)
def test_a_model_that_would_be_wrong_is_refused_before_the_start(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as refused:
        check_model(make_config(trainer={"seq_len": SEQ_LEN}), assets_of(config))
    assert "\n" not in str(refused.value)
    check_model(make_config(trainer={"seq_len": SEQ_LEN}), assets_of(EXACT["a window longer than any sequence"]))


@for_each("name", ["longrope", "dynamic NTK", "not causal", "few learned positions"])
def test_whatever_engine_generates_the_trainer_must_be_exact(name: str) -> None:
    with pytest.raises(ConfigError, match=r"padded batch|cannot run sequences"):
        check_model(make_config(rollout={"engine": "vllm"}, trainer={"seq_len": SEQ_LEN}), assets_of(REFUSED[name][0]))


def test_a_window_is_no_obstacle_to_training_what_another_engine_generates() -> None:
    config = make_config(rollout={"engine": "vllm"}, trainer={"seq_len": SEQ_LEN})
    check_model(config, assets_of(REFUSED["a sliding window"][0]))


@for_each("name", EXACT)
def test_an_accepted_model_is_exact_in_engine_and_trainer(name: str) -> None:
    """Every completion of ragged rows has the logprobs of a fresh forward pass of its sequence alone."""
    config = make_config(trainer={"seq_len": SEQ_LEN, "device": "cpu"})
    check_model(config, assets_of(EXACT[name]))
    model, draw = model_of(EXACT[name]), np.random.default_rng(1)
    engine = TorchEngine(model, eos_token_ids=(), max_sequences=16, max_model_len=SEQ_LEN)
    engine.stage(0, "digest", {name: weight.detach().clone() for name, weight in named_weights(model).items()})
    requests = [
        GenerationRequest(
            group_id=f"{length}",
            prompt_ids=draw.integers(2, VOCABULARY, length, dtype=np.int32),
            sampling=SamplingParams(n=2, max_tokens=new, seed=length),
        )
        for length, new in [(1, 99), (60, 40), (13, 30), (31, 5)]
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        groups = list(threads.map(engine.generate, requests))
    engine.close()
    sequences = [
        (request.prompt_ids, one.token_ids) for request, group in zip(requests, groups, strict=True) for one in group
    ]
    expected = []
    for prompt, tokens in sequences:
        ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()
        with torch.no_grad():
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(logprobs.gather(-1, ids[len(prompt) :, None])[:, 0].numpy())
    sampled = [one.rollout_logprobs for group in groups for one in group]
    for found, right in zip(sampled, expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-4)
    policy = TrainedPolicy.of_run(model, config)
    for canary, right in zip(policy.score(sequences), expected, strict=True):
        np.testing.assert_allclose(canary.logprobs, right, atol=1e-4)


@for_each("checkpointing", [False, True])
@for_each("name", ["jitter in training", "layers skipped in training, dropout"])
def test_training_adds_no_noise_by_whatever_name(name: str, checkpointing: bool) -> None:
    trainer = {"seq_len": SEQ_LEN, "device": "cpu", "gradient_checkpointing": checkpointing}
    policy = TrainedPolicy.of_run(model_of(EXACT[name]), make_config(trainer=trainer))
    ids, lengths = torch.randint(2, VOCABULARY, (2, 30)), torch.tensor([10, 10])
    gradients = []
    for _ in range(2):
        policy.model.zero_grad()
        policy._scorer(ids, lengths, lengths + 10)[0].sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.model.parameters()]))
    assert gradients[0].equal(gradients[1]) and gradients[0].abs().sum() > 0


def test_a_worker_refuses_at_load_what_no_small_copy_could_show() -> None:
    """Also with weights as a model begins with, under which all tokens are nearly equally likely."""
    for config in (REFUSED["a local window"][0], REFUSED["longrope"][0]):
        torch.manual_seed(0)
        with pytest.raises(ConfigError, match="the torch engine cannot serve"):
            TorchEngine(
                AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval(),
                eos_token_ids=(),
                max_sequences=4,
                max_model_len=SEQ_LEN,
            )


def test_half_precision_is_not_refused_for_its_rounding() -> None:
    for name in ("as many learned positions as tokens", "jitter in training", "rope scaled by the config alone"):
        check_decoding(model_of(EXACT[name]).bfloat16(), max_model_len=SEQ_LEN, bound=LOADED)


def test_the_head_is_used_alone_only_where_logits_are_its_output() -> None:
    assert _plain_head(model_of(EXACT["a window longer than any sequence"])) is not None
    assert _plain_head(model_of(EXACT["a head with a transform"])) is None
    scaled = t.GraniteConfig(**WIDE, logits_scaling=1.001)  # by less than rounding in bfloat16
    assert _plain_head(model_of(scaled)) is None


def test_rows_cross_every_number_that_may_bound_positions() -> None:
    config = t.Gemma3TextConfig(**WIDE, sliding_window=50, max_position_embeddings=70)
    assert probe_lengths(config, longest=SEQ_LEN) == [74, 54, 24, 9]
    assert probe_lengths(config, longest=60) == [60, 54, 24, 9]
    assert probe_lengths(config, longest=52) == [52, 24, 9]
    assert probe_lengths(config, longest=34) == [24, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model_of(t.GPT2Config(**GPT, n_positions=SEQ_LEN, eos_token_id=1, bos_token_id=1)).save_pretrained(path)
    for name, content in letter_tokenizer(VOCABULARY).items():
        (path / name).write_bytes(content)
    return path


def changed(folder: Path, target: Path, **files: Any) -> str:
    """A copy of a model folder with some JSON files replaced; a dict is merged into a file that is there."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        path = target / f"{name}.json"
        text = json.dumps({**json.loads(path.read_text()), **content}) if isinstance(content, dict) else content
        path.write_text(text)
    return str(target)


TEMPLATES = [{"name": "rag", "template": "R"}, {"name": "tools", "template": "T"}]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"generation_config": "{broken"}, "generation_config.json is broken"),
        ({"generation_config": "[1]"}, "generation_config.json holds no object"),
        ({"generation_config": {"eos_token_id": "1"}}, r"eos_token_id \['1'\] is not in the vocabulary of 300"),
        ({"generation_config": {"eos_token_id": [1, 300]}}, r"eos_token_id \[300\] is not in the vocabulary of 300"),
        ({"config": {"vocab_size": 200}}, "tokens up to id 299 .* its embedding 200 rows"),
        ({"tokenizer_config": {"chat_template": TEMPLATES}}, "chat templates rag, tools, and none named default"),
        ({"config": {"n_positions": 12}}, "set trainer.seq_len"),
    ],
)
def test_a_model_folder_that_would_mislead_is_refused_in_words(
    folder: Path, tmp_path: Path, files: dict[str, Any], words: str
) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "\\u4e02\\u4e03", "target": "2"}\n')
    config = make_config(
        model={"path": changed(folder, tmp_path / "model", **files)}, dataset={"path": str(tmp_path / "train.jsonl")}
    )
    with pytest.raises(ConfigError, match=words):
        preflight(config)


def test_the_default_of_named_chat_templates_travels(folder: Path, tmp_path: Path) -> None:
    named = [*TEMPLATES, {"name": "default", "template": "D"}]
    path = changed(folder, tmp_path / "model", tokenizer_config={"chat_template": named})
    assert read_assets(path).tokenizer().chat_template == "D"


def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_prompt(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, last = tokenizer.convert_ids_to_tokens([7, 1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, 7), (last, 1)]
    )
    assert tokenizer(tokenizer.decode([2, 3]))["input_ids"] == [7, 2, 3, 1]
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"prompt": "x"}\n')
    reader = PromptReader(PromptConfig(path=str(rows), chat_template=False), tokenizer, seed=0)
    assert reader.prompt_ids(tokenizer.decode([2, 3]), "row 0") == [7, 2, 3]
    assert reader.prompt_ids(tokenizer.decode([2, 1]), "row 0") == [7, 2, 1]  # the text's own end token stays
