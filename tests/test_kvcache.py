"""flash_attn_with_kvcache: every argument, alone and in random combination, on every engine that can serve."""

from __future__ import annotations

import inspect
from itertools import accumulate
from typing import Any

import kv
import numpy as np
import pytest
import test_decode
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from kv import Call
from on_cpu import Fused
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_fa
from compiled_fa import cache_validation, clear_caches, flash_attn_func, flash_attn_with_kvcache, tuning, use_engine
from compiled_fa.engines import split_kv, tiled
from compiled_fa.engines.split_kv import decode
from compiled_fa.tuning.gpu_tiles import GPU

OP = torch.ops.compiled_fa.attention_with_kvcache

ALONE = {
    "plain": Call(),
    "append": Call(new=1),
    "append several": Call(new=4, queries=4, causal=True),
    "append none": Call(new=0),
    "more queries than new keys": Call(new=1, queries=3, causal=True),
    "more new keys than queries": Call(new=5, queries=2, causal=True),
    "prefill of an empty cache": Call((0, 0), queries=9, new=9, causal=True),
    "nothing there": Call((0, 5)),
    "causal": Call(queries=5, causal=True),
    "window": Call(queries=5, window_size=(4, 1)),
    "softcap": Call(softcap=3.0),
    "softmax_scale": Call(softmax_scale=-0.2),
    "ALiBi": Call(slopes="heads"),
    "ALiBi of each row": Call(slopes="batch", queries=3),
    "GPT-NeoX": Call(new=2, queries=2, rotary="neox", causal=True),
    "GPT-J": Call(new=2, queries=2, rotary="gptj", causal=True),
    "all queries at one position": Call(new=2, queries=3, rotary="neox"),
    "consecutive queries in a window": Call(new=2, queries=3, rotary="neox", window_size=(50, 50)),
    "whole head rotated": Call(new=1, rotary="gptj", rotary_pairs=4),
    "cache_batch_idx": Call(batch_idx=True),
    "cache_batch_idx and append": Call(batch_idx=True, new=2),
    "leftpad": Call(leftpad=(7, 0)),
    "leftpad of all": Call((20, 20), leftpad=(5, 5), new=1),
    "leftpad, append, rotary": Call(leftpad=(7, 2), new=2, queries=2, rotary="neox", causal=True),
    "pages of 1": Call(page_size=1, new=2),
    "pages of 7": Call(page_size=7, new=3),
    "pages of 16": Call(page_size=16, new=1),
    "one page a row": Call(page_size=64, new=1, spare=0),
    "one page a row and leftpad": Call(page_size=64, new=1, spare=0, leftpad=(11, 2)),
    "pages and leftpad": Call(page_size=4, new=1, leftpad=(11, 2)),
    "num_splits=1": Call((20, 3, 20), num_splits=1, new=1, slopes="batch"),
    "num_splits=8": Call(num_splits=8),
    "MQA": Call(nheads_k=1, heads_per_key=4),
    "MHA": Call(heads_per_key=1),
    "another head_dim of v": Call(head_dim=12, head_dim_v=20, new=1),
    **{f"strides: {strides}": Call(strides=strides, new=1, page_size=8) for strides in kv.STRIDES},
    **{str(dtype): Call(dtype=dtype, new=1) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
}


@pytest.mark.parametrize("call", ALONE.values(), ids=ALONE)
def test_each_argument(call):
    kv.run(kv.make(call))


@given(call=kv.calls())
def test_random_combinations(call):
    kv.run(kv.make(call))


class OnEngine:
    """A call's problem, on an engine itself."""

    def __init__(self, engine):
        self.engine = engine

    def run(self, made, unread):
        before = {name: made.arguments[name].clone() for name in ("k_cache", "v_cache")}
        call = made.cache_call().rotated(made.call.rotary == "gptj", made.consecutive)
        problem = (call.unread_problem if unread else call.problem)(made.options)
        call.append()
        out, lse = self.engine.forward(problem)
        if problem.packed is not None:
            batch = len(made.call.before)
            out, lse = out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)
        kv.check(made, out, lse, before)


@given(call=kv.calls())
def test_tiled(call):
    """As on a GPU, too, where the host does not know the lengths beforehand."""
    OnEngine(tiled).run(kv.make(call), unread=call.seed % 2 == 0)


@given(call=kv.calls())
def test_tiles_of_a_gpus_size(call):
    with tuning.using(GPU):
        OnEngine(tiled).run(kv.make(call), unread=call.seed % 2 == 0)


