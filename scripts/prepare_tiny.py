"""The quickstart's task and its imperfect model, made from nothing: two-digit sums, and noisy demonstrations.

    FOLDER/model/          HF format: Qwen3 architecture, tokenizer with a chat template, generation_config.json
    FOLDER/train.jsonl     {"prompt": "What is 47+38?", "target": "85"}: 90 % of the operand pairs, shuffled
    FOLDER/heldout.jsonl   the other 10 %, chosen by a hash of the pair: never in a demonstration, never in training
    FOLDER/recipe.json     what made this folder; the same recipe is never made twice

The demonstrations work column by column, but each carry is omitted with probability 0.65. So the model learns every skill,
and one error for RL to undo. Everything is written into a folder beside
FOLDER, which is renamed last: FOLDER is complete or absent.

    python -m sluice.scripts.prepare_tiny runs/tiny [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from sluice.common.config.sft import SftConfig
from sluice.common.errors import ConfigError
from sluice.trainer.sft import SftTrainer

RECIPE = 2  # raise it when anything below changes what is made
WARMUP_STEPS = 700
WARMUP_BATCH = 24
WARMUP = {
    "seq_len": 128,
    "local_batch_size": WARMUP_BATCH,
    "device": "cpu",
    "max_grad_norm": 1e6,
    "learning_rate": 3e-3,
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "warmup_steps": 0,
    "schedule": "cosine",
}
FORGETS_CARRY = 0.65
HELD_OUT = 10  # one operand pair of this many

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKUP = ("<think>", "</think>", "<answer>", "</answer>")  # ordinary tokens: they survive `skip_special_tokens`
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Pair = tuple[int, int]


def prepare(
    folder: Path, *, seed: int = 0, warmup_steps: int = WARMUP_STEPS, say: Callable[[str], None] = print
) -> None:
    """Make the folder, unless this recipe already made it. Raises ConfigError where it holds something else.

    say: told how far it is.
    """
    recipe = {"recipe": RECIPE, "seed": seed, "warmup_steps": warmup_steps}
    if folder.exists():
        if not (folder / "recipe.json").is_file():
            raise ConfigError(
                f"{folder} exists and was not made by prepare_tiny: move it away, or work in another folder"
            )
        if json.loads((folder / "recipe.json").read_text()) == recipe:
            say(f"{folder} is there")
            return
    say(f"making a model of 0.33 M parameters and its task in {folder}: supervised training on sums with slips, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        draft = Path(made) / folder.name
        _write(draft, seed=seed, warmup_steps=warmup_steps, say=say)
        (draft / "recipe.json").write_text(json.dumps(recipe) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)


def _write(folder: Path, *, seed: int, warmup_steps: int, say: Callable[[str], None]) -> None:
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(
        1
    )  # a second one saves a quarter of the time on a quiet machine, and multiplies it on a busy one
    rng = random.Random(seed)
    train, heldout = operand_pairs()
    rng.shuffle(train)
    rng.shuffle(heldout)
    tokenizer = build_tokenizer(train, rng=rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_model(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = demonstrations(train, rng=rng, count=warmup_steps * WARMUP_BATCH)
        _warm_up(folder, rows, num_steps=warmup_steps, seed=seed, say=say)
    for name, pairs in (("train", train), ("heldout", heldout)):
        _write_rows(folder / f"{name}.jsonl", [{"prompt": question(a, b), "target": str(a + b)} for a, b in pairs])


def operand_pairs() -> tuple[list[Pair], list[Pair]]:
    """Return (training pairs, held-out pairs) of two-digit operands; the split depends on the pair alone."""
    train: list[Pair] = []
    heldout: list[Pair] = []
    for a, b in product(range(10, 100), repeat=2):
        digest = hashlib.sha256(f"{a}+{b}".encode()).digest()
        (heldout if int.from_bytes(digest[:4], "big") % HELD_OUT == 0 else train).append((a, b))
    return train, heldout


def question(a: int, b: int) -> str:
    """Return the prompt of a pair."""
    return f"What is {a}+{b}?"


def demonstration(a: int, b: int, *, rng: random.Random, forgets_carry: float = FORGETS_CARRY) -> str:
    """Write a noisy demonstration: units, tens, answer. Either carry, into the tens or the hundreds, may be omitted."""
    units = a % 10 + b % 10
    carry = int(units >= 10 and rng.random() >= forgets_carry)
    tens = a // 10 + b // 10 + carry
    kept = tens % 10 if rng.random() < forgets_carry else tens
    columns = f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{'+1' * carry}={tens}"
    return f"<think>{columns}</think> <answer>{kept * 10 + units % 10}</answer>"


def build_tokenizer(pairs: list[Pair], *, rng: random.Random) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the task's own text, every digit a token of its own."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["system\n", "user\n", "assistant\n"]
    texts += [question(a, b) + demonstration(a, b, rng=rng) for a, b in pairs[:1000]]
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE, model_max_length=128
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Make the architecture with fresh weights."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.08,  # the default of 0.02 learns much slower at this size
        **ends,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, **ends)
    return model


def demonstrations(pairs: list[Pair], *, rng: random.Random, count: int) -> list[dict[str, str]]:
    """Make rows of random training pairs, as `sluice sft` reads them."""
    drawn = (rng.choice(pairs) for _ in range(count))
    return [{"prompt": question(a, b), "completion": demonstration(a, b, rng=rng)} for a, b in drawn]


def _warm_up(
    folder: Path, rows: list[dict[str, str]], *, num_steps: int, seed: int, say: Callable[[str], None]
) -> None:
    """Train folder/model in place, supervised: it learns the distribution of the demonstrations, errors included."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".warm-up-") as made:
        data, run = Path(made) / "demonstrations.jsonl", Path(made) / "run"
        _write_rows(data, rows)
        config = SftConfig.model_validate(
            {
                "seed": seed,
                "model": {"path": str(folder / "model")},
                "dataset": {"path": str(data), "streaming": True, "shuffle": False},  # a stream leaves no cache behind
                "batch_size": WARMUP_BATCH,
                "trainer": {"num_steps": num_steps, **WARMUP},
                "checkpoint": {"every_steps": num_steps},
            }
        )

        def show(metrics: dict[str, float]) -> None:
            step = int(metrics["step"])
            if step % 100 == 0 or step == num_steps:
                say(f"supervised step {step}/{num_steps}  loss {metrics['loss']:.3f}")

        SftTrainer(config, run).train(show)
        shutil.rmtree(folder / "model")
        (run / "model").rename(folder / "model")


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the quickstart's task and its imperfect model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args.folder, seed=args.seed)


if __name__ == "__main__":
    main()
