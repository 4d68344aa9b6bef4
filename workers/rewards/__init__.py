"""Reward functions that ship with Sluice. Nothing here imports torch or transformers: a reward worker is CPU-only."""

from sluice.workers.rewards.code_reward import CodeReward
from sluice.workers.rewards.math_reward import MathReward
from sluice.workers.rewards.thinking_reward import ThinkingReward

__all__ = ["CodeReward", "MathReward", "ThinkingReward"]