@given(call=kv.calls())
def test_fused_layout(call):
    """With template.py in place of its kernel."""
    if call.dtype != torch.float64 and max(call.before) + call.written:
        OnEngine(Fused()).run(kv.make(call), unread=True)


@given(call=kv.calls())
def test_split_kv(call):
    made = kv.make(call)
    with pytest.MonkeyPatch.context() as patch:
        test_decode.shrink(patch)
        problem = made.cache_call().problem(made.options)
        if problem.q.numel() and problem.k.numel() and decode.unsupported_reason(problem) is None:
            OnEngine(decode).run(made, unread=False)


def test_split_kv_takes_what_decoding_has():
    """All but pages with a leftpad, and rows at odd distances."""
    with pytest.MonkeyPatch.context() as patch:
        test_decode.shrink(patch)

        def reason(**fields: Any) -> str | None:
            made = kv.make(Call((40, 65, 9), new=1, **fields))
            problem = made.cache_call().problem(made.options)
            assert problem.packed is not None
            return split_kv.unsupported_reason(torch.device("cpu"), problem)

        for fields in (
            {},
            {"batch_idx": True},
            {"leftpad": (3, 40, 0)},
            {"page_size": 16},
            {"page_size": 80, "spare": 0},
        ):
            for strides in ("contiguous", "k beside v", "wider"):
                assert reason(strides=strides, **fields) is None, (fields, strides)
        assert "begins with its first page" in (reason(page_size=16, leftpad=(3, 40, 0)) or "")
        assert "even distances" in (reason(strides="columns") or "")


def test_rows_alike_are_a_dense_problem():
    """Which more engines serve."""

    def packed(**fields: Any) -> bool:
        made = kv.make(Call(**fields))
        return made.cache_call().problem(made.options).packed is not None

    assert not packed(before=(9, 9), new=1)
    assert not packed(before=(9,), page_size=16, spare=0)
    assert not packed(before=(9, 9), leftpad=(2, 2))
    assert packed(before=(9, 8))
    assert packed(before=(9, 9), leftpad=(2, 1))
    assert packed(before=(9,), page_size=4)


def test_lengths_read_or_not_are_the_same():
    for call in (Call((9, 0, 5), new=2, leftpad=(4, 0, 5)), Call((9, 0, 5), page_size=4)):
        made = kv.make(call)
        read, unread = (
            make(made.options).packed for make in (made.cache_call().problem, made.cache_call().unread_problem)
        )
        assert read is not None
        assert unread is not None
        assert read.cu_seqlens_k.tolist() == unread.cu_seqlens_k.tolist() == [0, *accumulate(call.lengths)]
        assert read.max_seqlen_k == max(call.lengths) <= unread.max_seqlen_k


# Forms of arguments


def test_signature_is_flash_attns():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("q", inspect.Parameter.empty),
        ("k_cache", inspect.Parameter.empty),
        ("v_cache", inspect.Parameter.empty),
        ("k", None),
        ("v", None),
        ("rotary_cos", None),
        ("rotary_sin", None),
        ("cache_seqlens", None),
        ("cache_batch_idx", None),
        ("cache_leftpad", None),
        ("block_table", None),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ]
    assert "flash_attn_with_kvcache" in compiled_fa.__all__


