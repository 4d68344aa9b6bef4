"""Back-pressure and fairness in the torch engine: who waits for room, who goes first, what a long row costs the others."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from builders import for_each
from served import request
from transformers import DynamicCache

from sluice.workers.engine.serving import SequenceGroup
from sluice.workers.engine.torch.kv_cache import SlotCache
from sluice.workers.engine.torch.scheduler import PATIENCE, schedule
from sluice.workers.engine.torch.split_batch import saved_positions, split_batch


def groups_of(sizes: list[int], *, priorities: list[int] | None = None, max_tokens: int = 20) -> list[SequenceGroup]:
    asked = zip(sizes, priorities or [0] * len(sizes), strict=True)
    return [SequenceGroup(request=request(5, n=n, priority=p, max_tokens=max_tokens)) for n, p in asked]


@for_each(
    ("sizes", "num_rows", "max_positions", "admitted"),
    [
        ([2, 7, 3], 0, None, [2]),
        ([7, 3], 2, None, []),  # a group larger than the most rows waits for the others
        ([7, 3], 0, None, [7]),  # and runs alone
        ([1, 1, 1, 1], 1, None, [1, 1]),
        ([1, 2, 1], 1, None, [1]),  # the group of 2 waits, and the one of 1 waits behind it
        ([2, 1], 0, 3 * 32, [2, 1]),  # 25 tokens take 32 positions a row
        ([2, 1], 0, 3 * 32 - 1, [2]),
    ],
)
def test_groups_start_while_there_is_room_and_small_ones_do_not_starve_a_large_one(
    sizes: list[int], num_rows: int, max_positions: int | None, admitted: list[int]
) -> None:
    groups = groups_of(sizes)
    found = schedule(groups, num_rows=num_rows, longest=25, max_sequences=3, max_positions=max_positions)
    assert [group.size for group in found] == admitted
    assert {group.num_bypassed for group in groups} == {0}


def order_of(groups: list[SequenceGroup]) -> list[int]:
    """Index of each group in the order in which they start, one at a time."""
    waiting, order = list(groups), []
    while waiting:
        [group] = schedule(waiting, num_rows=0, longest=0, max_sequences=4, max_positions=None)
        order.append(groups.index(group))
        waiting.remove(group)
    return order


def test_higher_priority_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    assert order_of(groups_of([4] * 5, priorities=[0, 5, 0, 9, 5])) == [3, 1, 4, 0, 2]


def test_no_group_starves_behind_higher_priority() -> None:
    count = PATIENCE + 8
    assert order_of(groups_of([4] * (count + 1), priorities=[0] + [9] * count)).index(0) == PATIENCE


def test_short_rows_take_no_memory_for_the_length_of_a_long_one() -> None:
    """Filled, grown and moved: what is resident is near what is stored, not rows times longest."""
    rows, long, short = 256, 2048, 60
    cache = SlotCache(max_rows=2 * rows, max_length=2 * long, device=torch.device("cpu"))
    prefilled = DynamicCache()
    states = torch.randn(2, 4, long, 64)
    prefilled.update(states, states, 0)
    held = [short] * (rows - 1) + [long]
    before = resident_bytes()
    cache.reserve(rows=rows, length=long, held=[])
    cache.fill(prefilled, first_row=0, source=torch.tensor([0] * (rows - 1) + [1]), held=held)
    cache.reserve(rows=rows + 1, length=long + 1, held=held)
    cache.move(sources=torch.tensor([rows - 1, 0]), targets=torch.tensor([0, rows - 1]), held=[long, short])
    [keys] = cache._keys
    assert torch.equal(keys[0, :, :long], states[1]) and torch.equal(keys[rows - 1, :, :short], states[0, :, :short])
    assert keys.shape[0] > rows and keys.shape[2] > long
    assert resident_bytes() - before < keys.nbytes / 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_plan_puts_long_rows_first_and_counts_what_a_split_saves() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        offsets = rng.integers(0, 1000, rng.integers(2, 12))
        n = len(offsets)
        for a, saved in enumerate(saved_positions(offsets)):
            naive = sum(len(part) * int(part.max()) for part in (offsets[:a], offsets[a:]) if len(part))
            assert saved == n * offsets.max() - naive
    offsets = np.array([10, 20, 900, 15])
    assert split_batch(offsets, split_saves=10_000) == (None, [(slice(0, 4), 900)])
    order, passes = split_batch(offsets, split_saves=1000)
    assert order == [2, 1, 3, 0] and passes == [(slice(0, 1), 900), (slice(1, 4), 20)]
    assert split_batch(offsets[:0], split_saves=1) == (None, [])
