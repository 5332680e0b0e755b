"""flash_attn_with_kvcache: every argument, alone and in random combination, on every engine that can serve."""

from __future__ import annotations

import inspect
from dataclasses import replace
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
from kv import Call, small
from on_cpu import Fused
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_fa
from compiled_fa import cache_validation, clear_caches, flash_attn_func, flash_attn_with_kvcache, tuning, use_engine
from compiled_fa.cache_call import CacheCall
from compiled_fa.engines import split_kv, tiled
from compiled_fa.engines.split_kv import decode
from compiled_fa.problem import Options
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


@pytest.mark.parametrize("strides", ["contiguous", "wider", "heads first", "sliced"])
def test_dense_problem_lies_in_the_cache(strides):
    """Rows 1 and 2 of the cache, keys 2 to 6 of each: no copy, wherever the cache lies."""
    k_cache, v_cache = torch.randn(2, 4, 8, 3, 4).unbind(0)
    if strides == "wider":
        k_cache, v_cache = (torch.stack([x, x], -1).flatten(3)[..., :4] for x in (k_cache, v_cache))
    elif strides == "heads first":
        k_cache, v_cache = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_cache, v_cache))
    elif strides == "sliced":
        k_cache, v_cache = torch.randn(2, 6, 9, 3, 4)[:, 1:5, 1:].unbind(0)
    rows, leftpad, seqlens = (torch.tensor(x, dtype=torch.int32) for x in ([1, 2], [2, 2], [6, 6]))
    q = torch.randn(2, 1, 3, 4)
    call = CacheCall(q, k_cache, v_cache, cache_seqlens=seqlens, cache_batch_idx=rows, cache_leftpad=leftpad)
    problem = call.problem(Options())
    assert problem.packed is None
    for part, cache in ((problem.k, k_cache), (problem.v, v_cache)):
        expected = cache[1:3, 2:6]
        assert torch.equal(part, expected)
        assert (part.data_ptr(), part.stride()) == (expected.data_ptr(), expected.stride())


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


@given(kv.calls())
def test_an_int_is_that_many_for_all_rows(call):
    """To the bit, in results and in caches."""
    call = replace(call, before=call.before[:1] * len(call.before), leftpad=call.leftpad[:1] * len(call.leftpad))
    by_tensor, by_int = kv.make(call).arguments, kv.make(call).arguments
    by_int["cache_seqlens"] = call.before[0]
    for _ in range(2):  # the second one's layout is known
        for x, y in zip(flash_attn_with_kvcache(**by_tensor), flash_attn_with_kvcache(**by_int), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        for name in ("k_cache", "v_cache"):
            torch.testing.assert_close(by_int[name], by_tensor[name], rtol=0, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("fields", [{}, {"batch_idx": True}, {"page_size": 16}], ids=["dense", "batch_idx", "paged"])
def test_a_call_like_the_last_is_prepared(fields, monkeypatch):
    """No problem is made of it any more; what it appends and attends to is its own, rotated or not."""
    monkeypatch.setattr(split_kv, "defers", lambda problem, direction, to: False)
    for rotary in ("", "gptj"):
        first, other = (kv.make(Call((70, 5), 1, 1, causal=True, rotary=rotary, **fields)) for _ in range(2))
        kv.run(first)
        for name in ("q", "k", "v", "k_cache", "v_cache"):
            other.arguments[name] *= 0.5
        with monkeypatch.context() as patch:
            patch.setattr(CacheCall, "problem", None)
            kv.run(other)


def test_empty_batch_and_no_queries():
    arguments = small()
    none = {name: x[:0] for name, x in arguments.items()} | {name: arguments[name] for name in ("k_cache", "v_cache")}
    assert flash_attn_with_kvcache(**none).shape == (0, 3, 4, 8)
    arguments["q"] = arguments["q"][:, :0]
    for engine in ("auto", "split_kv"):  # asked for by name, too: there is nothing for it to do
        with use_engine(engine):
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
