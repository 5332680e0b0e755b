"""The tiled engine: which tiles run, how sequences are grouped, and what memory it takes."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, check_against_float64, make, replace, run_tiled
from tuned import retune

from compiled_fa.engines import tiled
from compiled_fa.engines.tiled import TileSizes, call, chunks
from compiled_fa.engines.tiled import scratch as tiled_scratch
from compiled_fa.engines.tiled.kernels import Kernels
from compiled_fa.engines.tiled.scratch import Scratch
from compiled_fa.inductor import fast_math
from compiled_fa.problem import Packed, Problem
from compiled_fa.scores import Window
from compiled_fa.tuning import current


def computed_scores(monkeypatch, problem, direction="forward"):
    """Scores that tiles compute, counted where every tile passes."""
    count = 0

    def counting(step):
        def run(self, scores, *arguments):
            nonlocal count
            count += scores.numel()
            return step(self, scores, *arguments)

        return run

    with monkeypatch.context() as patch:
        for name in ("softmax_step", "gradient_step"):
            patch.setattr(Kernels, name, counting(getattr(Kernels, name)))
        out, lse = tiled.forward(problem)
        if direction == "backward":
            count = 0
            tiled.backward(problem, out, out, lse)
    return count


def dense(seqlen, **options):
    return make(Case(((seqlen, seqlen),), True, nheads_k=1, head_dim=2, head_dim_v=2, **options)).problem()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_masked_tiles_are_never_computed(monkeypatch, direction):
    n = 2048
    full = computed_scores(monkeypatch, dense(n), direction)
    assert full == n * n
    causal = computed_scores(monkeypatch, dense(n, causal=True), direction)
    assert causal <= 0.6 * full
    window = computed_scores(monkeypatch, dense(n, window_size=(256, 0)), direction)
    assert window <= n * (256 + 512 + 256)
    twice = computed_scores(monkeypatch, dense(2 * n, window_size=(256, 0)), direction)
    assert twice <= 2.1 * window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 3.0}], ids=str)
def test_tiles_that_alibi_makes_weightless_are_left_out(monkeypatch, dtype, options):
    """And nobody can tell: the results are as exact as ever."""
    case = Case(((1300, 1300), (1200, 1290), (1290, 1200)), nheads_k=1, dtype=dtype, slopes="heads", **options)
    data, unhurried = make(case), make(case)
    data.alibi_slopes = torch.full((case.nheads,), 0.5)
    check_against_float64(data, run_tiled(data))
    unhurried.alibi_slopes = torch.full((case.nheads,), 1e-3)
    for direction in ("forward", "backward"):
        far = computed_scores(monkeypatch, unhurried.problem(), direction)
        assert computed_scores(monkeypatch, data.problem(), direction) < 0.95 * far
    data.alibi_slopes = -data.alibi_slopes  # the farther the heavier
    assert computed_scores(monkeypatch, data.problem()) == computed_scores(monkeypatch, unhurried.problem())


def test_varlen_neither_pads_to_the_longest_nor_loops_over_the_short(monkeypatch):
    generator = random.Random(0)
    lengths = [generator.randint(1, 64) for _ in range(2000)] + [3000]
    data = make(Case(tuple((n, n) for n in lengths), nheads_k=1, head_dim=2, head_dim_v=2))
    useful = sum(n * n for n in lengths)
    assert computed_scores(monkeypatch, data.problem()) <= 1.3 * useful
    made = list(call.Call(data.problem(), None).chunks("forward"))
    assert len(made) <= 100
    assert all(len(chunk.sequences) == 1 for chunk in made if chunk.lengths_q[1] == 3000)


@given(st.data())
def test_tiles_cover_what_the_mask_keeps_exactly_once(data):
    """Of unequal sequences run together: nothing kept is left out, nothing is done twice, no tile is without use."""
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
    sides = st.one_of(st.none(), st.integers(0, 20))
    window = Window(data.draw(sides), data.draw(sides))
    q, k = [n for n, _ in lengths], [m for _, m in lengths]
    offsets = [m - n for n, m in lengths]
    tiles = TileSizes(data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16)), 1)
    extremes_q, extremes_k, extremes_offset = ((min(x), max(x)) for x in (q, k, offsets))
    chunk = chunks.Chunk(range(len(lengths)), slice(0, 1), 1, extremes_q, extremes_k, extremes_offset, window, tiles)
    kept = torch.zeros(len(lengths), max(q), max(k), dtype=torch.bool)
    for b, (n, m) in enumerate(lengths):
        position, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
        kept[b, :n, :m] = window.contains(position, key.expand(n, m))
    by_queries, by_keys = torch.zeros(2, max(q), max(k), dtype=torch.int32)
    for start, stop in chunk.query_spans():
        for tile in chunk.key_tiles(start, stop):
            by_queries[start:stop, tile.start : tile.stop] += 1
            assert tile.masked or kept[:, start:stop, tile.start : tile.stop].all()
    for start, stop in chunk.key_spans():
        for tile in chunk.query_tiles(start, stop):
            by_keys[tile.start : tile.stop, start:stop] += 1
            assert tile.masked or kept[:, tile.start : tile.stop, start:stop].all()
    for covered in (by_queries, by_keys):
        assert covered.max() <= 1
        assert (covered[kept.any(0)] == 1).all()


@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700)), max_size=50), st.integers(1, 8), st.integers(1, 40)
)
def test_chunks_hold_every_sequence_and_head_once(lengths, nheads_k, batch_heads):
    seen = []
    for chunk in chunks.chunks(lengths, nheads_k, 2, lambda *_: Window(), lambda *_: TileSizes(64, 64, batch_heads)):
        assert chunk.batch_heads <= max(batch_heads, 1)
        seen += [(s, h) for s in chunk.sequences for h in range(chunk.key_heads.start, chunk.key_heads.stop)]
        for s in chunk.sequences:
            for side, extremes in enumerate((chunk.lengths_q, chunk.lengths_k)):
                assert extremes[0] <= lengths[s][side] <= extremes[1] <= max(1.34 * lengths[s][side], 8)
    expected = [(s, h) for s, pair in enumerate(lengths) if min(pair) for h in range(nheads_k)]
    assert sorted(seen) == expected


@pytest.fixture
def tiles_run(monkeypatch):
    """Shape (batch_heads, queries, heads_per_key, keys) and dtype of every tile's scores, as tiles run."""
    ran = []

    def noting(step):
        def run(self, scores, *arguments):
            ran.append((tuple(scores.shape), scores.dtype))
            return step(self, scores, *arguments)

        return run

    for name in ("softmax_step", "gradient_step"):
        monkeypatch.setattr(Kernels, name, noting(getattr(Kernels, name)))
    return ran


