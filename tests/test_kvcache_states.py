"""A KV cache over its life, as a state machine: rows grow, are reordered, forked, cut and freed, in any order.

Every step is held against attention, in float64, on keys that are remembered beside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv import NOBODY
from support import Case, check_against_float64
from torch import Tensor

from compiled_fa import flash_attn_with_kvcache
from compiled_fa.testing import Inputs

NHEADS_K, HEADS_PER_KEY, HEAD_DIM, HEAD_DIM_V = 2, 2, 8, 4
MOST, MOST_ROWS = 60, 5  # keys of a row, and rows


@dataclass
class Row:
    """keys, values: all that were ever appended, (n, heads, head_dim). leftpad: how many of them are out of sight."""

    keys: Tensor
    values: Tensor
    leftpad: int = 0
    pages: list[int] = field(default_factory=list)  # a paged cache's
    slot: int = -1  # a dense cache's row

    @property
    def length(self) -> int:
        return len(self.keys)


class Life(RuleBasedStateMachine):
    """What a dense and a paged cache have in common."""

    k_cache: Tensor
    v_cache: Tensor

    def arguments(self, some: list[Row], new: int) -> dict[str, Any]:
        """Where these rows lie; makes room for new keys."""
        raise NotImplementedError

    def release(self, row: Row) -> None:
        raise NotImplementedError

    def start(self, generator_seed: int, count: int, size: int) -> None:
        self.generator = torch.Generator().manual_seed(generator_seed)
        self.rows: list[Row] = []
        self.k_cache = torch.full((count, size, NHEADS_K, HEAD_DIM), torch.nan)
        self.v_cache = torch.full((count, size, NHEADS_K, HEAD_DIM_V), torch.nan)

        self.begin_a_row()
        self.begin_a_row()

    def new_row(self) -> Row:
        return Row(self.random(0, NHEADS_K, HEAD_DIM), self.random(0, NHEADS_K, HEAD_DIM_V))

    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule()
    def begin_a_row(self) -> None:
        self.rows.append(self.new_row())

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def chosen(self, order: list[int], new: int) -> list[Row]:
        """Some rows, in any order, that have room."""
        some = dict.fromkeys(number % len(self.rows) for number in order)
        return [self.rows[number] for number in some if self.rows[number].length + new <= MOST]

    @rule(
        order=st.lists(st.integers(0, 5), min_size=1, max_size=4),
        new=st.sampled_from([0, 1, 1, 1, 2, 7]),
        queries=st.sampled_from([1, 1, 2, 5]),
        causal=st.booleans(),
        left=st.sampled_from([-1, -1, 0, 6]),
        num_splits=st.integers(0, 2),
    )
    def step(self, order: list[int], new: int, queries: int, causal: bool, left: int, num_splits: int) -> None:
        """Some rows grow by new keys, or by none, and are attended to."""
        some = self.chosen(order, new)
        if not some:
            return
        batch = len(some)
        q = self.random(batch, queries, NHEADS_K * HEADS_PER_KEY, HEAD_DIM)
        k, v = self.random(batch, new, NHEADS_K, HEAD_DIM), self.random(batch, new, NHEADS_K, HEAD_DIM_V)
        seqlens = torch.tensor([row.length for row in some], dtype=torch.int32)
        where = self.arguments(some, new)
        if any(row.leftpad for row in some):
            where["cache_leftpad"] = torch.tensor([row.leftpad for row in some], dtype=torch.int32)
        given: dict[str, Any] = {"k": k, "v": v} if new else {}
        options: dict[str, Any] = {
            "causal": causal,
            "window_size": (left, -1),
            "num_splits": num_splits,
            "return_softmax_lse": True,
        }
        arguments = {"cache_seqlens": seqlens, **given, **where, **options}
        out, lse = flash_attn_with_kvcache(q, self.k_cache, self.v_cache, **arguments)
        for row, more_k, more_v in zip(some, k, v, strict=True):
            row.keys, row.values = torch.cat([row.keys, more_k]), torch.cat([row.values, more_v])
        lengths = tuple((queries, row.length - row.leftpad) for row in some)
        case = Case(
            lengths, False, NHEADS_K, HEADS_PER_KEY, HEAD_DIM, HEAD_DIM_V, causal=causal, window_size=(left, -1)
        )
        keys = torch.cat([row.keys[row.leftpad :] for row in some])
        values = torch.cat([row.values[row.leftpad :] for row in some])
        inputs = Inputs(case, q.flatten(0, 1), keys, values, torch.zeros_like(out).flatten(0, 1))
        check_against_float64(inputs, {"out": out.flatten(0, 1), "lse": lse.transpose(0, 1).flatten(1)})

    @rule(number=st.integers(0, 5), part=st.sampled_from([0.2, 0.5, 1.0]))
    def forget_the_oldest(self, number: int, part: float) -> None:
        """Keys out of sight, whose place may be anything."""
        row = self.rows[number % len(self.rows)]
        row.leftpad += int(part * (row.length - row.leftpad))

    @rule(number=st.integers(0, 5))
    def evict(self, number: int) -> None:
        """What was its is overwritten: nobody may read it again. There is always a row."""
        self.release(self.rows.pop(number % len(self.rows)))
        if not self.rows:
            self.rows.append(self.new_row())

    @rule(number=st.integers(0, 5), part=st.sampled_from([0.1, 0.5, 1.0]))
    def cut(self, number: int, part: float) -> None:
        """The newest keys are taken back, as after a speculation that was wrong."""
        row = self.rows[number % len(self.rows)]
        stop = row.length - int(part * (row.length - row.leftpad))
        row.keys, row.values = row.keys[:stop], row.values[:stop]


class DenseLife(Life):
    """Rows of one cache, of which a batch has some, in any order (cache_batch_idx)."""

    @initialize(seed=st.integers(0, 99))
    def begin(self, seed: int) -> None:
        self.start(seed, MOST_ROWS, MOST)

    def new_row(self) -> Row:
        free = set(range(MOST_ROWS)) - {row.slot for row in self.rows}
        row = super().new_row()
        row.slot = max(free)
        return row

    def arguments(self, some: list[Row], new: int) -> dict[str, Any]:
        return {"cache_batch_idx": torch.tensor([row.slot for row in some], dtype=torch.int32)}

    def release(self, row: Row) -> None:
        self.k_cache[row.slot], self.v_cache[row.slot] = torch.nan, torch.nan

    @invariant()
    def every_row_is_as_it_was_written(self) -> None:
        for row in getattr(self, "rows", []):
            assert torch.equal(self.k_cache[row.slot, : row.length], row.keys)
            assert torch.equal(self.v_cache[row.slot, : row.length], row.values)


class PagedLife(Life):
    """Pages of one pool, which rows may share as long as nobody writes to them (block_table)."""

    @initialize(seed=st.integers(0, 99), page_size=st.sampled_from([1, 4, 16, 25]))
    def begin(self, seed: int, page_size: int) -> None:
        self.page_size = page_size
        count = MOST_ROWS * -(-MOST // page_size)
        self.start(seed, count, page_size)
        self.free = torch.randperm(count, generator=self.generator).tolist()
        self.users = [0] * count

    @precondition(lambda self: len(self.rows) < MOST_ROWS)
    @rule(number=st.integers(0, 5))
    def fork(self, number: int) -> None:
        """A second row with the same keys: whole pages are shared, and the last one, to be written to, is copied."""
        old = self.rows[number % len(self.rows)]
        whole = old.length // self.page_size
        row = Row(old.keys, old.values, old.leftpad, old.pages[:whole])
        for page in row.pages:
            if page != NOBODY:
                self.users[page] += 1
        for page in old.pages[whole:]:
            row.pages.append(copy := self.take())
            self.k_cache[copy], self.v_cache[copy] = self.k_cache[page], self.v_cache[page]
        self.rows.append(row)

    @rule()
    def free_pages_out_of_sight(self) -> None:
        for row in self.rows:
            for column in range(row.leftpad // self.page_size):
                self.give_back(row.pages[column])
                row.pages[column] = NOBODY

    def take(self) -> int:
        page: int = self.free.pop()
        self.users[page] = 1
        return page

    def give_back(self, page: int) -> None:
        if page == NOBODY:
            return
        self.users[page] -= 1
        if not self.users[page]:
            self.k_cache[page], self.v_cache[page] = torch.nan, torch.nan
            self.free.append(page)

    def arguments(self, some: list[Row], new: int) -> dict[str, Any]:
        for row in some:
            first = row.length // self.page_size
            for column in range(first, len(row.pages)):  # kept by a cut: nobody else may be on a page that is written
                if self.users[row.pages[column]] > 1:
                    page, row.pages[column] = row.pages[column], self.take()
                    own = row.pages[column]
                    self.k_cache[own], self.v_cache[own] = self.k_cache[page], self.v_cache[page]
                    self.give_back(page)
            while len(row.pages) * self.page_size < row.length + new:
                row.pages.append(self.take())
        widest = max(len(row.pages) for row in some)
        table = [row.pages + [NOBODY] * (widest - len(row.pages)) for row in some]
        return {"block_table": torch.tensor(table, dtype=torch.int32).view(len(some), widest)}

    def release(self, row: Row) -> None:
        for page in row.pages:
            self.give_back(page)

    @invariant()
    def pages_are_counted_right(self) -> None:
        if hasattr(self, "users"):
            used = [page for row in self.rows for page in row.pages if page != NOBODY]
            assert all(self.users[page] == used.count(page) for page in set(used))
            assert sorted([*self.free, *set(used)]) == list(range(len(self.users)))


STEPS = settings(max_examples=30, stateful_step_count=30)
TestDenseLife, TestPagedLife = DenseLife.TestCase, PagedLife.TestCase
TestDenseLife.settings = TestPagedLife.settings = STEPS
