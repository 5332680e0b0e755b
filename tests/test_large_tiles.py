"""Tiles of a GPU's size, on a CPU: right everywhere, in few launches, and in the memory that they may take."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from large import Launches, large_tiles
from support import Case, cases, check_against_float64, make, run_engine, run_op
from tuned import retune

from compiled_fa import messages
from compiled_fa.engines import tiled
from compiled_fa.engines.tiled.large import budget, groups, operands, products, sizes
from compiled_fa.engines.tiled.large.call import Call
from compiled_fa.problem import Packed, Problem
from compiled_fa.scores import Window
from compiled_fa.testing import Bias
from compiled_fa.tuning.gpu_tiles import GPU

MB = 1 << 20
FORWARD, BACKWARD, A_CALL = 10, 16, 8  # launches of a tile, and of a call besides


def tiles_of(problem, direction, nbytes):
    """How many a call has."""
    call, count = Call(problem, direction, nbytes, None), 0
    for chunk in call.chunks:
        if direction == "forward":
            spans = [(chunk.keys_seen(*span)[0], chunk.tiles.keys) for span in chunk.query_spans()]
        else:
            spans = [(chunk.queries_that_see(*span)[0], chunk.tiles.queries) for span in chunk.key_spans()]
        count += sum(-(-(stop - start) // size) for (start, stop), size in spans)
    return count


def launches(lengths, dense=True, nbytes=64 * MB, backward=True, **options):
    """-> (tiles, launches) forward, and backward."""
    data = make(Case(lengths, dense, **{"nheads_k": 16, "dtype": torch.float16, **options}))
    with large_tiles(nbytes):
        problem = data.problem()
        with Launches() as forward:
            out, lse = tiled.forward(problem)
        found = [(tiles_of(problem, "forward", nbytes), forward.total)]
        if backward:
            with Launches() as counted:
                tiled.backward(problem, out, out, lse)
            found.append((tiles_of(problem, "backward", nbytes), counted.total))
    return found


# -------------------------------------------------------------------------------------------------------- right results


@pytest.mark.parametrize("widens", [True, False], ids=["products in fp32", "operands in fp32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_half_precision_on_either_kind_of_device(dense, dtype, widens):
    lengths = ((150, 170),) * 2 if dense else ((150, 170), (0, 4), (5, 0), (160, 140), (1, 1))
    for options in ({}, {"causal": True, "heads_per_key": 2}, {"dropout_p": 0.2, "softcap": 3.0}):
        data = make(Case(lengths, dense, head_dim=16, head_dim_v=12, dtype=dtype, **options))
        with large_tiles(MB // 2, widens):
            check_against_float64(data, run_engine(tiled, data))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
@given(st.data())
def test_agrees_with_float64_in_any_budget(dense, drawn):
    data = make(drawn.draw(cases(dense)))
    with large_tiles(drawn.draw(st.sampled_from([1 << 12, 1 << 15, MB])), drawn.draw(st.booleans())):
        check_against_float64(data, run_engine(tiled, data, tiles=data.case.tiles))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_on_devices_whose_products_are_not_written_in_place(monkeypatch, dense):
    monkeypatch.setattr(products, "IN_PLACE", ())
    lengths = ((150, 170),) * 2 if dense else ((150, 170), (0, 4), (5, 0), (160, 140), (1, 1))
    for dtype in (torch.float32, torch.float16):
        data = make(Case(lengths, dense, dtype=dtype, heads_per_key=2, causal=True))
        for tiles in (None, tiled.TileSizes(32, 48, 3)):
            with large_tiles(widens=False):
                check_against_float64(data, run_engine(tiled, data, tiles=tiles))


def test_scores_of_fp16_do_not_overflow():
    """q·k of 90,000 is beyond fp16."""
    q = torch.full((1, 4, 1, 64), 37.5, dtype=torch.float16)
    with large_tiles():
        out, lse = tiled.forward(Problem.of(q, q, q, None, 1.0))
    assert torch.equal(out, q)
    assert lse.isfinite().all()


def test_the_op_is_served_by_them(monkeypatch):
    directions, init = [], Call.__init__

    def noted(self, problem, direction, *rest):
        directions.append(direction)
        init(self, problem, direction, *rest)

    monkeypatch.setattr(Call, "__init__", noted)
    for dense in (True, False):
        data = make(Case(((70, 70),) * 2, dense, causal=True))
        with large_tiles():
            check_against_float64(data, run_op(data, "tiled"))
    assert directions == ["forward", "backward"] * 2


def test_pages():
    lengths = ((20, 140), (19, 100), (3, 64), (0, 7))
    for options in ({}, {"causal": True, "heads_per_key": 2}, {"window_size": (30, 5), "slopes": "heads"}):
        for dtype in (torch.float32, torch.float16):
            data = make(Case(lengths, page_size=16, dtype=dtype, **options))
            with large_tiles():
                check_against_float64(data, run_engine(tiled, data))


def test_of_what_lies_behind_a_sequence_nothing_is_seen():
    """Sequences side by side are padded: with nothing of the next one, nor of rows that are nobody's."""
    data = make(Case(((9, 9), (5, 5), (7, 7)), nheads_k=1))
    for x in (data.q, data.k, data.v, data.dout):
        x[9:14] = torch.nan
    with large_tiles():
        found = run_engine(tiled, data)
    for name, x in found.items():
        rows = x.mT if name == "lse" else x
        assert rows[9:14].isnan().all(), name
        assert torch.cat([rows[:9], rows[14:]]).isfinite().all(), name