@pytest.mark.parametrize("options", [{}, {"causal": True, "heads_per_key": 2}, {"dropout_p": 0.2}], ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_products_in_half_precision(tiles_run, options, dense):
    lengths = ((200, 300),) * 2 if dense else ((200, 300), (0, 5), (7, 0), (300, 150), (1, 1))
    data = make(Case(lengths, dense, head_dim=64, head_dim_v=32, dtype=torch.bfloat16, **options))
    check_against_float64(data, run_tiled(data))
    assert all(dtype == (torch.float32 if shape[1] == 1 else torch.bfloat16) for shape, dtype in tiles_run)


@pytest.mark.parametrize(("keys", "dtype"), [(1, torch.float32), (15, torch.float32), (16, torch.bfloat16)])
def test_products_among_few_keys_are_in_fp32(tiles_run, keys, dtype):
    """With one key gradients are a sum of dout, and 0: exact in naive attention, however many queries there are."""
    data = make(Case(((17000, keys),), True, nheads_k=1, dtype=torch.bfloat16))
    results = run_tiled(replace(data, dlse=None))
    assert {found for _, found in tiles_run} == {dtype}
    if keys == 1:
        exact = data.dout.double().sum(0)
        assert torch.allclose(results["dv"][0].double(), exact, rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-3)
        assert results["dq"].abs().max() <= 1e-5
        assert results["dk"].abs().max() <= 1e-3


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"slopes": "batch"}], ids=str)
def test_lengths_rounded_up(monkeypatch, tiles_run, options):
    """As bf16 sequences of very many lengths are."""
    retune(monkeypatch, tiled={"bf16_lengths": 1, "bf16_lengths_banded": 1})
    lengths = ((200, 130), (0, 5), (7, 0), (300, 290), (1, 1), (192, 256))
    data = make(Case(lengths, heads_per_key=2, head_dim=32, dtype=torch.bfloat16, **options))
    check_against_float64(data, run_tiled(data))
    keys = {shape[3] for shape, dtype in tiles_run if dtype == torch.bfloat16}
    assert {192, 256} <= keys if not options else not keys & {130, 290}


