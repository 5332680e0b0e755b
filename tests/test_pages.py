"""Keys in pages on the fused engine, read where they lie by tables of tiles; template.py in place of its kernel."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import kv
import pytest
import template
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kv import Call
from support import cumulative
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from compiled_fa import messages
from compiled_fa.engines import fused, tiled
from compiled_fa.engines.fused import flex, list_order, pages, tables
from compiled_fa.engines.fused.list_order import LIST_ORDER
from compiled_fa.engines.fused.paged import PagedSpec
from compiled_fa.inductor import graphs
from compiled_fa.problem import Cached, Packed, Problem
from compiled_fa.scores import Window

WIDE: dict[str, Any] = {"head_dim": 16, "head_dim_v": 24}
SIDE = st.one_of(st.just(-1), st.integers(0, 90))


def problem_of(made: kv.Made) -> Problem:
    call = made.cache_call().rotated(made.call.rotary == "gptj", made.consecutive)
    problem = call.unread_problem(made.options, made.call.num_splits)
    call.append()
    return problem


def run(call: Call) -> PagedSpec | None:
    """Against float64. Returns what was compiled, where keys were read in place."""
    made = kv.make(call)
    before = {name: made.arguments[name].clone() for name in ("k_cache", "v_cache")}
    problem = problem_of(made)
    with template.in_place_of_the_kernel() as calls:
        out, lse = fused.forward(problem)
    batch = len(call.before)
    kv.check(made, out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1), before)
    if not calls:
        return None
    ((spec, given),) = calls
    if not isinstance(spec, PagedSpec):
        return None
    for name in ("k", "v"):
        assert given[name].data_ptr() == made.arguments[f"{name}_cache"].data_ptr()
    return spec


@st.composite
def calls(draw: st.DrawFn) -> Call:
    found = draw(kv.calls(window_size=draw(st.one_of(st.just((-1, -1)), st.tuples(SIDE, SIDE))), **WIDE))
    lengths = st.lists(st.one_of(st.integers(0, 150), st.sampled_from([16, 63, 64, 65])), min_size=1, max_size=3)
    before = tuple(draw(lengths))
    return dataclasses.replace(
        found,
        before=before,
        leftpad=tuple(draw(st.integers(0, n)) for n in before) if found.leftpad else (),
        page_size=draw(st.sampled_from([16, 32, 48, 80, 128])) if found.page_size else 0,
        dtype=torch.float16 if found.dtype == torch.float64 else found.dtype,
        queries=draw(st.sampled_from([1, 2, 7, 40])),
        num_splits=draw(st.sampled_from([0, 0, 1, 2, 5])),
    )


@settings(max_examples=60)
@given(call=calls())
def test_caches_agree_with_float64(call):
    """In place, but where the elements of a key are not side by side."""
    longest = max(call.before) + call.written
    assume(longest + call.spare if call.page_size else longest + call.room)
    assert (run(call) is not None) == (call.strides != "columns" or call.nheads_k == 1)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 90)), min_size=1, max_size=4),
    st.sampled_from([16, 32, 64]),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_packed_queries_on_pages_that_are_shared(lengths, page_size, heads_per_key, pool, causal, seed):
    """Sequences share pages, and may have one several times, more often than there are pages."""
    generator = torch.Generator().manual_seed(seed)
    cu_q, cu_k = (cumulative([pair[side] for pair in lengths]) for side in (0, 1))
    longest_q, longest_k = (max(pair[side] for pair in lengths) for side in (0, 1))
    columns = max(1, -(-longest_k // page_size))
    table = torch.randint(0, pool, (len(lengths), columns), generator=generator).int()
    k, v = (torch.randn(pool, page_size, 2, n, generator=generator) for n in (16, 24))
    q = torch.randn(int(cu_q[-1]), 2 * heads_per_key, 16, generator=generator)
    slopes = torch.rand(len(lengths), 2 * heads_per_key, generator=generator)
    packing = Packed(cu_q, cu_k, longest_q, longest_k, table)
    problem = Problem.of(q, k, v, packing, None, causal, alibi_slopes=slopes)
    if not q.numel():
        return
    with template.in_place_of_the_kernel() as made:
        found = fused.forward(problem)
    assert isinstance(made[0][0], PagedSpec)
    for mine, other in zip(found, tiled.forward(problem), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)


TORCHS = flex.operators()


def on_torchs_operator(q, k, v, score, block_mask, scale, options, buffers, mask_buffers):
    """In place of the template: torch's eager operator, on the keys of each list, one tile behind the other."""
    assert options[LIST_ORDER]
    counts, indices = block_mask[2:4]
    rows_of_block, keys_of_tile, mask = block_mask[-3:]
    results = q.new_zeros(*q.shape[:3], v.shape[-1]), torch.full(q.shape[:3], -torch.inf)

    def attend(batch: int, first_row: int, listed: Tensor) -> Any:
        place = (listed[:, None] * keys_of_tile + torch.arange(keys_of_tile)).flatten()
        place = place[place < k.shape[2]]
        one = torch.ones(1, 1, 1, dtype=torch.int32)
        make: Any = BlockMask
        size = rows_of_block, len(place)
        lists = make(size, one, one[..., None] - 1, *[None] * 6, BLOCK_SIZE=size, mask_mod=lambda b, h, m, n: n >= 0)

        def moved(b: Tensor, m: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return b + batch, m + first_row, n + int(listed[0]) * keys_of_tile

        def scores(product, b, h, m, n, *more):
            b, m, n = moved(b, m, n)
            return score(product, b, h, m, n, *more)

        def masks(b, h, m, n, *more):
            b, m, n = moved(b, m, n)
            return mask(b, h, m, n, *more)

        own = q[batch : batch + 1, :, first_row : first_row + rows_of_block]
        keys = (x[:, :, place].nan_to_num() for x in (k, v))
        return TORCHS.flex_attention(
            own, *keys, scores, (*lists.as_tuple()[:-1], masks), 1.0, flex.TEMPLATE, buffers, mask_buffers
        )

    for batch, block in itertools.product(range(q.shape[0]), range(q.shape[2] // rows_of_block)):
        if count := int(counts[batch, 0, block]):
            first_row = block * rows_of_block
            found = attend(batch, first_row, indices[batch, 0, block, :count])
            for whole, part in zip(results, found, strict=False):
                whole[batch, :, first_row : first_row + rows_of_block] = part[0]
    return *results, None


class OnTorchs:
    flex_attention = staticmethod(on_torchs_operator)


@settings(max_examples=10)
@given(call=calls())
def test_torchs_operator_agrees(call):
    """The same tables and functions."""
    made = kv.make(dataclasses.replace(call, strides="contiguous"))
    problem = problem_of(made)
    with template.in_place_of_the_kernel():
        expected = fused.forward(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "operators", OnTorchs)
        found = fused.forward(problem)
    unit = torch.finfo(call.dtype).eps
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=4 * unit, atol=4 * unit)


def test_keys_that_are_gathered():
    """In pages of a size that no tile divides, or lying otherwise than in rows at even distances."""
    for call in (
        Call((30, 3), page_size=8, **WIDE),
        Call((30, 3), page_size=24, **WIDE),
        Call((30, 3), page_size=16),
        Call((30, 3), page_size=16, strides="columns", **WIDE),
    ):
        assert run(call) is None
    assert run(Call((20, 3), page_size=24, spare=0, **WIDE)) is not None  # one page each, wherever keys begin there


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((9, 16, 2, 8), (256, 16, 8, 1), (16, 8, 16)),
        ((9, 16, 2, 8), (256, 8, 128, 1), (8, 128, 32)),  # heads first
        ((9, 16, 2, 8), (512, 16, 8, 1), (16, 8, 32)),  # k beside v
        ((9, 16, 2, 8), (260, 16, 8, 1), None),
        ((9, 16, 2, 8), (256, 16, 8, 2), None),
        ((9, 16, 2, 8), (256, 0, 8, 1), None),
        ((9, 16, 2, 8), (0, 16, 8, 1), (16, 8, 0)),
        ((1, 16, 2, 8), (77, 16, 8, 1), (16, 8, 16)),  # strides of dimensions of size 1 mean nothing
        ((9, 1, 2, 8), (16, 77, 8, 1), (16, 8, 1)),
        ((9, 16, 1, 8), (128, 8, 77, 1), (8, 8, 16)),
        ((1, 1, 1, 1), (77, 77, 77, 77), (1, 1, 1)),
    ],
)
def test_rows_of_pages(shape, strides, expected):
    x = torch.empty_strided(shape, strides)
    rows = pages.Rows.of(x)
    assert rows == (None if expected is None else pages.Rows(*expected))
    if rows is not None:
        memory = torch.arange(x.untyped_storage().size() // 4, dtype=torch.float32)
        pool, row = memory.as_strided(shape, strides), rows.view(memory.as_strided(shape, strides))
        for page, at in itertools.product(range(shape[0]), range(shape[1])):
            assert torch.equal(row[page * rows.step + at], pool[page, at])


def plan_of(batch, columns, page_size=64, nheads_k=8, queries=1, num_splits=0, window=(-1, -1), pool=4096):
    q = torch.empty(batch * queries, 4 * nheads_k, 64, device="meta", dtype=torch.float16)
    k = torch.empty(pool, page_size, nheads_k, 64, device="meta", dtype=torch.float16)
    sums = torch.empty(batch + 1, device="meta", dtype=torch.int32)
    table = torch.empty(batch, columns, device="meta", dtype=torch.int32)
    packing = Cached(sums, sums.clone(), queries, columns * page_size, table, None, num_splits)
    found = pages.plan(Problem.of(q, k, k, packing, None, False, *window))
    assert found is not None
    return found


def test_splits_give_all_processors_work():
    """Of a T4's 40, twice; but not more than there are tiles, two a split; as asked for, where they are."""
    assert plan_of(1, 512).splits == 10
    assert plan_of(8, 512).splits == 2
    assert plan_of(32, 512).splits == 1
    assert plan_of(1, 4).splits == 2
    assert plan_of(1, 1).splits == 1
    assert plan_of(1, 512, queries=2048).splits == 1
    assert [plan_of(1, 512, num_splits=n).splits for n in (1, 3, 32)] == [1, 3, 32]
    assert plan_of(1, 512, window=(500, 0)).width <= 6  # of keys that a window shows
    # Lists are no longer than memory has tiles: that is as far as the kernel goes.
    repeated = plan_of(32, 512, pool=3)
    assert repeated.width <= 3
    assert repeated.splits * repeated.width >= 512


def test_one_kernel_for_a_cache_that_grows_in_any_batch():
    """Code says nothing of lengths, batch, table and pool; with num_splits=1 a row has its own bits."""
    lengths = 70, 3, 129
    made = kv.make(Call(lengths, new=1, page_size=16, spare=1, num_splits=1, slopes="heads", **WIDE))
    problem = problem_of(made)
    with template.in_place_of_the_kernel() as calls:
        out, lse = fused.forward(problem)
        for row, before in enumerate(lengths):
            table = made.arguments["block_table"][row : row + 1]
            packing = Cached(cumulative([1]), cumulative([before + 1]), 1, 16 * table.shape[1], table, None, 1)
            own = dataclasses.replace(problem, q=problem.q[row : row + 1], packed=packing, notes={})
            own_out, own_lse = fused.forward(own)
            assert torch.equal(own_out, out[row : row + 1])
            assert torch.equal(own_lse, lse[:, row : row + 1])
    specs = {spec for spec, _ in calls}
    assert len(calls) == 4
    assert len(specs) == 1


SHAPES = [pages.Shape(3, 16, 32, whole, not whole, whole, not whole) for whole in (False, True)]


def test_compiled_tables_are_the_same(compiled_steps):
    """For other sizes than those that they were traced with, 1 among them; on a CPU, where they can run."""
    shape = SHAPES[0]
    make = graphs.compile_graph(shape.function, lambda size: shape.example_inputs("cpu", size), {"size_asserts": False})
    names = tables._names(shape)
    every = (1, 3), (1, 27), (1, 4), (1, 2), (1, 3), (1, 3)
    for batch, queries, columns, step, splits, width in itertools.product(*every):
        generator = torch.Generator().manual_seed(batch + columns)
        lengths = torch.randint(0, 64 * columns + 1, (batch,), generator=generator).tolist()
        table = torch.randint(0, 9, (batch, columns), generator=generator).int()
        first = [torch.arange(batch, dtype=torch.int32)] * shape.leftpad
        blocks = batch * queries * 3 // 16 + batch
        sizes = pages.Sizes(batch * queries, columns, 64, 64 * step, blocks, splits, width)
        window = torch.tensor(50, dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
        arguments = [*sizes, *window, cumulative([queries] * batch), cumulative(lengths), table, *first]
        for name, found, expected in zip(names, make(list(arguments)), shape.function(*arguments), strict=True):
            assert torch.equal(found, expected), name
            assert found.is_contiguous()


def test_tables_have_their_names():
    for shape in SHAPES:
        sizes, *tensors = shape.smallest
        assert tables._names(shape) == tuple(shape.tables(sizes, Window(0, 0), torch.device("meta"), *tensors))


def test_another_template_means_that_keys_are_gathered(monkeypatch, caplog):
    monkeypatch.setattr(messages, "_said", set())
    monkeypatch.setattr(list_order, "install", lambda: list_order.changed("x = 1") or "its lines are others")
    assert run(Call((30, 3), page_size=16, **WIDE)) is None
    assert "keys in pages are gathered, which is slower: its lines are others" in caplog.text


def test_torchs_template_has_the_lines():
    assert list_order.install() is None