def test_dropout_drops_the_same_whatever_the_tiles():
    data = make(Case(((70, 90),) * 2, True, dropout_p=0.4))
    with large_tiles():
        whole = run_engine(tiled, data)
        in_tiles = run_engine(tiled, data, tiles=tiled.TileSizes(16, 32, 1))
    on_a_cpu = run_engine(tiled, data)
    for other in (in_tiles, on_a_cpu):
        assert all(torch.allclose(whole[name], other[name], atol=1e-5) for name in whole)


# ------------------------------------------------------------------------------------------------------------- launches


@pytest.mark.parametrize("nbytes", [64 * MB, 4 * MB, MB], ids=["one tile", "rows", "rows and keys"])
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": ((300, 300),)},
        {"lengths": ((300, 300),), "dtype": torch.float32},
        {"lengths": ((260, 260),) * 2, "nheads_k": 4, "heads_per_key": 2},
        {"lengths": ((1, 1000),) * 2, "nheads_k": 4, "heads_per_key": 4},
    ],
    ids=["dense", "fp32", "GQA", "decoding"],
)
def test_launches_of_plain_scores(shape, nbytes):
    (tiles, forward), (tiles_back, backward) = launches(nbytes=nbytes, **shape)
    assert forward <= FORWARD * tiles + A_CALL
    assert backward <= BACKWARD * tiles_back + A_CALL


def test_launches_of_long_sequences():
    """So many would have been 836 in tiles of a CPU's size, at 1,024 tokens."""
    ((tiles, forward),) = launches(((1024, 1024),), nbytes=32 * MB, backward=False)
    assert (tiles, forward) == (4, 30)
    ((tiles, forward),) = launches(((1024, 1024),), nbytes=256 * MB, backward=False)
    assert (tiles, forward) == (1, 9)


ADDED: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    # Forward, backward: launches beyond a plain call's of as many tiles, in one tile and in four.
    "softcap": ({"softcap": 3.0}, (6, 14), (15, 47)),
    "ALiBi": ({"slopes": "heads"}, (9, 9), (27, 27)),
    "dropout": ({"dropout_p": 0.1}, (127, 128), (211, 215)),
}


@pytest.mark.parametrize("name", ADDED)
def test_launches_that_features_add(name):
    """As docs/how_it_works.md tells them."""
    options, of_one, of_four = ADDED[name]
    lengths = ((256, 256),)
    sizes = tiled.TileSizes(64, 256, 16), tiled.TileSizes(256, 64, 16)

    def counted(tiles, **options):
        data = make(Case(lengths, True, nheads_k=16, **options))
        with large_tiles():
            problem = data.problem()
            with Launches() as forward:
                out, lse = tiled.forward(problem, tiles[0])
            with Launches() as backward:
                tiled.backward(problem, out, out, lse, None, tiles[1])
            return forward.total, backward.total

    for tiles, allowed in (((tiled.TileSizes(256, 256, 16),) * 2, of_one), (sizes, of_four)):
        plain, featured = counted(tiles), counted(tiles, **options)
        added = tuple(with_it - without for with_it, without in zip(featured, plain, strict=True))
        assert added == allowed