def small(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    k_cache, v_cache = torch.randn(2, 2, 12, 2, 8).unbind(0)
    k, v = torch.randn(2, 2, 3, 2, 8).unbind(0)
    arguments = {"q": torch.randn(2, 3, 4, 8), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    return arguments | {"cache_seqlens": torch.tensor([5, 2], dtype=torch.int32)} | changes


def test_cache_seqlens_as_an_int_or_none():
    both = small(cache_seqlens=torch.tensor([4, 4], dtype=torch.int32)), small(cache_seqlens=4)
    assert torch.equal(*(flash_attn_with_kvcache(**arguments) for arguments in both))
    assert torch.equal(both[0]["k_cache"], both[1]["k_cache"])
    whole = small(k=None, v=None, cache_seqlens=None)
    expected = flash_attn_func(whole["q"], whole["k_cache"], whole["v_cache"])
    assert torch.equal(flash_attn_with_kvcache(**whole), expected)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    paged = small(k=None, v=None, cache_seqlens=None, q=torch.randn(1, 1, 4, 8), block_table=table)
    k, v = (paged[name].flip(0).flatten(0, 1)[None] for name in ("k_cache", "v_cache"))
    assert torch.allclose(flash_attn_with_kvcache(**paged), flash_attn_func(paged["q"], k, v), atol=1e-6)


@pytest.mark.parametrize("engine", ["split_kv", "tiled"])
def test_tables_and_lengths_that_are_written_to_without_a_word(engine, monkeypatch):
    """Calls alike are checked once, and their pages found once. NumPy leaves no word."""
    test_decode.shrink(monkeypatch)
    pages: dict[str, Any] = {name: torch.randn(6, 16, 2, 8) for name in ("k_cache", "v_cache")}
    table, lengths = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.int32), np.array([40, 40], dtype=np.int32)
    q = torch.randn(2, 1, 4, 8)
    given: dict[str, Any] = {"block_table": torch.from_numpy(table), "cache_seqlens": torch.from_numpy(lengths)}

    def check():
        with use_engine(engine):
            out = flash_attn_with_kvcache(q, **pages, **given)
        for b, (row, length) in enumerate(zip(table.tolist(), lengths.tolist(), strict=True)):
            used = row[: -(-length // 16)]
            k, v = (x[used].flatten(0, 1)[None, :length] for x in pages.values())
            assert torch.allclose(out[b : b + 1], flash_attn_func(q[b : b + 1], k, v), atol=1e-5)

    for change in (lambda: None, lambda: None, table.sort, lambda: table[::-1].sort(0), lambda: lengths.fill(33)):
        change()
        for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with mode:
                check()
    with monkeypatch.context() as patch:  # what is as it was is not looked at again
        for name in ("kvcache", "kvcache_lengths", "kvcache_pages"):
            patch.setattr(cache_validation, name, None)
        check()
    table[:] = [[5, 4, 0], [1, 2, 3]]
    check()
    table[1, 2] = 6
    with pytest.raises(ValueError, match="block_table must be numbers of k_cache's pages, from 0 to 5, got 0 to 6"):
        check()
    lengths[:] = [40, 31]  # nobody uses that page
    check()
    lengths[:] = [40, 49]
    with pytest.raises(ValueError, match="block_table must be of enough pages of 16 for 49 keys, got 3"):
        check()


def test_window_and_flags_in_any_form():
    expected = flash_attn_with_kvcache(**small(causal=True, window_size=(3, 0)))
    for forms in (
        {"causal": 1, "window_size": torch.tensor([3, 0])},
        {"causal": torch.tensor(True), "window_size": [3, 0]},
    ):
        assert torch.equal(flash_attn_with_kvcache(**small(**forms, softcap=None)), expected)


def test_any_strides_of_q_and_of_new_keys():
    """Those of a dimension of size 1 are anything; expanded heads; a part of a larger tensor."""
    plain = small(q=torch.randn(2, 1, 4, 8), k=torch.randn(2, 1, 1, 8).expand(-1, -1, 2, -1))
    plain["v"] = plain["v"][:, :1]
    odd = {**plain, **{name: plain[name].clone() for name in ("k_cache", "v_cache")}}
    odd["q"] = plain["q"].as_strided((2, 1, 4, 8), (32, 8, 8, 1))
    odd["k"] = plain["k"].contiguous().as_strided((2, 1, 2, 8), (16, 5, 8, 1))
    odd["v"] = plain["v"].mT.contiguous().mT
    assert torch.equal(flash_attn_with_kvcache(**odd), flash_attn_with_kvcache(**plain))
    assert torch.equal(odd["k_cache"], plain["k_cache"])


def test_no_gradient_and_no_graph_behind_the_cache():
    arguments = small()
    for name in ("q", "k", "v", "k_cache"):
        arguments[name].requires_grad_()
    version = arguments["v_cache"]._version
    out = flash_attn_with_kvcache(**arguments)
    assert not out.requires_grad
    assert arguments["k_cache"].is_leaf
    assert arguments["v_cache"]._version > version  # what was saved for a backward is known to be overwritten
    names = ("q", "k_cache", "v_cache", "k", "v")
    assert not OP(*(arguments[name] for name in names), cache_seqlens=arguments["cache_seqlens"])[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(flash_attn_with_kvcache(**small()), out)


def test_forward_mode_is_refused():
    arguments = small()
    with pytest.raises(NotImplementedError, match="does not support forward-mode AD in q"):
        torch.func.jvp(lambda q: flash_attn_with_kvcache(**{**arguments, "q": q}), (arguments["q"],), (arguments["q"],))


def test_under_autocast_the_cache_keeps_its_dtype():
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in small().items()}
    expected = flash_attn_with_kvcache(**half)
    mixed = small() | {name: small()[name].bfloat16() for name in ("k_cache", "v_cache")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flash_attn_with_kvcache(**mixed), expected)


@pytest.mark.parametrize("fields", [{}, {"batch_idx": True}, {"page_size": 4}], ids=["dense", "batch_idx", "paged"])
def test_a_prompt_needs_no_look_at_the_cache(fields):
    """Wherever its pages lie: its keys are the new ones, an ordinary dense problem."""
    prompts = kv.make(Call((0, 0), 9, 9, causal=True, **fields))
    problem = prompts.cache_call().problem(prompts.options)
    assert problem.packed is None
    assert problem.k is prompts.arguments["k"]
    assert problem.v is prompts.arguments["v"]
    beside = kv.make(Call((0, 3), 9, 9, causal=True, **fields))
    assert beside.cache_call().problem(beside.options).packed is not None


def test_empty_batch_and_no_queries():
    arguments = small()
    none = {name: x[:0] for name, x in arguments.items()} | {name: arguments[name] for name in ("k_cache", "v_cache")}
    assert flash_attn_with_kvcache(**none).shape == (0, 3, 4, 8)
    arguments["q"] = arguments["q"][:, :0]
    out, lse = flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 4, 8), (2, 4, 0))
    assert torch.equal(arguments["k_cache"][0, 5:8], arguments["k"][0])


# Independence of a row from those beside it


@pytest.mark.parametrize("fields", [{}, {"batch_idx": True}, {"page_size": 16}], ids=["dense", "batch_idx", "paged"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("slopes", ["none", "batch"])
@pytest.mark.parametrize("before", [(70, 5, 40, 70), (70, 0, 0, 3)], ids=["steps", "prompts among them"])
def test_num_splits_1_gives_bits_that_do_not_depend_on_the_batch(fields, queries, slopes, before):
    """Rows beside others that are longer, and alone, where another engine serves them if there are no slopes."""
    call = Call(before, queries, queries, causal=True, num_splits=1, slopes=slopes, heads_per_key=1, **fields)
    made = kv.make(call)
    with pytest.MonkeyPatch.context() as patch:
        test_decode.shrink(patch)
        found = flash_attn_with_kvcache(**made.arguments)
        per_row = ("q", "k", "v", "cache_seqlens", "cache_batch_idx", "block_table", "alibi_slopes")
        for rows in ([0], [1], [2], [3, 1], [1, 2, 0]):
            some = dict(made.arguments)
            for name in per_row:
                if some.get(name) is not None:
                    some[name] = some[name][rows]
            if not fields:
                some |= {name: some[name][rows] for name in ("k_cache", "v_cache")}
            if "block_table" in some:  # no wider than these rows need
                longest = max(before[row] + queries for row in rows)
                some["block_table"] = some["block_table"][:, : -(-longest // call.page_size)]
            for one, other in zip(flash_attn_with_kvcache(**some), found, strict=True):
                assert torch.equal(one, other[rows])


# Cost


class Bytes(TorchDispatchMode):
    """Bytes of all tensors that operators make: views of others make none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.count += x.nbytes
        return found


# Keys that are no rows at even distances are tiled's.
COSTS = [(tiled, "contiguous"), (tiled, "columns"), (decode, "contiguous")]


@pytest.mark.parametrize(("engine", "strides"), COSTS, ids=["tiled", "tiled, columns", "split_kv"])
@pytest.mark.parametrize("before", [(90, 40), (90,)], ids=str)
def test_a_step_does_not_touch_what_the_cache_has_beyond_its_keys(engine, before, strides, monkeypatch):
    """As many bytes are made whatever the buffer's size, in one piece or in pages."""
    test_decode.shrink(monkeypatch)

    def made_by(room, page_size, pages):
        made = kv.make(Call(before, new=1, room=room, page_size=page_size, strides=strides))
        if page_size:  # more pages of others
            for name in ("k_cache", "v_cache"):
                cache = made.arguments[name]
                more = torch.full((pages, *cache.shape[1:]), torch.nan)
                made.arguments[name] = kv.laid_out(torch.cat([cache, more]), strides)
        clear_caches()
        with Bytes() as counted:
            call = made.cache_call()
            call.append()
            engine.forward(call.problem(made.options))
        return counted.count

    assert made_by(3, 0, 0) == made_by(5000, 0, 0)
    assert made_by(3, 16, 0) == made_by(3, 16, 5000)


# Compiled


def step(q, k_cache, v_cache, k, v, cache_seqlens):
    """Of a decode loop."""
    out = flash_attn_with_kvcache(q * 2.0, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True)
    return out + 1.0


@pytest.mark.parametrize("as_int", [False, True], ids=["tensor", "int"])
def test_a_decode_loop_is_one_graph(as_int):
    """Of a cache that grows; two where its length is an int, the first of which is for that very number."""
    count = torch._dynamo.testing.CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(step, backend=count, fullgraph=True)
    caches = [torch.zeros(2, 40, 2, 8) for _ in range(4)]
    for at in range(12):
        q, (k, v) = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 1, 2, 8)
        seqlens = at if as_int else torch.tensor([at, 2 * at], dtype=torch.int32)
        found = compiled(q, caches[0], caches[1], k, v, seqlens)
        assert torch.equal(found, step(q, caches[2], caches[3], k, v, seqlens))
        assert torch.equal(caches[0], caches[2])
        assert torch.equal(caches[1], caches[3])
    assert count.frame_count == (2 if as_int else 1)


def test_inductor_copies_no_cache(compiled_steps):
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    k_cache, v_cache = torch.zeros(2, 1, 333, 2, 8)
    q, (k, v) = torch.randn(1, 1, 4, 8), torch.randn(2, 1, 1, 2, 8)
    seqlens = torch.tensor([3], dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True)
    found, (code,) = run_and_get_code(compiled, q, k_cache, v_cache, k, v, seqlens)
    assert torch.equal(k_cache[0, 3], k[0, 0])
    assert torch.allclose(found, step(q, k_cache, v_cache, k, v, seqlens))
    assert "attention_with_kvcache" in code
    made = [line for line in code.splitlines() if "= empty_strided" in line and "333" in line]
    assert not made, made


@pytest.mark.parametrize("paged", [False, True])
def test_opcheck(paged):
    where: dict[str, Any] = {"page_size": 4} if paged else {"batch_idx": True}
    call = Call((9, 4), 2, 2, (2, 0), rotary="neox", causal=True, slopes="batch", **where)
    a = kv.make(call).arguments
    a |= {name: a[name].nan_to_num() for name in ("k_cache", "v_cache")}
    names = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")
    tensors = tuple(a.get(name) for name in (*names, "cache_leftpad", "block_table"))
    opcheck(OP, tensors, {"causal": True, "alibi_slopes": a["alibi_slopes"], "window_left": 5, "num_splits": 1})
    opcheck(OP, tensors[:3])


def test_meta_tensors_give_shapes():
    q, cache = torch.empty(2, 5, 4, 8, device="meta"), torch.empty(3, 9, 2, 8, device="meta")
    out, lse = OP(q, cache, torch.empty(3, 9, 2, 12, device="meta"))
    assert (out.shape, lse.shape, lse.dtype) == ((2, 5, 4, 12), (2, 4, 5), torch.float32)


def test_export():
    class Step(torch.nn.Module):
        k_cache: torch.Tensor
        v_cache: torch.Tensor

        def __init__(self):
            super().__init__()
            self.register_buffer("k_cache", torch.zeros(1, 20, 2, 8))
            self.register_buffer("v_cache", torch.zeros(1, 20, 2, 8))

        def forward(self, q, k, v, cache_seqlens):
            return flash_attn_with_kvcache(q, self.k_cache, self.v_cache, k, v, cache_seqlens=cache_seqlens)

    q, (k, v), seqlens = torch.randn(1, 1, 4, 8), torch.randn(2, 1, 1, 2, 8), torch.tensor([4], dtype=torch.int32)
    exported: Any = torch.export.export(Step(), (q, k, v, seqlens)).module()
    model = Step()
    assert torch.equal(exported(q, k, v, seqlens), model(q, k, v, seqlens))
    assert torch.equal(exported.k_cache, model.k_cache)


# Bad input


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message[:60])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def paged(*rows):
    return {"block_table": torch.tensor(rows, dtype=torch.int32)}


TABLE = torch.rand(8, 4)
OWN_PAGES = "block_table must be pages of its own for each row of k, which is written to them"
BAD = [
    bad("q must be a tensor, got NoneType", TypeError, q=None),
    bad("v_cache must be a tensor, got list", TypeError, v_cache=[]),
    bad("cache_batch_idx must be a tensor, got list", TypeError, cache_batch_idx=[0, 1]),
    bad("q must be (batch, seqlen_q, nheads, head_dim), got shape (3, 4, 8)", q=torch.zeros(3, 4, 8)),
    bad("k_cache must be (batch_cache, seqlen_cache, nheads_k, head_dim), got shape (2,)", k_cache=torch.zeros(2)),
    bad("k_cache must be (num_blocks, page_block_size,", k_cache=torch.zeros(2), **paged([0], [1])),
    bad("k_cache must be of q's dtype, torch.float32", TypeError, k_cache=torch.zeros(2, 12, 2, 8).half()),
    bad("v_cache must be on q's device, cpu, got meta", v_cache=torch.zeros(2, 12, 2, 8, device="meta")),
    bad("k_cache must be of q's head_dim, 8, got 9", k_cache=torch.zeros(2, 12, 2, 9)),
    bad("k_cache must be of a number of heads that divides q's 4, got 3", k_cache=torch.zeros(2, 12, 3, 8),
        v_cache=torch.zeros(2, 12, 3, 8)),
    bad("v_cache must be of k_cache's shape up to head_dim, (2, 12, 2), got (2, 11, 2)",
        v_cache=torch.zeros(2, 11, 2, 8)),
    bad("k_cache must be of at least q's batch, 2, got 1", k_cache=torch.zeros(1, 12, 2, 8),
        v_cache=torch.zeros(1, 12, 2, 8)),
    bad("v must be given where the other is, got None", v=None),
    bad("k must be given where the other is, got None", k=None),
    bad("cache_seqlens must be given where k is: it says where to write, got None", cache_seqlens=None),
    bad("k must be of shape (batch, seqlen_new, *k_cache's heads and head_dim) = (2, 3, 2, 8), got (2, 3, 1, 8)",
        k=torch.zeros(2, 3, 1, 8)),
    bad("v must be of shape (batch, seqlen_new, *v_cache's heads and head_dim) = (2, 3, 2, 8), got (2, 2, 2, 8)",
        v=torch.zeros(2, 2, 2, 8)),
    bad("k must be (batch, seqlen_new, nheads_k, head_dim), got shape (3, 2, 8)", k=torch.zeros(3, 2, 8)),
    bad("k must be of k_cache's dtype, torch.float32, got torch.float64", TypeError,
        k=torch.zeros(2, 3, 2, 8).double()),
    bad("v must be on v_cache's device, cpu, got meta", v=torch.zeros(2, 3, 2, 8, device="meta")),
    bad("k_cache must be memory of its own in every element where k is written to it, got strides",
        k_cache=torch.zeros(2, 12, 1, 8).expand(-1, -1, 2, -1)),
    bad("cache_seqlens must be of dtype int32, got torch.int64", TypeError, cache_seqlens=torch.tensor([5, 2])),
    bad("cache_seqlens must be of q's batch, 2, got 1", cache_seqlens=ints(5)),
    bad("cache_seqlens must be (batch), got shape ()", cache_seqlens=ints(5)[0]),
    bad("cache_seqlens must be on q's device, cpu, got meta", cache_seqlens=ints(5, 2).to("meta")),
    bad("cache_seqlens must be an int or a tensor of one element, got 5.0", TypeError, cache_seqlens=5.0),
    bad("cache_seqlens must be at least 0, got -1", cache_seqlens=-1),
    bad("cache_seqlens must be at least 0, got -4", cache_seqlens=ints(5, -4)),
    bad("cache_seqlens must be at most 9, so that 3 new keys fit in k_cache, got 10", cache_seqlens=ints(5, 10)),
    bad("cache_seqlens must be at most 9, so that 3 new keys fit in k_cache, got 10", RuntimeError, cache_seqlens=10),
    bad("cache_seqlens must be at most 12 in k_cache, got 13", k=None, v=None, cache_seqlens=ints(13, 0)),
    bad("cache_batch_idx must be of dtype int32, got torch.int64", TypeError, cache_batch_idx=torch.tensor([0, 1])),
    bad("cache_batch_idx must be of q's batch, 2, got 3", cache_batch_idx=ints(0, 1, 1)),
    bad("cache_batch_idx must be rows of k_cache, from 0 to 1, got 0 to 2", cache_batch_idx=ints(0, 2)),
    bad("cache_batch_idx must be rows of k_cache, from 0 to 1, got -1 to 0", cache_batch_idx=ints(0, -1)),
    bad("cache_batch_idx must be another row of k_cache for each row of k", cache_batch_idx=ints(1, 1)),
    bad("cache_batch_idx must be None where there is a block_table", cache_batch_idx=ints(0, 1), **paged([0], [1])),
    bad("cache_leftpad must be from 0 to the row's cache_seqlens, 2, got 3", cache_leftpad=ints(0, 3)),
    bad("cache_leftpad must be from 0 to the row's cache_seqlens, 5, got -1", cache_leftpad=ints(-1, 0)),
    bad("cache_leftpad must be of dtype int32, got torch.int64", TypeError, cache_leftpad=torch.tensor([0, 1])),
    bad("block_table must be of dtype int32, got torch.int64", TypeError, block_table=torch.tensor([[0], [1]])),
    bad("k_cache must be of pages of at least 1 row, got 0", k_cache=torch.zeros(2, 0, 2, 8),
        v_cache=torch.zeros(2, 0, 2, 8), **paged([0], [1])),
    bad("block_table must be of one row a sequence, 2, got 1", **paged([0])),
    bad("block_table must be (batch, max_num_blocks_per_seq), got shape (2,)", block_table=ints(0, 1)),
    bad("block_table must be of enough pages of 12 for 10 keys and 3 new ones, got 1", cache_seqlens=ints(5, 10),
        **paged([0], [1])),
    bad("block_table must be of enough pages of 12 for 10 keys and 3 new ones", RuntimeError, cache_seqlens=ints(5, 10),
        **paged([0], [1])),
    bad("block_table must be of enough pages of 12 for 13 keys, got 1", RuntimeError, k=None, v=None,
        cache_seqlens=ints(13, 0), **paged([0], [1])),
    bad("block_table must be numbers of k_cache's pages, from 0 to 1, got 0 to 2", **paged([0], [2])),
    bad("block_table must be numbers of k_cache's pages, from 0 to 1, got -1 to 1", **paged([-1], [1])),
    bad("block_table must be another place for each new key", cache_seqlens=ints(5, 6), **paged([1], [1])),
    bad(f"{OWN_PAGES}, got page 1, where row 0 writes over keys of row 1", cache_seqlens=ints(2, 8), **paged([1], [1])),
    bad(f"{OWN_PAGES}, got page 1, where row 1 writes over keys of row 0", cache_seqlens=ints(9, 5),
        cache_leftpad=ints(6, 0), **paged([1], [1])),
    bad(f"{OWN_PAGES}, got page 0, where row 1 writes over keys of row 0", cache_seqlens=ints(13, 5),
        **paged([0, 1], [0, 0])),
    bad("rotary_sin must be given where the other is, got None", rotary_cos=TABLE),
    bad("rotary_cos must be given where the other is, got None", rotary_sin=TABLE),
    bad("rotary_cos must be None where there is no k to rotate", rotary_cos=TABLE, rotary_sin=TABLE, k=None, v=None),
    bad("rotary_cos must be (positions, rotary_dim / 2), got shape (8,)", rotary_cos=TABLE[:, 0], rotary_sin=TABLE),
    bad("rotary_sin must be of rotary_cos's shape, (8, 4), got (8, 3)", rotary_cos=TABLE, rotary_sin=TABLE[:, :3]),
    bad("rotary_cos must be of at most head_dim / 2 = 4 columns, got 5", rotary_cos=torch.zeros(8, 5),
        rotary_sin=torch.zeros(8, 5)),
    bad("rotary_cos must be of a row for each of 9 positions, got 8 rows", rotary_cos=TABLE, rotary_sin=TABLE,
        cache_seqlens=ints(6, 2)),
    bad("rotary_cos must be of a row for each of 9 positions, got 8 rows", rotary_cos=TABLE, rotary_sin=TABLE,
        q=torch.zeros(2, 4, 4, 8), causal=True),
    bad("num_splits must be at least 0 (0: as engines find best), got -1", num_splits=-1),
    bad("num_splits must be an int or a tensor of one element, got 1.5", TypeError, num_splits=1.5),
    bad("window_size[0] must be -1 (unbounded) or at least 0, got -2", window_size=(-2, 0)),
    bad("softcap must be finite and at least 0", softcap=-1.0),
    bad("softmax_scale must be finite", softmax_scale=float("nan")),
    bad("alibi_slopes must be of shape (nheads,) = (4,) or (batch, nheads) = (2, 4), got (3,)",
        alibi_slopes=torch.zeros(3)),
    bad("causal must be a bool, got 'yes'", TypeError, causal="yes"),
    bad("return_softmax_lse must be a bool, got 'yes'", TypeError, return_softmax_lse="yes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_is_named_and_leaves_the_cache_as_it_was(changes, error, message):
    arguments = small(**changes)
    caches = [arguments[name] for name in ("k_cache", "v_cache") if isinstance(arguments[name], torch.Tensor)]
    before = [x.clone() for x in caches]
    with pytest.raises(error) as raised:
        flash_attn_with_kvcache(**arguments)
    assert str(raised.value).startswith(message)
    assert all(x.is_meta or torch.equal(x, old) for x, old in zip(caches, before, strict=True))


def test_an_engine_that_cannot_serve_leaves_the_cache_as_it_was():
    arguments = small()
    before = arguments["k_cache"].clone()
    with (
        compiled_fa.use_engine("fused"),
        pytest.raises(RuntimeError, match="the fused engine was asked for and cannot"),
    ):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"], before)
    with compiled_fa.use_engine("tiled"):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"][0, 5:8], arguments["k"][0])


def test_what_nobody_uses_may_be_anything():
    """A row's table behind its last page and before its first key's, and all of a row's without keys; two rows on one
    page that is only read."""
    table = torch.tensor([[0, -7], [1, 10**6]], dtype=torch.int32)
    expected = flash_attn_with_kvcache(**small())
    assert torch.allclose(flash_attn_with_kvcache(**small(block_table=table)), expected, atol=1e-6)
    one = {"q": torch.randn(1, 3, 4, 8), "k": None, "v": None}
    for number, where in ((10**6, {"cache_seqlens": 0}), (-1, {"cache_seqlens": 12, "cache_leftpad": ints(12)})):
        assert not flash_attn_with_kvcache(**small(**one, **where, **paged([number]))).any()
    shared = small(k=None, v=None, block_table=table[:1].expand(2, -1))
    assert flash_attn_with_kvcache(**shared).isfinite().all()


def test_pages_that_rows_may_write_to_and_share():
    """Where no key of another row is written over: a page before and behind a leftpad; a ring of pages of a row's own;
    a page out of sight."""
    where: dict[str, Any] = {"cache_seqlens": ints(9, 5), "cache_leftpad": ints(8, 0)}
    apart, together = small(**where), small(**where, **paged([1], [1]))
    for name in ("k_cache", "v_cache"):
        apart[name][1, 5:8], together[name][1, :5] = 0.0, apart[name][1, :5]
        together[name][1, 8] = apart[name][0, 8]
    assert torch.allclose(flash_attn_with_kvcache(**together), flash_attn_with_kvcache(**apart), atol=1e-6)
    for table, some in (([0, 0], [1, 1]), {}), (([1, 0], [1, 1]), {"cache_leftpad": ints(12, 0)}):
        changes = {"cache_seqlens": ints(13, 14), **paged(*table), **some}
        assert flash_attn_with_kvcache(**small(**changes), window_size=(3, 0)).isfinite().all()


# What flash_attn's own test asks for, over the parameters that it has, at random


@st.composite
def upstream_calls(draw):
    """Two rows of 6 heads in a cache of seqlen_k: with and without new keys, rotary, leftpad, pages of 256."""
    queries, seqlen_k = draw(
        st.sampled_from([(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (128, 128)])
    )
    appends, paged = draw(st.booleans()), draw(st.booleans())
    causal, local = draw(st.booleans()), draw(st.booleans())
    head_dim, fraction = draw(st.sampled_from([32, 59, 64, 80, 128, 256])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    new = draw(st.sampled_from([queries, draw(st.integers(1, queries))])) if appends else -1
    pairs = int(fraction * head_dim) // 16 * 8 if appends else 0
    furthest = seqlen_k - (max(queries, new) if (causal or local) and pairs else max(new, 0))
    before = tuple(draw(st.integers(0 if appends else 1, furthest)) for _ in range(2))
    nheads_k = draw(st.sampled_from([6, 1, 3]))
    return Call(
        before,
        queries,
        new,
        tuple(draw(st.integers(0, max(n - 1, 0))) for n in before) if not paged and draw(st.booleans()) else (),
        256 if paged else 0,
        batch_idx=not paged and draw(st.booleans()),
        rotary=draw(st.sampled_from(["neox", "gptj"])) if pairs else "",
        rotary_pairs=pairs,
        nheads_k=nheads_k,
        heads_per_key=6 // nheads_k,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16])),
        causal=causal,
        window_size=(draw(st.integers(0, seqlen_k - 1)), draw(st.integers(0, seqlen_k - 1))) if local else (-1, -1),
        slopes=draw(st.sampled_from(["none", "batch"])),
        num_splits=draw(st.sampled_from([1, 0])),
        room=seqlen_k - max(before) - max(new, 0),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=12)
@given(call=upstream_calls())
def test_flash_attns_own_parameters(call):
    kv.run(kv.make(call))


@pytest.mark.parametrize("append", [False, True])
def test_flash_attns_own_bounds_of_a_table(append):
    """A table of one page of 256, and a row that has one key too many: RuntimeError, which names block_table."""
    k_cache, v_cache = torch.randn(2, 4, 256, 1, 64)
    q, table = torch.randn(1, 1, 1, 64), torch.zeros(1, 1, dtype=torch.int32)
    new: dict[str, Any] = {"k": q, "v": q} if append else {}
    with pytest.raises(RuntimeError, match="block_table"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ints(256 + (not append)), block_table=table, **new)
    full = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ints(256), block_table=table)
    assert torch.allclose(full, flash_attn_func(q, k_cache[:1], v_cache[:1]), atol=1e-6)
