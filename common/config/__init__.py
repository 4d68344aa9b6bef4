"""The typed run config: data only, frozen. `schema` holds the run's own sections, the modules beside it the larger ones."""

from sluice.common.config.operations import ReplicasConfig
from sluice.common.config.schema import (
    Config,
    DatasetConfig,
    EvalDataset,
    ModelConfig,
    PolicyStoreConfig,
    PromptConfig,
    RewardFunction,
    SamplingConfig,
)
from sluice.common.config.trainer import LossConfig, TrainerConfig

__all__ = [
    "Config",
    "DatasetConfig",
    "EvalDataset",
    "LossConfig",
    "ModelConfig",
    "PolicyStoreConfig",
    "PromptConfig",
    "ReplicasConfig",
    "RewardFunction",
    "SamplingConfig",
    "TrainerConfig",
]