def test_a_mask_is_paid_at_its_rims():
    """One launch a rim, and for a mask of each shape a handful once a call."""
    lengths, tiles = ((512, 512),), tiled.TileSizes(64, 512, 16)
    data = make(Case(lengths, True, nheads_k=16, causal=True))
    window = make(Case(lengths, True, nheads_k=16, window_size=(100, 0)))
    with large_tiles():
        counts = []
        for x in (data, window):
            with Launches() as counted:
                tiled.forward(x.problem(), tiles)
            counts.append(counted.by_name)
    causal, banded = counts
    assert causal["masked_fill_"] == 8
    assert causal["logical_not_"] == 1  # all rims have one shape
    assert banded["masked_fill_"] <= 2 * 8
    assert banded["logical_not_"] <= 4


@pytest.mark.parametrize(
    ("lengths", "heads_per_key", "heads_first", "copies"),
    [
        (((60, 60),), 1, False, 0),
        (((60, 60),), 4, False, 1),  # q, whose heads that share a key head come to lie side by side
        (((60, 60),) * 2, 1, False, 3),  # two batches of matrices are no batch
        (((60, 60),) * 2, 1, True, 0),
    ],
)
def test_only_what_a_product_needs_is_copied(lengths, heads_per_key, heads_first, copies):
    data = make(Case(lengths, True, nheads_k=2, heads_per_key=heads_per_key))
    problem = data.problem()
    if heads_first:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
        problem = Problem.of(q, k, v, None)
    with large_tiles(), Launches() as counted:
        tiled.forward(problem)
    assert counted.by_name["copy_"] == copies
    assert not any(name in counted.by_name for name in ("clone", "repeat", "repeat_interleave", "_to_copy"))


@pytest.mark.parametrize(("keys", "at_once"), [(256, 3), (8192, 1)])
def test_decoding_copies_no_long_cache(keys, at_once):
    q, k = torch.empty(3, 1, 16, 64), torch.empty(3, keys, 8, 64)
    with large_tiles():
        call = Call(Problem.of(q, k, k, None), "forward", 1024 * MB, None)
        assert [len(chunk.sequences) for chunk in call.chunks] == [at_once] * (3 // at_once)
        (_, columns) = operands.sides(call, call.chunks[0])
        copied = columns.operand(k, torch.float32).data_ptr() != k.data_ptr()
    assert copied == (at_once > 1)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "kernel", "expected"),
    [
        ("cuda", (7, 0), None, True, (True, False)),
        ("cuda", (6, 0), None, False, (False, False)),
        ("cuda", (8, 6), None, True, (True, True)),
        ("cuda", (9, 0), "6.4", True, (True, True)),  # of AMD's numbers nothing is concluded
        ("mps", None, None, True, (False, False)),
    ],
)
def test_where_products_widen(monkeypatch, device, capability, hip, kernel, expected):
    """fp16, bf16; PyTorch is asked by one small product."""

    def product(total, a, b, beta, alpha):
        if not kernel:
            raise NotImplementedError("there is none")

    monkeypatch.setattr(products, "_widening", product)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    for name in ("ones", "zeros"):
        monkeypatch.setattr(torch, name, lambda *shape, **options: None)
    asked = products.widens.__wrapped__
    assert tuple(asked(torch.device(device), dtype) for dtype in (torch.float16, torch.bfloat16)) == expected


def test_hidden_tiles_are_not_computed():
    def scores(**options):
        data = make(Case(((1024, 1024),), True, nheads_k=2, **options))
        with large_tiles():
            call = Call(data.problem(), "forward", 64 * MB, None)
        spans = [
            (stop - start, chunk.keys_seen(start, stop)[0])
            for chunk in call.chunks
            for start, stop in chunk.query_spans()
        ]
        return sum(rows * (stop - start) for rows, (start, stop) in spans)

    assert scores(causal=True) <= 0.76 * scores()
    assert scores(window_size=(64, 0)) <= 0.6 * scores()


