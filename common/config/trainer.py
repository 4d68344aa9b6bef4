"""Config of the trainer and its loss, and what all sections have in common; `sluice.common.config.schema` holds the others."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sluice.common.errors import did_you_mean
from sluice.common.loading import is_function_path
from sluice.common.paths import PathKind

DType = Literal["float32", "bfloat16", "float16"]

_MAX_REFILL = 10
"""DAPO's max_num_gen_batches (verl's recipe)."""


class Section(BaseModel):
    """A section of the config: data, frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _fits_a_machine(cls, value: Any) -> Any:
        # What tensors, Lua and Redis hold: beyond it they fail far from here.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("is beyond 64 bits")
        return value


LossName = Literal["grpo", "gspo", "cispo", "sapo", "reinforce", "dppo"]
AdvantageName = Literal["group", "none", "batch", "rloo", "reinforce_pp", "maxrl"]


def _known_or_path(known: tuple[str, ...], name: object) -> object:
    if isinstance(name, str) and name not in known and not is_function_path(name):
        hint = f"{near} " if (near := did_you_mean(name, known)) else ""
        raise ValueError(f"{name!r} is not known; {hint}Use one of {', '.join(known)}, or a path (file.py:function)")
    return name


Loss = Annotated[LossName | str, PathKind.FUNCTION, BeforeValidator(partial(_known_or_path, get_args(LossName)))]
Advantage = Annotated[
    AdvantageName | str, PathKind.FUNCTION, BeforeValidator(partial(_known_or_path, get_args(AdvantageName)))
]


class LossConfig(Section):
    """Policy loss; formulas and sources in docs/algorithms.md."""

    loss: Loss = "grpo"
    """`grpo`: PPO-clip on group advantages. `gspo`: the same on sequence ratios. `cispo`, `reinforce`: a capped weight
    without gradient. `sapo`: a soft gate. `dppo`: tokens whose probability moved too far are dropped. Or a function of
    your own: `losses.py:my_loss` (docs/extending.md)."""
    clip_low: float = Field(default=0.2, ge=0.0)
    """eps_low of `grpo`, `gspo`: the ratio is clipped below at 1 - eps_low; `dppo`: bound on a fall of p."""
    clip_high: float = Field(default=0.2, ge=0.0)
    """eps_high of `grpo`, `gspo`: the ratio is clipped above at 1 + eps_high; `dppo`: bound on a rise of p."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """delta of `grpo`, `gspo`: the unclipped ratio is capped here (3.0 is usual); none = off."""
    cispo_cap: float = Field(default=5.0, gt=0.0)
    """Ratio cap of `cispo`."""
    sapo_tau_pos: float = Field(default=1.0, gt=0.0)
    """Temperature of `sapo` for positive advantages."""
    sapo_tau_neg: float = Field(default=1.05, gt=0.0)
    """Temperature of `sapo` for the rest."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_horizon"] = "token_mean"
    """How token losses become one number."""
    horizon: int | None = Field(default=None, ge=1)
    """L of `fixed_horizon`, in tokens."""
    kl_beta: float = Field(default=0.0, ge=0.0)
    """Weight of the KL to the reference; 0 = no reference task is sent at all."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""
    off_policy: Literal["bypass", "decoupled"] = "bypass"
    """Denominator of the ratio: the sampler's logprobs, or the trainer's own at the start of the step."""
    importance_sampling: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"] | None
    ) = None
    """Treatment of the importance weight pi_prox / pi_behav, `decoupled` only; none = the weight as it is. Per token or
    sequence (product of its ratios, or their geometric mean): capped at importance_max, or 0 outside importance_min to
    importance_max."""
    importance_min: float | None = Field(default=None, gt=0.0)
    """Lower bound of the masks."""
    importance_max: float = Field(default=2.0, gt=0.0)
    """Cap of the truncations and of `reinforce`'s weight, upper bound of the masks."""

    @model_validator(mode="after")
    def _choices_fit(self) -> LossConfig:
        if self.off_policy == "bypass" and self.importance_sampling is not None:
            raise ValueError(
                "double correction: with off_policy=bypass the ratio already corrects for the sampler; "
                "drop importance_sampling or set off_policy=decoupled"
            )
        if self.importance_sampling == "geometric_mask" and (
            self.importance_min is None or "importance_max" not in self.model_fields_set
        ):
            raise ValueError(
                "importance_sampling=geometric_mask needs importance_min and importance_max (0.99 and 1.01 are usual)"
            )
        is_masked = self.importance_sampling is not None and self.importance_sampling.endswith("_mask")
        if is_masked and self.importance_min is None:
            raise ValueError(f"importance_sampling={self.importance_sampling} needs importance_min (0.5 is usual)")
        if self.importance_min is not None and (not is_masked or self.importance_min >= self.importance_max):
            raise ValueError(
                "importance_min is the lower bound of an importance_sampling that masks and must be under importance_max"
            )
        if self.loss == "dppo" and self.off_policy != "bypass":
            raise ValueError("loss=dppo bounds the distance to the sampler itself: set off_policy=bypass")
        if self.dual_clip is not None and (self.loss not in ("grpo", "gspo") or self.dual_clip <= 1 + self.clip_high):
            raise ValueError("dual_clip belongs to loss=grpo or gspo and must be over 1 + clip_high")
        if (self.aggregation == "fixed_horizon") != (self.horizon is not None):
            raise ValueError("aggregation=fixed_horizon and horizon belong together: set both or neither")
        return self


