"""Which waiting groups start next: by priority, in the room that rows and keys and values leave, without starvation.

Invariants:
* higher priority goes first; equal ones in order of arrival. A group that `PATIENCE` younger ones have bypassed outranks every
  priority; so at most PATIENCE - 1 + (groups of one admission) younger groups ever start before an older one that may run;
* the first that finds no room delays all behind it: small requests do not starve a large one;
* rows times the greatest length that any of them may reach never exceeds `max_positions`: what was admitted always finishes.
"""

from __future__ import annotations

from collections.abc import Sequence

from sluice.workers.engine.serving import SequenceGroup
from sluice.workers.engine.torch.kv_cache import round_up

PREFILL_TOKENS = 16384
"Padded tokens of one prefill pass; a longer prompt has a pass of its own."
PATIENCE = 32
"Younger groups that may bypass a waiting one."


def schedule(
    waiting: Sequence[SequenceGroup], *, num_rows: int, longest: int, max_sequences: int, max_positions: int | None
) -> list[SequenceGroup]:
    """Return the groups of `waiting` (in order of arrival) to start now, in one prefill pass; count the others as bypassed.

    num_rows, longest: running rows, and the tokens that the longest of them may reach. A group of more than
    max_sequences completions runs alone.
    """
    admitted: list[SequenceGroup] = []
    longest_prompt = 0
    for group in sorted(waiting, key=_rank):
        num_rows += group.size
        longest = max(longest, group.max_length)
        longest_prompt = max(longest_prompt, group.prompt_length)
        is_one_pass = not admitted or longest_prompt * (len(admitted) + 1) <= PREFILL_TOKENS
        is_alone = num_rows == group.size
        has_memory = max_positions is None or num_rows * round_up(longest) <= max_positions
        if not is_alone and not (num_rows <= max_sequences and is_one_pass and has_memory):
            break
        admitted.append(group)
    starting = set(map(id, admitted))
    younger = 0
    for group in reversed(waiting):
        if id(group) in starting:
            younger += 1
        else:
            group.num_bypassed += younger
    return admitted


def _rank(group: SequenceGroup) -> tuple[bool, int]:
    """Return the rank, lowest first; sorting is stable, so equal ranks keep the order of arrival."""
    is_overdue = group.num_bypassed >= PATIENCE
    return (not is_overdue, 0 if is_overdue else -group.request.priority)