def lengths_of(count, least, most):
    generator = random.Random(0)
    return tuple((n, n) for n in (generator.randint(least, most) for _ in range(count)))


@pytest.mark.parametrize(
    ("count", "least", "most", "told", "allowed"), [(64, 105, 1004, 83, 100), (2000, 1, 64, 43, 60)]
)
def test_launches_of_packed_sequences(count, least, most, told, allowed):
    """As docs/how_it_works.md tells them. A head_dim of 2 is as many launches as one of 64."""
    found = launches(lengths_of(count, least, most), False, 1024 * MB, False, nheads_k=8, head_dim=2, head_dim_v=2)
    assert found[0][1] == told <= allowed


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=60), st.integers(1, 1 << 20))
def test_groups_hold_every_sequence_once(lengths, cost):
    found = groups.groups(lengths, 2, cost)
    assert sorted(s for members in found.values() for s in members) == [
        s for s, pair in enumerate(lengths) if min(pair)
    ]
    for (seqlen_q, seqlen_k), members in found.items():
        assert seqlen_q == max(lengths[s][0] for s in members)
        assert seqlen_k == max(lengths[s][1] for s in members)


def test_groups_are_few_where_launches_cost_more_than_padding():
    lengths = lengths_of(300, 1, 200)
    assert len(groups.groups(lengths, 1, 1 << 40)) == 1
    useful = sum(n * m for n, m in lengths)
    padded = sum(q * k * len(members) for (q, k), members in groups.groups(lengths, 1, 1).items())
    assert padded <= 1.1 * useful


def test_lengths_go_to_the_host_once(monkeypatch):
    """And a dense call waits for nothing."""
    data, reads = make(Case(((9, 9), (5, 7)))), []
    tolist = torch.Tensor.tolist

    def noted(x):
        reads.append(x.shape)
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    for name in ("item", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, None)
    problem = data.problem()
    dense = make(Case(((9, 9),) * 2, True, causal=True)).problem()
    with large_tiles():
        out, lse = tiled.forward(problem)
        assert len(reads) == 2  # cu_seqlens_q's and cu_seqlens_k's
        tiled.backward(problem, out, out, lse)
        out, lse = tiled.forward(dense)
        tiled.backward(dense, out, out, lse)
    assert len(reads) == 2


# --------------------------------------------------------------------------------------------------------------- memory


def peak(run):
    """Bytes beyond what there was, from the allocator's own records; and what the call gives."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = run()
    now = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest, results


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "heads_per_key": 2},
        {"window_size": (100, 20)},
        {"softcap": 2.0, "dtype": torch.float16},
        {"slopes": "batch"},
        {"dropout_p": 0.2},
        {"causal": True, "softcap": 2.0, "slopes": "heads", "dropout_p": 0.1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_peak_memory_is_inputs_and_results_and_the_budget(dense, options):
    """Of half precision as where operands are copied in fp32: a CPU rounds results by way of a copy."""
    nbytes, generator = 4 * MB, random.Random(0)
    lengths: tuple[tuple[int, int], ...] = ((500, 500),) * 2
    if not dense:
        lengths = tuple((n, n + generator.randint(0, 3)) for n in (generator.randint(50, 500) for _ in range(8)))
    data = make(Case(lengths, dense, nheads_k=4, head_dim=16, head_dim_v=16, **options))
    problem, dout, dlse = data.problem(), data.laid_out(data.dout), data.per_row(data.dlse)
    with large_tiles(nbytes, widens=False):
        forward, (out, lse) = peak(lambda: tiled.forward(problem))
        backward, gradients = peak(lambda: tiled.backward(problem, dout, out, lse, dlse))
    assert nbytes / 4 < forward - out.nbytes - lse.nbytes <= nbytes
    assert nbytes / 4 < backward - sum(x.nbytes for x in gradients) <= nbytes


@pytest.mark.parametrize("bias", [Bias(), Bias("hqk"), Bias("bqk", torch.bool), Bias("bhk", torch.float16)], ids=str)
def test_peak_memory_with_a_bias(bias):
    """The bias's gradient is a result; that of a half precision one is a sum in fp32 before."""
    nbytes = 4 * MB
    data = make(Case(((500, 500),) * 2, dense=True, nheads_k=2, heads_per_key=2, head_dim=16, bias=bias))
    problem, dout, dlse = data.problem(), data.laid_out(data.dout), data.per_row(data.dlse)
    with large_tiles(nbytes):
        forward, (out, lse) = peak(lambda: tiled.forward(problem))
        backward, gradients = peak(lambda: tiled.backward(problem, dout, out, lse, dlse))
    assert nbytes / 4 < forward - out.nbytes - lse.nbytes <= nbytes
    assert nbytes / 4 < backward - sum(x.nbytes for x in gradients) <= nbytes


