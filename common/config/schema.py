"""The typed run config: data only, frozen, unknown keys refused with the nearest name.

`sluice.common.config.file` reads it from sparse YAML and overrides. The resolved config is stored in Redis when the run is
created and is the only source from then on. Validation checks; it never fills in another section.
Derived values are properties. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from sluice.common.config.evaluation import EvalScores
from sluice.common.config.operations import AutoscaleConfig, DashboardConfig, MetricsConfig, ReplicasConfig
from sluice.common.config.template import template_columns
from sluice.common.config.trainer import DType, Section, TrainerConfig
from sluice.common.config.yaml_text import dump_yaml
from sluice.common.paths import PathKind

INSPECTION = {"purpose": "inspection"}
"""Validation context in which a config is made although its sections do not fit together: to look for its other mistakes."""


class ModelConfig(Section):
    path: Annotated[str, PathKind.SOURCE]
    """Hub id (`Qwen/Qwen3-1.7B`) or folder with config.json, weights and tokenizer."""
    revision: str | None = None
    """Hub revision; none = the hub's default branch."""


class PromptConfig(Section):
    """A dataset and its prompts: what RL and supervised training read alike."""

    path: Annotated[str, PathKind.SOURCE]
    """Hub id (`openai/gsm8k`), or a local .jsonl, .json, .csv, .tsv, .parquet, .arrow file or folder of them."""
    name: str | None = None
    """Hub configuration name (`main` of gsm8k)."""
    revision: str | None = None
    """Hub revision."""
    split: str = "train"
    """Split to read; local files have the one split `train`."""
    streaming: bool = False
    """Read the set as a stream: shuffled in a window of `shuffle_buffer` rows, resumed by skipping rows already used."""
    shuffle: bool = True
    """Seeded permutation per epoch; off = file order."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Window of a streaming shuffle, in rows."""
    function: Annotated[str | None, PathKind.FUNCTION] = None
    """Function that makes another row of a row, or None to leave it out (`my_data.py:format`); called where rows are read."""
    prompt_column: str = "prompt"
    """Column with the question: text, or a list of chat messages."""
    prompt_template: str | None = None
    """The prompt as text with columns in braces (`"Reverse: {word}"`; `{{` is a brace), instead of prompt_column."""
    system_prompt: str | None = None
    """Put before every text prompt."""
    chat_template: bool = True
    """Apply the tokenizer's chat template to the prompt; off = plain text."""

    @field_validator("prompt_template", mode="before")
    @classmethod
    def _names_columns(cls, value: Any) -> Any:
        if isinstance(value, dict):
            raise ValueError("put it in quotes: YAML reads what begins with { as a mapping")
        if isinstance(value, str):
            template_columns(value)
        return value

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        if self.prompt_template is not None and self.prompt_column != type(self).model_fields["prompt_column"].default:
            raise ValueError("prompt_column has no effect with prompt_template: remove one of them")
        return self


class DatasetConfig(PromptConfig):
    target_column: str | None = "target"
    """Column with the answer; none = the rewards need no target."""
    target_delimiter: str | None = None
    """The target is the text after the last occurrence of this (`"#### "` in GSM8K); none = the full column."""
    max_req_tokens: int = Field(default=512, ge=1)
    """Prompts over this many tokens are skipped and counted."""


class SamplingConfig(Section):
    group_size: int = Field(default=8, ge=1)
    """Completions per prompt."""
    max_res_tokens: int = Field(default=1024, ge=1)
    """Bound on the tokens of one completion."""
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    """Softmax temperature of sampling; the trainer divides its logits by it too."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus mass kept; logprobs are those of the truncated distribution."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most likely tokens; 0 = off."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Cut tokens under min_p times the probability of the likeliest one; 0 = off."""
    min_tokens: int = Field(default=0, ge=0)
    """No completion ends before this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion, besides the model's own end tokens; they are part of it."""


