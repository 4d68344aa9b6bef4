"""Supervised training on prompts and completions: the warm start of a run, in one process, without Redis.

    read batch_size examples -> micro-batches -> mean NLL of the completion tokens -> clip -> step -> metrics
    -> every few steps: checkpoint             -> at the end: checkpoint, and <folder>/model for `model.path` of a run

Model, packing, optimizer and checkpoints are those of RL; prompt tokens are not in the loss.

Which examples a step sees is a function of the config and the step: cursors in order, without those skipped. So a resumed
run continues bit for bit.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sluice.common.config.sft import ExamplesConfig, SftConfig
from sluice.common.errors import ConfigError
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import load_pretrained
from sluice.common.models.logprobs import score_sequences
from sluice.trainer.checkpoint import (
    TrainerState,
    go_on_from,
    newest_checkpoint,
    random_state,
    removed_on_failure,
    save_checkpoint,
)
from sluice.trainer.examples import Example, ExampleSource, micro_batches_of
from sluice.trainer.export import export_checkpoint
from sluice.trainer.scorer import autocast
from sluice.trainer.step_metrics import append_line
from sluice.trainer.trained_policy import TrainedPolicy

log = logging.getLogger("sluice.sft")

MAX_SKIPPED_ROWS = 10_000
"""Rows of a stream without a trainable one after which training fails; of a table, all its rows."""


def completion_nll(
    *, policy_logprobs: Tensor, loss_mask: Tensor, num_tokens: int, **_: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute -sum of the completion tokens' logprobs / completion tokens of the step: an `Objective`."""
    nll = -torch.where(loss_mask, policy_logprobs, 0.0).sum()
    own_tokens = loss_mask.sum().to(nll.dtype)
    return nll / num_tokens, {"loss": nll.detach() / own_tokens.clamp(min=1), "loss/num_tokens": own_tokens}