@pytest.mark.parametrize("expanded", [False, True], ids=["dout lies", "dout is copied"])
@pytest.mark.parametrize(("head_dim", "nbytes"), [(64, 3 * MB), (128, 4 * MB), (128, 6 * MB)])
def test_peak_memory_of_one_chunk_after_another(head_dim, nbytes, expanded):
    """Buffers of one are there while the next one begins; dout is a caller's, as of out.sum()."""
    q = torch.randn(1, 4, 1000, head_dim).transpose(1, 2)
    problem = Problem.of(q, q, q, None)
    with large_tiles(nbytes):
        out, lse = tiled.forward(problem)
        dout = torch.ones(()).expand(out.shape) if expanded else torch.ones_like(out)
        assert len(Call(problem, "backward", nbytes, None).chunks) > 1
        backward, gradients = peak(lambda: tiled.backward(problem, dout, out, lse))
    assert nbytes / 4 < backward - sum(x.nbytes for x in gradients) <= nbytes


def test_peak_memory_of_the_distances_of_packed_sequences():
    """One head's take as much as its scores."""
    lengths, nbytes = ((300, 268), (67, 221), (69, 436), (171, 311)), 8 * MB
    problem = make(Case(lengths, nheads_k=1, head_dim=32, head_dim_v=8, slopes="heads")).problem()
    with large_tiles(nbytes):
        forward, (out, lse) = peak(lambda: tiled.forward(problem))
    assert nbytes / 4 < forward - out.nbytes - lse.nbytes <= nbytes


@pytest.mark.parametrize("direction", ["forward", "backward"])
@given(st.data())
def test_sizes_fit_and_are_even(direction, drawn):
    """Whatever the shape: a tile takes no more than what is there, but for the least of tiles."""
    draw, lengths = drawn.draw, st.sampled_from([1, 100, 1000, 20000])
    seqlen_q, seqlen_k, sequences = draw(lengths), draw(lengths), draw(lengths)
    heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    side = st.one_of(st.none(), st.integers(0, 500))
    left, right = draw(side), draw(side)
    window, nbytes = Window(left, right), draw(st.sampled_from([1 << 22, 1 << 26, 1 << 30]))
    q = torch.empty(1, 1, heads * group, 64, dtype=torch.float16, device="meta")
    k = torch.empty(1, 1, heads, 64, dtype=torch.float16, device="meta")
    costs = sizes.Bytes.of(direction, Problem.of(q, k, k, None), seqlen_q, seqlen_k, 2, (True, True, True))
    shape = (seqlen_q, seqlen_k, sequences, heads, group)
    tiles = sizes.choose(direction, *shape, window, nbytes, costs, GPU.tiled)
    assert 1 <= tiles.queries <= seqlen_q
    assert 1 <= tiles.keys <= seqlen_k
    assert 1 <= tiles.batch_heads <= min(sequences * heads, sizes.MOST_PAIRS)
    if window != Window():
        assert (tiles.queries if direction == "forward" else tiles.keys) <= GPU.tiled.banded_tile
    seen_q, seen_k = tiles.queries, tiles.keys
    if left is not None and right is not None:
        reach = left + right + (tiles.queries if direction == "forward" else tiles.keys)
        seen_q, seen_k = (min(seen_q, reach), seen_k) if direction == "backward" else (seen_q, min(seen_k, reach))
    a_tile = group * seen_q * (costs.a_row + costs.a_score * seen_k) + costs.a_key * seen_k
    a_pair = costs.alone if tiles.batch_heads <= heads else costs.a_pair
    least = tiles.batch_heads == 1 and min(tiles.queries, tiles.keys) <= GPU.tiled.whole_rows
    assert least or tiles.batch_heads * (a_pair + a_tile) <= nbytes