class RolloutConfig(Section):
    engine: Literal["torch", "vllm"] = "torch"
    """`torch`: embedded, over a transformers model, CPU or CUDA. `vllm`: needs the extra `sluice-rl[vllm]`."""
    concurrency: int = Field(default=16, ge=1)
    """Groups that one rollout worker works on: the task threads that feed the engine's continuous batch."""
    max_sequences: int = Field(default=256, ge=1)
    """Sequences decoded together; groups beyond it wait in the engine."""
    dtype: DType = "float32"
    """Sampling precision: weights are published in it."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""
    in_flight: Literal["keep", "recompute", "drain"] = "keep"
    """Running sequences at a policy update continue with their KV cache, with a recomputed one, or finish first."""
    kv_cache_mib: int | None = Field(default=None, ge=1)
    """MiB of keys and values; sequences over it wait in the engine. None = `torch`: max_sequences of full length, `vllm`:
    what gpu_memory_utilization leaves."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Bound on prompt + completion, in tokens; none = trainer.seq_len."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """vLLM only: GPUs that share one model."""
    pipeline_parallel_size: int = Field(default=1, ge=1, le=1)
    """vLLM only; 1: with more, batches are in progress between two steps, and a token's policy version would be unknown."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """vLLM only: share of the GPU's memory that the engine may take."""
    enforce_eager: bool = False
    """vLLM only: no CUDA graphs."""


class ReferenceConfig(Section):
    dtype: DType = "bfloat16"
    """Precision of the frozen reference model."""
    device: str = "auto"
    """As rollout.device."""
    concurrency: int = Field(default=8, ge=1)
    """Groups whose logprobs may be computed in one batch, per reference worker."""
    max_batch_tokens: int = Field(default=32768, ge=1)
    """Tokens of one forward pass; pads count where the model cannot be packed (trainer.packing)."""


class RewardFunction(Section):
    function: Annotated[str, PathKind.FUNCTION]
    """One of Sluice's (`math`, `thinking`, `code`), a dotted path (`mypkg.rewards:brevity`) or a file (`rewards.py:brevity`)."""
    name: str | None = None
    """Name in metrics; none = the short name (`math`), else the function's or class' own name."""
    weight: float = 1.0
    """Weight in a `sum`; refused with `mean`, where it would have no effect."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a class, which is called once; of a function, with every call."""

    @model_validator(mode="before")
    @classmethod
    def _may_be_its_path(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value


class RewardConfig(Section):
    functions: tuple[RewardFunction, ...] = Field(min_length=1)
    """One or more reward functions; a plain string is the path of one."""
    aggregation: Literal["mean", "sum"] = "mean"
    """`mean`: unweighted mean of those that apply (the tutorial's rule); `sum`: weighted sum."""
    time_limit_s: float = Field(default=10.0, gt=0)
    """Seconds for scoring one group; over it the process is killed and the group retried."""
    concurrency: int = Field(default=1, ge=1)
    """Processes per reward worker."""
    memory_limit_mib: int | None = Field(default=4096, ge=128)
    """MiB that a scoring process may allocate (RLIMIT_DATA); none = no limit."""

    @field_validator("functions", mode="before")
    @classmethod
    def _may_be_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, dict)) else value

    @model_validator(mode="after")
    def _weights_have_an_effect(self) -> RewardConfig:
        if self.aggregation == "mean" and any(f.weight != 1.0 for f in self.functions):
            raise ValueError("weights have no effect with aggregation=mean: set reward.aggregation=sum")
        return self


