"""Groups that are lost on their way to the trainer: how many of the newest, why, and when a run ends because it only loses.

    a group is complete    ''      --> list `ends`; the counts of the hash `lost` begin at 0 again
    a group dies           reason  --> list `ends`; dead + 1 (undecodable + 1, where the trainer could not read it)
    an attempt fails                --> failed + 1, until a group is complete
    a row cannot be used   reason  --> list `ends`; dropped + 1, until the next row that can be used
    a step is published            --> `lost` is removed

Stale groups and groups of equal rewards are not lost: they were generated and scored, and have causes of their own. Nor are rows
that the user's function leaves out, but they count as rows that cannot be used: where all are, nothing will ever be trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import redis

from sluice.common.config import Config
from sluice.common.keys import Keys
from sluice.common.run import Run

SHOWN_BATCHES = 4
"""Batches' worth of the newest groups that are looked at where trainer.max_lost_batches is off."""
FEW = 4
"""Losses from which a run counts as losing, with smaller batches one batch; and failed attempts, more than one group has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """How the newest groups ended, and those lost in a row."""

    num_ended: int
    "newest groups that are looked at"
    num_lost: int
    "of these"
    num_dead: int
    "dead-lettered since a group was complete"
    num_failed: int
    "attempts that failed since then"
    num_undecodable: int
    "complete, but unreadable for the trainer, since the last step"
    num_dropped: int
    "rows in a row that could not be used"
    num_rows: int
    "rows of an epoch; 0 = not known"
    reason: str
    detail: str
    group: str
    run: str

    def alarm(self, config: Config) -> str | None:
        """Say that half of the newest groups were lost, or more, or that only attempts fail; None where it is not so."""
        few = min(FEW, config.groups_per_step)
        is_losing = self.num_lost >= few and 2 * self.num_lost >= self.num_ended
        return self._text() if is_losing or self.num_failed >= FEW else None

    def stall(self, config: Config) -> str | None:
        """Say that groups are lost and none is completed any more, which explains a missing step."""
        is_losing = self.num_dead + self.num_undecodable + self.num_dropped >= min(FEW, config.groups_per_step)
        return self._text() if is_losing or self.num_failed >= FEW else None

    def verdict(self, config: Config) -> str | None:
        """Say that nothing but losses came out of a whole window, so that the run ends; None while it goes on."""
        batches, epochs = config.trainer.max_lost_batches, config.trainer.max_dropped_epochs
        num_lost = max(self.num_dead, self.num_undecodable)
        if batches is not None and num_lost >= batches * config.groups_per_step:
            window = f"{num_lost} groups in a row were lost (trainer.max_lost_batches = {batches})"
        elif epochs is not None and self.num_rows and self.num_dropped >= epochs * self.num_rows:
            rows = f"none of {self.num_dropped:,} rows in a row could be used, which is every row of the dataset"
            window = f"{rows} (trainer.max_dropped_epochs = {epochs})"
        else:
            return None
        return f"the run only loses groups and has ended: {window}, and no step was made. {self._last()}"

    def _text(self) -> str:
        if not self.num_lost:
            failed = f"{self.num_failed} attempts failed"
            what = failed if self.num_failed else f"{self.num_dropped:,} rows in a row were left out"
            return f"{what}, and no group was completed meanwhile. {self._last()}"
        return f"{self.num_lost} of the last {self.num_ended} groups were lost. {self._last()}"

    def _last(self) -> str:
        """Describe the last loss, and name the command that shows more."""
        what = self.detail.partition("\n")[0]
        what = what if what.startswith(self.reason) else f"{self.reason}: {what}"
        shows = f"trace {self.group} {self.run}" if not self.num_lost else f"dead {self.run} --show {self.group}"
        more = f"ledger {self.run}" if self.num_dropped else shows
        return f"The last one, {self.group}: {what[:500]} (`sluice {more}` shows more)"


def read_losses(client: redis.Redis, run: Run) -> Losses:
    """Read the losses of a run in one round trip."""
    keys, config = run.keys, run.config
    size = (config.trainer.max_lost_batches or SHOWN_BATCHES) * config.groups_per_step
    with client.pipeline(transaction=False) as pipe:
        pipe.lrange(keys.ends, 0, size - 1)
        pipe.hgetall(keys.lost)
        ends, lost = pipe.execute()
    text = {name.decode(): value.decode(errors="replace") for name, value in lost.items()}
    return Losses(
        num_ended=len(ends),
        num_lost=sum(end != b"" for end in ends),
        num_dead=_count(text, "dead"),
        num_failed=_count(text, "failed"),
        num_undecodable=_count(text, "undecodable"),
        num_dropped=_count(text, "dropped"),
        num_rows=_count(text, "rows"),
        reason=text.get("reason", "unknown"),
        detail=text.get("detail", ""),
        group=text.get("group", "?"),
        run=run.name,
    )


def _count(text: dict[str, str], name: str) -> int:
    """Return a count of `lost`; 0 for one that somebody has overwritten with something else."""
    return int(count) if (count := text.get(name, "")).isdecimal() else 0


def forget_dropped(client: redis.Redis, keys: Keys) -> None:
    """Note that a row could be used. `client` may be a pipeline."""
    client.hdel(keys.lost, "dropped")


def forget_ends(client: redis.Redis, keys: Keys) -> None:
    """Forget how the newest groups ended."""
    client.delete(keys.ends)