def test_memory_is_linear_and_the_budget_is_the_devices():
    device = torch.device("cpu")
    assert budget.memory(device) > MB
    with large_tiles(3 * MB):
        assert budget.budget(device) == 3 * MB
        for seqlen in (600, 1200):
            q = torch.zeros(1, seqlen, 2, 8)
            forward, (out, lse) = peak(lambda q=q: tiled.forward(Problem.of(q, q, q, None)))
            assert forward - out.nbytes - lse.nbytes <= 3 * MB


@pytest.fixture(
    params=[torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory")], ids=str
)
def short_of_memory(request, monkeypatch):
    """Out of memory at so many scores and more, as a device's allocator says it."""
    from compiled_fa.engines.tiled.scratch import Scratch

    taken, limit = [], [0]
    take = Scratch.take

    def failing(self, name, shape, dtype):
        if name == "scores":
            taken.append(shape)
            if torch.Size(shape).numel() >= limit[0]:
                raise type(request.param)(*request.param.args)
        return take(self, name, shape, dtype)

    monkeypatch.setattr(Scratch, "take", failing)
    monkeypatch.setattr(budget, "_halved", set())
    monkeypatch.setattr(messages, "_said", set())
    return taken, limit


def test_out_of_memory_halves_the_budget_once(short_of_memory, caplog):
    taken, limit = short_of_memory
    data = make(Case(((600, 600),), True, nheads_k=4))
    with large_tiles(2 * MB):
        limit[0] = 1 << 40
        whole = run_engine(tiled, data)
        largest = max(torch.Size(shape).numel() for shape in taken)
        limit[0] = largest
        found = run_engine(tiled, data)
        assert all(torch.allclose(found[name], whole[name], atol=1e-4) for name in whole)
        assert budget.budget(torch.device("cpu")) == MB
        said = [record.message for record in caplog.records if "half as much" in record.message]
        assert len(said) == 1
        limit[0] = 1
        with pytest.raises(RuntimeError, match="out of memory"):
            run_engine(tiled, data)
    assert len([record for record in caplog.records if "half as much" in record.message]) == 1


def test_another_error_halves_nothing(monkeypatch):
    monkeypatch.setattr(budget, "_halved", set())
    device, calls = torch.device("cpu"), []

    def failing(nbytes):
        calls.append(nbytes)
        raise RuntimeError("shapes do not fit")

    with large_tiles(), pytest.raises(RuntimeError, match="shapes do not fit"):
        budget.within(device, failing)
    assert len(calls) == 1
    assert not budget._halved


def test_out_of_memory_leaves_nothing_behind(short_of_memory):
    _, limit = short_of_memory
    problem = make(Case(((600, 600),), True, nheads_k=4)).problem()

    def failing():
        with pytest.raises(RuntimeError, match="out of memory"):
            tiled.forward(problem)

    with large_tiles(2 * MB):
        limit[0] = 1
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            failing()
    left = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert left == 0


def test_a_table_of_ones_own_may_ask_for_them(monkeypatch):
    retune(monkeypatch, tiled={"memory_parts": 1 << 10, "whole_rows": 64, "group_scores": 1 << 10})
    data = make(Case(((70, 70), (9, 5)), causal=True))
    check_against_float64(data, run_engine(tiled, data))


def test_no_sequences():
    with large_tiles():
        for lengths in ((), ((0, 0),), ((3, 0), (0, 2))):
            data = make(Case(lengths))
            check_against_float64(data, run_engine(tiled, data))
        empty = torch.zeros(0, 4, 2, 8)
        out, lse = tiled.forward(Problem.of(empty, empty, empty, None))
        assert out.shape == (0, 4, 2, 8)
        assert lse.shape == (0, 2, 4)
        assert all(x.shape == empty.shape for x in tiled.backward(Problem.of(empty, empty, empty, None), out, out, lse))
        cu_seqlens = torch.tensor([0], dtype=torch.int32)
        nothing = torch.zeros(0, 2, 8)
        out, lse = tiled.forward(Problem.of(nothing, nothing, nothing, Packed(cu_seqlens, cu_seqlens, 0, 0)))
        assert out.shape == (0, 2, 8)
        assert lse.shape == (2, 0)