class ReplayBufferConfig(Section):
    batch_size: int = Field(default=2, ge=1)
    """Groups per data-parallel rank and optimizer step."""
    dp_size: int = Field(default=1, ge=1)
    """Data-parallel ranks that the batch is meant for; the trainer divides it among as many as it has."""
    max_policy_age: int = Field(default=1, ge=0)
    """A group is trained only while current version - its version <= this. 0 = strictly on-policy."""
    max_resample_count: int | None = Field(default=0, ge=0)
    """How many more times a group may be trained; none = no limit until it is too old."""
    max_bytes: int = Field(default=4 * 1024**3, ge=1)
    """Admission stops while the groups in flight hold more bytes of Redis memory than this."""
    max_dead_bytes: int = Field(default=256 * 1024**2, ge=0)
    """Dead letters keep what they hold in at most this many bytes besides; beyond it the oldest are discarded, and counted."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=10, ge=1)
    """Steps between durable checkpoints; one more is written at the end."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    keep_best: str | None = None
    """`<set>/<score>` (`heldout/pass@1`): the checkpoint with the best value is kept as well. Evaluated steps then get a
    checkpoint, which stays until its result is known. None = off."""


class PolicyStoreConfig(Section):
    transport: Literal["directory", "redis"] = "directory"
    """`directory`: safetensors under `path`, which trainer and workers share. `redis`: chunks in Redis, where they cannot."""
    path: Annotated[str | None, PathKind.FOLDER] = None
    """Folder of the directory transport; none = /dev/shm/sluice-<user id> (this machine only)."""
    keep: int = Field(default=4, ge=2)
    """Newest versions kept; the base version, versions that an evaluation needs, and the bases of deltas stay as well."""
    delta: bool = True
    """Publish what changed since the version before where that is smaller (bf16 weights), instead of full weights."""
    full_every: int = Field(default=16, ge=2)
    """Versions from one full snapshot to the next, published beside the delta: processes without a recent version begin there."""
    pickup_alarm_s: float = Field(default=60.0, gt=0)
    """A published version that no rollout worker serves after this many seconds raises an alarm."""


class EvalDataset(EvalScores):
    name: str = Field(default="heldout", pattern=r"^[^/\x00-\x20\x7f]{1,100}$")
    """Name in metrics: eval/<name>/pass@1."""
    dataset: DatasetConfig
    """Where the prompts come from."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Rows used, from the first on; none = all."""


class EvaluationConfig(Section):
    datasets: tuple[EvalDataset, ...] = ()
    """Held-out sets; none = no evaluation."""
    every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations, besides those before and after training; 0 = only those two."""


class LeaseConfig(Section):
    running_s: float = Field(default=15.0, gt=0)
    """A claimed stage that is not renewed for this many seconds is reassigned to another worker."""
    queued_s: float = Field(default=10.0, gt=0)
    """A sent stage that no worker has claimed is sent again after this many seconds, doubling each time."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts at one stage before the group is dead-lettered: claims that failed, or were lost before they made any progress."""
    max_interruptions: int = Field(default=20, ge=1)
    """Claims of one stage that may be lost after they made progress (their workers were pre-empted), before the same."""
    shutdown_grace_s: float = Field(default=5.0, ge=0)
    """SIGTERM: what cannot finish within this many seconds is returned to the queue."""


