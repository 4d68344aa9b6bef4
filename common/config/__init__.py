"""The typed run config: data only, frozen. `schema` holds the run's own sections, the modules beside it the larger ones."""

from sluice.common.config.operations import AutoscaleConfig, DashboardConfig, MetricsConfig, ReplicasConfig
from sluice.common.config.schema import (
    CheckpointConfig,
    Config,
    DatasetConfig,
    EvalDataset,
    EvaluationConfig,
    LeaseConfig,
    ModelConfig,
    PolicyStoreConfig,
    PromptConfig,
    ReferenceConfig,
    ReplayBufferConfig,
    RewardConfig,
    RewardFunction,
    RolloutConfig,
    SamplingConfig,
)
from sluice.common.config.trainer import LoraConfig, LossConfig, OverlongPenalty, Section, TrainerConfig

__all__ = [
    "AutoscaleConfig",
    "CheckpointConfig",
    "Config",
    "DashboardConfig",
    "DatasetConfig",
    "EvalDataset",
    "EvaluationConfig",
    "LeaseConfig",
    "LoraConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OverlongPenalty",
    "PolicyStoreConfig",
    "PromptConfig",
    "ReferenceConfig",
    "ReplayBufferConfig",
    "ReplicasConfig",
    "RewardConfig",
    "RewardFunction",
    "RolloutConfig",
    "SamplingConfig",
    "Section",
    "TrainerConfig",
]
