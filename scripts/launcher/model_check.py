"""Whether the roles compute a run's model exactly, found before anything is started: on a small copy with random weights."""

from __future__ import annotations

import logging

from sluice.common.config import Config
from sluice.common.errors import ConfigError
from sluice.common.models.assets import ModelAssets, explained

log = logging.getLogger(__name__)


def check_model(config: Config, assets: ModelAssets) -> None:
    """Check engine and trainer on every kind of sequence that the run may have. Raises ConfigError."""
    from sluice.common.models.tiny import tiny_model  # torch loads here

    # isort: split
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    from sluice.common.models.logprobs import check_scoring
    from sluice.common.models.probe import EXACT
    from sluice.workers.engine.torch.probe import check_decoding

    if assets.config.get("is_encoder_decoder"):
        raise ConfigError(
            f"model.path = {config.model.path!r} is an encoder-decoder ({assets.config.get('model_type')}): its prompts go "
            "through an encoder, which nothing here runs. Use a decoder-only causal language model"
        )
    if (
        "text_config" in assets.config
        and type(AutoConfig.for_model(**assets.config)) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise ConfigError(
            f"model.path = {config.model.path!r} is multimodal ({assets.config.get('model_type')}), and transformers does not "
            "load it as a causal language model: use its text-only release, or save its language model alone"
        )
    torch.set_num_threads(1)  # the copy is small: threads would wait for each other, the longer the busier the machine
    with explained(config.model.path):
        model = tiny_model(assets)
    if model is None:
        log.info("%s has no small copy: the roles check the model when they load it", config.model.path)
        return
    try:
        if config.rollout.engine == "torch":
            max_model_len = config.rollout.max_model_len or config.trainer.seq_len
            check_decoding(model, max_model_len=max_model_len, bound=EXACT)
        check_scoring(model, longest=config.trainer.seq_len, bound=EXACT)
    except ConfigError as error:
        raise ConfigError(f"model.path = {config.model.path!r}: {error}") from error