class Config(Section):
    """One run."""

    seed: int = Field(default=0, ge=0)
    """Seed of the permutation, of sampling noise and of initialisation."""
    output_dir: Annotated[str, PathKind.FOLDER] = "runs"
    """Run folders are made under it."""
    code_folder: Annotated[str | None, PathKind.FOLDER] = None
    """Where functions named by a dotted path (`reward.functions`, `trainer.loss.loss`) are found, if they are not installed;
    none = the folder of the config file."""
    model: ModelConfig
    """The policy to train; also the frozen reference."""
    dataset: DatasetConfig
    """Training prompts."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are drawn."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout workers."""
    reference: ReferenceConfig = ReferenceConfig()
    """Reference workers."""
    reward: RewardConfig
    """Reward functions and workers."""
    replay_buffer: ReplayBufferConfig = ReplayBufferConfig()
    """Batching and the policy-age bound."""
    trainer: TrainerConfig = TrainerConfig()
    """Optimisation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Durable state of the trainer."""
    policy_store: PolicyStoreConfig = PolicyStoreConfig()
    """Where policies are published."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    lease: LeaseConfig = LeaseConfig()
    """Deadlines and retries."""
    replicas: ReplicasConfig = ReplicasConfig()
    """Worker processes per queue."""
    autoscale: AutoscaleConfig = AutoscaleConfig()
    """How worker processes follow the load, where replicas gives a range."""
    metrics: MetricsConfig = MetricsConfig()
    """Sinks."""
    dashboard: DashboardConfig = DashboardConfig()
    """The web page beside `sluice run`."""
    audit: Literal["all", "sample", "none"] = "sample"
    """Groups kept in the run folder, for `sluice replay`: of every step, of the step after each checkpoint, or none."""

    @property
    def groups_per_step(self) -> int:
        """Groups that one optimizer step consumes."""
        return self.replay_buffer.batch_size * self.replay_buffer.dp_size

    @property
    def max_credits(self) -> int:
        """Admission bound: groups whose policy version is not yet published."""
        return (self.replay_buffer.max_policy_age + 1) * self.groups_per_step

    @property
    def max_filtered(self) -> int:
        """Groups of equal rewards that may be dropped for one batch."""
        return self.trainer.max_refill * self.groups_per_step

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> Config:
        problems = [*self._over_limits(), *self._without_effect(), *self._unfit_evaluation()]
        if problems and info.context is not INSPECTION:
            raise ValueError("; ".join(problems))
        return self

    def _over_limits(self) -> Iterator[str]:
        max_res_tokens, overlong = self.sampling.max_res_tokens, self.trainer.overlong_penalty
        longest = "dataset.max_req_tokens + sampling.max_res_tokens", self.dataset.max_req_tokens + max_res_tokens
        shortest = "sampling.min_tokens", self.sampling.min_tokens
        buffer = "trainer.overlong_penalty.buffer_tokens", overlong.buffer_tokens if overlong else 0
        for (name, value), bound, limit, hint in (
            (longest, "trainer.seq_len", self.trainer.seq_len, ": raise seq_len or lower one of the two"),
            (longest, "rollout.max_model_len", self.rollout.max_model_len, ": every such group would be refused"),
            (shortest, "sampling.max_res_tokens", max_res_tokens, ""),
            (buffer, "sampling.max_res_tokens", max_res_tokens, ": every completion would be penalised"),
        ):
            if limit is not None and value > limit:
                yield f"{name} = {value} exceeds {bound} = {limit}{hint}"

    def _without_effect(self) -> Iterator[str]:
        if self.sampling.group_size == 1:
            yield (
                "sampling.group_size=1 gives every completion an advantage of 0, so nothing would be learned: "
                "use 2 or more (8 is usual)"
            )
        if self.sampling.temperature == 0:
            yield "sampling.temperature=0 makes all completions of a group equal, so nothing would be learned: use 1.0"

    def _unfit_evaluation(self) -> Iterator[str]:
        if endless := [e.name for e in self.evaluation.datasets if e.dataset.streaming and e.num_prompts is None]:
            yield f"evaluation.datasets {endless}: a streaming set needs num_prompts"
        names = [e.name for e in self.evaluation.datasets]
        if len(set(names)) != len(names):
            yield f"evaluation.datasets: names must differ, got {names}"
        best = self.checkpoint.keep_best
        known = [f"{e.name}/{score}" for e in self.evaluation.datasets for score in e.scores]
        if best is not None and best not in known:
            choice = ", ".join(known) or "none"
            yield f"checkpoint.keep_best = {best!r} is not a score of evaluation.datasets: use one of {choice}"
        elif best is not None and self.evaluation.every_steps == 0:
            yield (
                f"checkpoint.keep_best = {best!r} has nothing to compare with evaluation.every_steps=0: set how often "
                "to evaluate"
            )

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, with every default."""
        return dump_yaml(self.model_dump(mode="json"))