class SftTrainer:
    """One supervised training in one folder; it resumes from the folder's newest checkpoint."""

    def __init__(self, config: SftConfig, folder: Path) -> None:
        """Read model, data and the newest checkpoint. Raises ConfigError where one of them is invalid."""
        assets = read_assets(config.model.path, revision=config.model.revision)
        self._tokenizer, self._eos_token_ids = assets.tokenizer(), assets.eos_token_ids
        self.folder = folder
        self._source = self._open(config, config.dataset, section="dataset")
        self._source.example_at(0)
        self.config = config if config.num_epochs is None else config.for_examples(self._num_examples(config))
        "with epochs converted to steps"
        self._held_out = self._read_held_out()
        torch.manual_seed(config.seed)
        self.policy = TrainedPolicy(
            load_pretrained(config.model.path, revision=config.model.revision),
            self.config.trainer,
            objective=completion_nll,
        )
        self.step, self._cursor, self._saved_step, self._wall_s = 0, 0, 0, 0.0
        if found := newest_checkpoint(folder / "checkpoints"):
            go_on_from(found, self.policy)
            self.step = self._saved_step = found.state.step
            self._cursor, self._wall_s = found.state.cursor, found.state.wall_s
            log.info("resumed at step %d from %s", self.step, found.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(self.config.to_yaml())

    def train(self, on_step: Callable[[dict[str, float]], None], *, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until told to stop; return whether it is the last. Both leave a checkpoint.

        on_step: called with the metrics of each step, and before the first with those of the held-out set.
        """
        with closing(self._source):
            if self.step == 0 and self._held_out:
                self._report({"step": 0.0, "held_out/loss": self.held_out_loss()}, on_step)
            started = time.monotonic() - self._wall_s
            while self.step < self.config.trainer.num_steps and not stop():
                metrics = self._one_step()
                self._wall_s = time.monotonic() - started
                self._report(metrics, on_step)
                if self.step % self.config.checkpoint.every_steps == 0:
                    self._checkpoint()
            if self.step != self._saved_step:
                self._checkpoint()
        if self.step < self.config.trainer.num_steps:
            return False
        self._export()
        return True

    def _one_step(self) -> dict[str, float]:
        began = time.monotonic()
        examples = self._next_examples()
        budget = self.config.trainer.microbatch_tokens
        micro_batches = micro_batches_of(examples, max_tokens=budget, packed=self.policy.is_packed)
        metrics = self.policy.optimize(micro_batches, step=self.step + 1)
        self.step += 1
        metrics["step"] = float(self.step)
        metrics["num_tokens"] = float(sum(len(example.token_ids) for example in examples))
        metrics["time/step"] = time.monotonic() - began
        metrics["throughput/trained_tokens_per_s"] = metrics["num_tokens"] / metrics["time/step"]
        metrics["num_skipped"] = float(self._cursor - self.step * self.config.batch_size)  # too long, or malformed
        if self._source.num_rows:
            metrics["epoch"] = self._cursor / self._source.num_rows
        held_out = self.config.held_out
        is_due = held_out and held_out.every_steps and self.step % held_out.every_steps == 0
        if held_out and (is_due or self.step == self.config.trainer.num_steps):
            metrics["held_out/loss"] = self.held_out_loss()
        return metrics

    def _next_examples(self) -> list[Example]:
        examples: list[Example] = []
        skipped = 0
        while len(examples) < self.config.batch_size:
            example = self._source.example_or_none(self._cursor)
            self._cursor += 1
            skipped = 0 if example else skipped + 1
            if example:
                examples.append(example)
            elif skipped >= (self._source.num_rows or MAX_SKIPPED_ROWS):
                raise ConfigError(_nothing_fits(self.config, self.config.dataset, "dataset"))
        return examples

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean NLL of the held-out completion tokens, in nats."""
        sequences = [(example.prompt_ids, example.token_ids) for example in self._held_out]
        config = self.config.trainer
        with autocast(self.policy.device, config.autocast):
            scored = score_sequences(self.policy.model, sequences, max_batch_tokens=config.microbatch_tokens)
        total = sum(float(logprobs.sum(dtype=np.float64)) for logprobs in scored)
        return -total / sum(len(tokens) for _, tokens in sequences)

    def _read_held_out(self) -> list[Example]:
        config = self.config.held_out
        if config is None:
            return []
        section = "held_out.dataset"
        source = self._open(self.config, config.dataset.model_copy(update={"shuffle": False}), section=section)
        source.example_at(0)
        count = min(source.num_rows or config.num_examples or 0, config.num_examples or 10**9)
        rows = []
        for cursor in range(count):
            if source.epoch_of(cursor):
                break  # a stream that is shorter than num_examples
            rows.append(source.example_or_none(cursor))
        source.close()
        examples = [example for example in rows if example]
        if not examples:
            raise ConfigError(_nothing_fits(self.config, config.dataset, section))
        if len(examples) < len(rows):
            log.warning("%s: %d of %d rows are left out", section, len(rows) - len(examples), len(rows))
        return examples

    def _num_examples(self, config: SftConfig) -> int:
        """Count the examples of one epoch."""
        if self._source.num_rows is None:
            raise ConfigError(
                "num_epochs counts passes over a table, and dataset.streaming is on: set trainer.num_steps"
            )
        log.info("num_epochs: counting the examples among %d rows", self._source.num_rows)
        found = self._source.count()
        if not found:
            raise ConfigError(_nothing_fits(config, config.dataset, "dataset"))
        return found

    def _open(self, config: SftConfig, dataset: ExamplesConfig, *, section: str) -> ExampleSource:
        return ExampleSource(
            dataset,
            self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            max_tokens=config.trainer.seq_len,
            seed=config.seed,
            section=section,
        )

    def _report(self, metrics: dict[str, float], on_step: Callable[[dict[str, float]], None]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        append_line(self.folder / "metrics.jsonl", {"time": time.time(), **finite})
        on_step(metrics)

    def _checkpoint(self) -> None:
        state = TrainerState(
            step=self.step,
            version=0,
            cursor=self._cursor,
            random_state=random_state(),
            wall_s=self._wall_s,
            base_digest=self.policy.base_digest,
        )
        save_checkpoint(self.folder / "checkpoints", state, write=self.policy.save, keep=self.config.checkpoint.keep)
        self._saved_step = self.step

    def _export(self) -> None:
        """Write `<folder>/model` completely or not at all; an existing one stays until the new one is complete."""
        target, draft, old = self.folder / "model", self.folder / ".model", self.folder / ".old-model"
        del self.policy  # the checkpoint has it all, and one model in memory is enough
        if old.exists() and not target.exists():  # killed between the two renames
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        with removed_on_failure(draft):
            export_checkpoint(self.folder, draft)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _nothing_fits(config: SftConfig, dataset: ExamplesConfig, section: str) -> str:
    return (
        f"{section}.path = {dataset.path!r}: no row can be trained on; all are longer than trainer.seq_len = "
        f"{config.trainer.seq_len} tokens, or malformed"
    )