class OverlongPenalty(Section):
    """What a completion near the bound on its length loses of its reward; arXiv:2503.14476, equation 13."""

    buffer_tokens: int = Field(ge=1)
    """The penalty grows linearly over this many tokens before sampling.max_res_tokens."""
    penalty: float = Field(default=1.0, gt=0.0)
    """Subtracted from the reward of a completion of full length."""


PEFT_MISSING = "trainer.lora needs peft: `pip install 'sluice-rl[lora]'`, or leave trainer.lora out"


class LoraConfig(Section):
    """A low-rank adapter that is trained instead of the model's own weights; needs the extra `sluice-rl[lora]`."""

    rank: int = Field(default=16, ge=1)
    """r: rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product B A is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Linear layers that get an adapter: all but the output head, or those whose names end so (`[q_proj, v_proj]`)."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


class TrainerConfig(Section):
    """In a file, the key `preset` sets several of these at once; it is resolved when the file is read."""

    num_steps: int = Field(default=100, ge=1)
    """Batches of the run; each gives a policy version."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps per batch (mu of GRPO). Over 1 the ratio moves away from 1 and the clip acts in `decoupled` too."""
    local_batch_size: int = Field(default=2, ge=1)
    """Full-length sequences per micro-batch; with seq_len this is the token budget."""
    max_tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """The token budget of one forward and backward pass, instead of local_batch_size * seq_len. Prompts and
    completions count; so does padding where packing is off or the model cannot be packed."""
    packing: Literal["auto", "off"] = "auto"
    """`auto`: no padding runs through a model that needs none (all layers plain causal attention). `off`: always padded."""
    seq_len: int = Field(default=2048, ge=2)
    """Bound on prompt + completion, in tokens."""
    device: str = "auto"
    """As rollout.device."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Of several ranks, each holds all weights (`ddp`) or its rows of them (`fsdp`); `auto`: fsdp on GPUs, ddp on
    CPUs. The batch is the same for any number of ranks."""
    autocast: Literal["float32", "bfloat16"] = "float32"
    """Compute precision; master weights and optimizer state are float32 always. (float16 has too small a range for
    gradients of a loss that is divided by all tokens of a step.)"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    advantage: Advantage = "group"
    """Baseline and scale of the rewards; docs/algorithms.md. Or a function of your own: `advantages.py:my_advantages`."""
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal, or of which fewer than two can be scored, and admit others in their place
    (DAPO's dynamic sampling)."""
    max_refill: int = Field(default=_MAX_REFILL, ge=1)
    """filter_zero_variance only: batches' worth of groups that may be dropped for one batch; after that such groups are
    trained, with advantage 0, until the batch is sampled."""
    skip_zero_gradient: Literal["auto", "off"] = "auto"
    """Leave sequences without a gradient (advantage 0 and no KL, or no token in the loss) out of forward and backward pass; the
    step is the same. Not with a loss or objective of your own, nor, where the advantage is 0, with `dppo`."""
    loss: LossConfig = LossConfig()
    """Policy loss."""
    objective: Annotated[str | None, PathKind.FUNCTION] = None
    """A function of your own in place of the whole policy loss, aggregation and KL included; none = the policy loss."""
    mask_truncated: bool = False
    """Keep completions that ran into max_res_tokens out of the loss; their rewards still count for the group's baseline."""
    overlong_penalty: OverlongPenalty | None = None
    """Lower the rewards of long completions before advantages are computed; none = off."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW decoupled weight decay, on matrices only."""
    warmup_steps: int = Field(default=1, ge=0)
    """Linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up, down to 0 at num_steps."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled to at most this global norm."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter on frozen weights; none = train all weights."""
    max_lost_batches: int | None = Field(default=4, ge=1)
    """The run ends with exit code 3 when this many batches' worth of groups in a row was lost (dead-lettered, or unreadable
    for the trainer) and no step was made meanwhile; none = never."""
    max_dropped_epochs: int | None = Field(default=1, ge=1)
    """The run ends with exit code 3 when no row of this many epochs in a row could be used (all prompts too long, or bad rows);
    none = never."""
    stall_report_s: float = Field(default=5.0, gt=0)
    """While no batch is ready, the cause is logged this often, in seconds."""

    @model_validator(mode="after")
    def _choices_fit(self) -> TrainerConfig:
        if self.objective is not None and not is_function_path(self.objective):
            raise ValueError(
                f"objective = {self.objective!r} is no path: write file.py:function or pkg.module:function"
            )
        if self.advantage == "maxrl" and self.overlong_penalty is not None:
            raise ValueError(
                "advantage=maxrl needs rewards >= 0, which overlong_penalty may break: drop one of the two"
            )
        if self.max_refill != _MAX_REFILL and not self.filter_zero_variance:
            raise ValueError(
                "max_refill has no effect without filter_zero_variance: set that to true, or drop max_refill"
            )
        return self

    @property
    def has_user_functions(self) -> bool:
        """Whether loss, advantage or objective is a user's own code."""
        return self.objective is not None or is_function_path(self.loss.loss) or is_function_path(self.advantage)

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one forward and backward pass, at most."""
        return self.max_tokens_per_microbatch or self.local_batch_size * self.seq_len