def test_pages_end_where_their_table_does(monkeypatch, tiles_run):
    """Lengths are not rounded up there."""
    retune(monkeypatch, tiled={"bf16_lengths": 1})
    data = make(Case(((200, 140), (190, 100)), nheads_k=1, head_dim=16, head_dim_v=16, dtype=torch.bfloat16))
    pages_k, pages_v = (torch.zeros(2, 140, 1, 16, dtype=torch.bfloat16) for _ in range(2))
    for page, rows in ((pages_k, data.k), (pages_v, data.v)):
        page[1], page[0, :100] = rows[:140], rows[140:]
    packed = Packed(*data.cu_seqlens, 200, 140, torch.tensor([[1], [0]], dtype=torch.int32))
    out, lse = tiled.forward(Problem.of(data.q, pages_k, pages_v, packed, *data.options))
    assert {shape[3] for shape, _ in tiles_run} == {100, 140}
    expected, expected_lse = tiled.forward(data.problem())
    assert torch.allclose(out, expected, atol=2e-2)
    assert torch.allclose(lse, expected_lse, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_on_many_keys(dtype, tiles_run):
    lengths = ((1, 5000), (3, 700), (1, 600), (0, 900))
    data = make(Case(lengths, heads_per_key=4, dtype=dtype, causal=True))
    problem = data.problem()
    tiled.forward(problem)
    assert {(shape[1], shape[3]) for shape, _ in tiles_run} == {(1, 2500), (3, 698), (3, 2), (1, 600)}
    check_against_float64(data, run_tiled(data))


def test_tanh_of_compiled_steps_is_within_a_few_units_in_the_last_place():
    x = torch.cat(
        [torch.linspace(-0.6, 0.6, 200_001), torch.linspace(-12.0, 12.0, 200_001), torch.logspace(-40, 0, 999)]
    )
    exact = torch.tanh(x.double())
    unit = torch.nextafter(exact.float().abs(), torch.tensor(2.0)).double() - exact.float().abs().double()
    assert ((fast_math.tanh(x).double() - exact).abs() / unit).max() <= 2.25
    at_the_ends = fast_math.tanh(torch.tensor([-torch.inf, -100.0, 0.0, 100.0, torch.inf, torch.nan]))
    assert at_the_ends[:5].tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]
    assert at_the_ends[5].isnan()
    assert fast_math.tanh(x.double()) is NotImplemented


def test_rows_of_any_stride():
    """Packed rows that are no multiple of head_dim apart cannot be gathered in place."""
    lengths = ((5, 5), (5, 5), (9, 9))
    data = make(Case(lengths, nheads_k=1, head_dim=3, head_dim_v=3))
    expected = run_tiled(data)
    for name in ("q", "k", "v", "dout"):
        x = getattr(data, name)
        wide = torch.zeros(*x.shape[:2], 7)
        wide[..., 2:5] = x
        setattr(data, name, wide[..., 2:5])
    found = run_tiled(data)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_dense_calls_send_and_read_nothing(monkeypatch):
    """No host sync: to read a meta tensor's value is an error, and no tensor is made from a list."""
    monkeypatch.setattr(torch, "tensor", None)
    q, k, v = (torch.empty(2, 600, 4, 8, device="meta") for _ in range(3))
    problem = Problem.of(q, k, v, None, None, True)
    out, lse = tiled.forward(problem)
    tiled.backward(problem, out, out, lse)


def test_scratch_is_reused_and_large_buffers_are_given_back():
    with Scratch(torch.device("cpu")) as scratch:
        small = scratch.take("a test's small", (3, 5), torch.float32)
        large = scratch.take("a test's large", (current().tiled.kept_buffer_bytes,), torch.float32)
        assert scratch.take("a test's small", (15,), torch.float32).data_ptr() == small.data_ptr()
    with Scratch(torch.device("cpu")) as scratch:
        assert scratch.take("a test's small", (4,), torch.float32).data_ptr() == small.data_ptr()
        del large
        assert ("a test's large", torch.float32) not in tiled_scratch._kept._mine()


def test_peak_memory_is_linear_in_length(monkeypatch):
    """What a call allocates beside inputs and results, from the allocator's own records."""

    def extra(seqlen):
        problem = dense(seqlen, causal=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out, lse = tiled.forward(problem)
            tiled.backward(problem, out, out, lse)
        now = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak

    extra(512)  # fills the scratch that stays
    short, long = extra(2048), extra(8192)
    assert 0 < long <= 6 * short
    assert long < 8192 * 8192  # a quarter of an fp32 score matrix
