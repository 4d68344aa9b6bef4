"""Talking to a checkpoint: prompts as in training, answers token by token. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from sluice.common.config import Config, SamplingConfig
from sluice.common.config.file import read_training_config
from sluice.common.errors import ConfigError
from sluice.common.models.assets import read_assets
from sluice.common.models.causal_lm import resolve_device
from sluice.common.monitoring.printable import printable
from sluice.scripts.api.export import without_bars
from sluice.trainer.checkpoint import checkpoint_at
from sluice.trainer.export import trained_model

Message = Mapping[str, str]


class _PrintableStreamer(TextStreamer):
    """Prints what a model writes, but no control characters: those would act on the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), flush=True, end="\n" if stream_end else "")


class Chat:
    """The model of one checkpoint, with the prompts and the bounds of its training."""

    def __init__(self, run_folder: Path, *, step: int | None, device: str = "auto") -> None:
        """Load it; step: none = the newest. Raises ConfigError."""
        self.step = step
        "as it was asked for"
        config = read_training_config(run_folder)
        checkpoint = checkpoint_at(run_folder / "checkpoints", step)
        self.loaded_step = checkpoint.state.step
        assets = read_assets(config.model.path, revision=config.model.revision)
        self._tokenizer: Any = assets.tokenizer()
        with without_bars():
            model: Any = trained_model(config, checkpoint)
        self._model = model.to(resolve_device(device)).eval()
        self._ends = list(assets.eos_token_ids)
        self._dataset = config.dataset
        self._sampling = config.sampling if isinstance(config, Config) else SamplingConfig()

    def answer(
        self,
        prompt: str | Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        streamer: TextStreamer | None = None,
    ) -> str:
        """Return the answer to a text, or to chat messages. Raises ConfigError for messages where there is no chat template."""
        sampling = self._sampling
        given = self._tokenizer(self._text(prompt), add_special_tokens=False, return_tensors="pt").to(
            self._model.device
        )
        settings: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            settings = {"do_sample": True, "temperature": temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            settings["min_p"] = sampling.min_p or None
        config = GenerationConfig(
            **settings,
            max_new_tokens=max_tokens or sampling.max_res_tokens,
            eos_token_id=self._ends,
            pad_token_id=self._ends[0],
            stop_strings=list(sampling.stop) or None,
        )
        with torch.no_grad():
            made = self._model.generate(**given, generation_config=config, tokenizer=self._tokenizer, streamer=streamer)
        ids = made[0, given["input_ids"].shape[1] :]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def streamer(self) -> TextStreamer:
        """Return what prints an answer to standard output while it is made."""
        return _PrintableStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)

    def _text(self, prompt: str | Sequence[Message]) -> str:
        """Return the text before the answer, as training has it (common/data/prompt_reader.py)."""
        system, is_text = self._dataset.system_prompt, isinstance(prompt, str)
        if not (self._dataset.chat_template and self._tokenizer.chat_template):
            if not is_text:
                raise ConfigError(
                    "chat messages need a chat template, and this run has none (dataset.chat_template): give a text"
                )
            return str(prompt) if system is None else f"{system}\n\n{prompt}"
        messages = [{"role": "user", "content": prompt}] if is_text else [dict(message) for message in prompt]  # type: ignore[arg-type]
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
