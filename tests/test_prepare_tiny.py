"""The quickstart's task and model: complete, disjoint, loadable, made once. The warm-up is cut to three steps here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from builders import for_each

from sluice.common.config.file import load_config
from sluice.common.errors import ConfigError
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import load_pretrained
from sluice.scripts.prepare_tiny import FORGETS_CARRY, demonstration, operand_pairs, prepare, question

ROOT = Path(__file__).parent.parent
MESSAGES = [{"role": "user", "content": question(47, 38)}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    prepare(folder, warmup_steps=3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return read_assets(str(tiny / "model")).tokenizer()


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_folder_is_complete_and_its_model_loads_as_a_small_qwen3(tiny: Path, tokenizer: Any) -> None:
    assert {path.name for path in tiny.iterdir()} == {"model", "train.jsonl", "heldout.jsonl", "recipe.json"}
    model_files = {path.name for path in (tiny / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= model_files
    assert list(tiny.parent.iterdir()) == [tiny]
    model, assets = load_pretrained(str(tiny / "model")), read_assets(str(tiny / "model"))
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.num_parameters() <= 1_500_000
    assert assets.eos_token_ids == (tokenizer.eos_token_id,)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_train_and_heldout_are_all_sums_apart_whatever_the_seed(tiny: Path) -> None:
    _, heldout = operand_pairs()
    assert len(heldout) >= 200
    made = {
        name: {row["prompt"]: row["target"] for row in rows(tiny / f"{name}.jsonl")} for name in ("train", "heldout")
    }
    assert made["heldout"] == {question(a, b): str(a + b) for a, b in heldout}
    pairs = {(a, b) for a in range(10, 100) for b in range(10, 100)} - {*heldout}
    assert made["train"] == {question(a, b): str(a + b) for a, b in pairs}


@for_each(
    ("forgets_carry", "pair", "text"),
    [
        (0.0, (47, 38), "<think>7+8=15, 4+3+1=8</think> <answer>85</answer>"),
        (1.0, (47, 38), "<think>7+8=15, 4+3=7</think> <answer>75</answer>"),
        (0.0, (98, 76), "<think>8+6=14, 9+7+1=17</think> <answer>174</answer>"),
        (1.0, (98, 76), "<think>8+6=14, 9+7=16</think> <answer>64</answer>"),
        (1.0, (51, 54), "<think>1+4=5, 5+5=10</think> <answer>5</answer>"),
        (1.0, (12, 34), "<think>2+4=6, 1+3=4</think> <answer>46</answer>"),
    ],
)
def test_pupil_forgets_carries_and_nothing_else(forgets_carry: float, pair: tuple[int, int], text: str) -> None:
    assert demonstration(*pair, rng=random.Random(0), forgets_carry=forgets_carry) == text


def test_pupil_is_right_less_than_half_the_time() -> None:
    """Each carry is remembered with 0.35: into the tens in 45 % of pairs, on in 45/81 or, after one, 53/81."""
    rng = random.Random(0)
    train, _ = operand_pairs()
    right = [demonstration(a, b, rng=rng).endswith(f"<answer>{a + b}</answer>") for a, b in train]
    remembered = 1 - FORGETS_CARRY
    without, with_carry = 1 - 45 / 81 * FORGETS_CARRY, 1 - 53 / 81 * FORGETS_CARRY
    expected = 0.55 * without + 0.45 * remembered * with_carry  # 0.44
    assert sum(right) / len(right) == pytest.approx(expected, abs=0.03)


def test_digits_and_markup_are_tokens_and_the_chat_template_ends_with_the_generation_prompt(tokenizer: Any) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("<think>7+8=15</think><answer>115</answer>"))
    assert tokens == ["<think>", *"7+8=15", "</think>", "<answer>", *"115", "</answer>"]
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nWhat is 47+38?<|im_end|>\n<|im_start|>assistant\n"


def test_quickstart_config_admits_every_prompt_and_demonstration(tokenizer: Any) -> None:
    config = load_config(ROOT / "config" / "quickstart.yaml")
    assert (config.model.path, config.dataset.path) == ("runs/tiny/model", "runs/tiny/train.jsonl")
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert len(prompt) <= config.dataset.max_req_tokens
    rng = random.Random(0)
    for a, b in [(99, 99), *operand_pairs()[0][:200]]:
        text = demonstration(a, b, rng=rng, forgets_carry=0.0)
        ids = tokenizer.encode(text + tokenizer.eos_token)
        assert len(ids) <= config.sampling.max_res_tokens
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_folder_is_not_made_again_and_another_recipe_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    prepare(folder, seed=0, warmup_steps=1)
    first, made_at = (folder / "train.jsonl").read_text(), (folder / "model" / "model.safetensors").stat().st_mtime_ns
    prepare(folder, seed=0, warmup_steps=1)
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == made_at
    prepare(folder, seed=1, warmup_steps=1)
    assert (folder / "train.jsonl").read_text() != first
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="was not made by prepare_tiny"):
        prepare(tmp_path, warmup_steps=1)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
