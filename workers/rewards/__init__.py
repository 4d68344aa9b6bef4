"""Reward functions that ship with Sluice. Nothing here imports torch or transformers: a reward worker is CPU-only."""

from workers.rewards.code_reward import CodeReward
from workers.rewards.math_reward import MathReward
from workers.rewards.thinking_reward import ThinkingReward

__all__ = ["CodeReward", "MathReward", "ThinkingReward"]
