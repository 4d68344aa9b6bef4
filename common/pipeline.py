"""The stages of a group: the table that everything else reads.

    task --> rollout --> reward ----+--> ready for training, or scored (groups of evaluations)
                    +--> reference -+

A stage of a group is pending as soon as all that it waits for is stored. A worker on its queue claims it and stores its
result, under the name of the stage, in the hash of the group (common/ledger). Queues, and the roles that serve them, follow
from the stages. A name may carry an index (`episode.3`): several stages of one kind.

A new stage takes an entry here, a module of `sluice.workers` that runs it, a number of workers in `ReplicasConfig`, and,
where its result reaches the trainer, a field in `Group.from_results` (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sluice.common.config import Config

Kind = Literal["train", "eval"]
"""Of a group: it is trained on, or belongs to an evaluation."""
KINDS: tuple[Kind, ...] = ("train", "eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One kind of work on a group."""

    name: str
    queue: str
    "Celery queue, and the role of the workers that serve it"
    celery_task: str
    module: str
    "of sluice.workers: its `prepare` registers the Celery task"
    labels: tuple[str, str]
    "in a trace: when it has begun, and when its result is stored"
    eval_queue: str = ""
    "where groups of evaluations have workers of their own"
    waits_for: tuple[str, ...] = ()
    "stages whose results it needs"
    needed_with: str = ""
    "key of the config: training groups go through it only where that is set, and not 0; empty = always"
    is_evaluated: bool = True
    "whether groups of evaluations do"
    pool: Literal["threads", "prefork"] = "threads"
    "of its workers; only prefork has Celery's time limits"
    section: str = ""
    "of the config, whose `concurrency` is how many groups one worker works on at a time; empty = one"
    needs_device: bool = False
    "a GPU, where there is one"
    needs_weights: bool = False
    "it loads published policies, so it has the key that signs them"

    def is_needed(self, config: Config, kind: Kind = "train") -> bool:
        """Return whether groups of this kind go through it."""
        return self.is_evaluated if kind == "eval" else not self.needed_with or bool(_at(config, self.needed_with))

    def concurrency(self, config: Config) -> int:
        """Return how many groups one worker works on at a time."""
        return int(_at(config, f"{self.section}.concurrency")) if self.section else 1

    def queue_for(self, kind: Kind) -> str:
        """Return the queue on which a group of this kind waits for it."""
        return self.eval_queue if kind == "eval" and self.eval_queue else self.queue


STAGES = (
    Stage(
        name="task",
        queue="dataset",
        celery_task="dataset.prepare",
        module="dataset",
        labels=("preparation begun", "prompt prepared"),
    ),
    Stage(
        name="rollout",
        queue="rollout",
        eval_queue="eval",
        celery_task="rollout.generate",
        module="rollout",
        labels=("generation begun", "generated"),
        waits_for=("task",),
        section="rollout",
        needs_device=True,
        needs_weights=True,
    ),
    Stage(
        name="reward",
        queue="reward",
        celery_task="reward.score",
        module="reward",
        labels=("scoring begun", "scored"),
        waits_for=("rollout",),
        pool="prefork",
        section="reward",
    ),
    Stage(
        name="reference",
        queue="reference",
        celery_task="reference.score",
        module="reference",
        labels=("reference begun", "referenced"),
        waits_for=("rollout",),
        needed_with="trainer.loss.kl_beta",
        is_evaluated=False,
        section="reference",
        needs_device=True,
        needs_weights=True,
    ),
)
FIRST = STAGES[0]
"""The stage that admission claims."""
EVALUATED = "reward"
"""The stage whose result an evaluation keeps."""
QUEUES = tuple(dict.fromkeys([*(s.queue for s in STAGES), *(s.eval_queue for s in STAGES if s.eval_queue)]))
COMMANDS = ("dataset.fill", "dataset.evaluate")
"""Tasks of the first queue that concern no one group."""
ROLES = (*QUEUES, "trainer")
"""Roles that send heartbeats."""


def stage_of(name: str) -> Stage:
    """Return the stage of a name, with or without an index. Raises KeyError."""
    return {stage.name: stage for stage in STAGES}[name.partition(".")[0]]


def stage_on(queue: str) -> Stage:
    """Return the stage that workers on a queue run, the same for queues served together (`rollout,eval`). Raises KeyError."""
    by_queue = {name: stage for stage in STAGES for name in (stage.queue, stage.eval_queue)}
    return by_queue[queue.partition(",")[0]]


def tasks_on(queue: str) -> dict[str, int]:
    """Return the Celery tasks that messages on a queue may name -> how many arguments, all ids, each takes."""
    stages = {stage.celery_task: 1 for stage in STAGES if queue in (stage.queue, stage.eval_queue)}
    return stages | (dict.fromkeys(COMMANDS, 0) if queue == FIRST.queue else {})


def kind_of(group_id: str) -> Kind:
    """Return the kind of a group: training groups are named t<cursor>, groups of evaluations e<...>."""
    return "eval" if group_id.startswith("e") else "train"


def stages_for(config: Config, kind: Kind = "train") -> tuple[Stage, ...]:
    """Return the stages that a group of this kind goes through."""
    return tuple(stage for stage in STAGES if stage.is_needed(config, kind))


def plan_for(config: Config, kind: Kind) -> str:
    """Return these stages with what each waits for, as the ledger's scripts read it: `task< rollout<task reward<rollout`."""
    return " ".join(f"{stage.name}<{','.join(stage.waits_for)}" for stage in stages_for(config, kind))


def _at(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
