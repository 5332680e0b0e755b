"""What outlives a call: bounded, made once, by nobody's waiting for another's, and usable by every call after."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Case, check_against_float64, cumulative, make, packed
from tuned import retune

import compiled_fa
from compiled_fa import caches, flash_attn_func, flash_attn_varlen_func, messages, ops, use_engine
from compiled_fa.caches import Cache, Scratch
from compiled_fa.inductor import graphs
from compiled_fa.inductor.steps import STEPS
from compiled_fa.tuning import AT_EVERY_CALL

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def of_this_test(monkeypatch):
    """Caches made here are not among the process's."""
    monkeypatch.setattr(caches, "_all", [])


def test_the_least_recently_used_goes_first(of_this_test):
    cache: Cache[str, str] = Cache("a test's", entries=2)
    made = []

    def get(key):
        def make():
            made.append(key)
            return key.upper()

        return cache.get(key, make)

    assert [get(key) for key in "abab"] == list("ABAB")
    get("a")
    get("c")
    assert made == list("abc")
    assert len(cache) == 2
    get("a")
    get("b")
    assert made == list("abcb")
    assert cache.contents() == "a test's 2 of 2"
    cache.clear()
    assert len(cache) == 0


def test_bytes_are_bounded(of_this_test):
    cache: Cache[Any, torch.Tensor] = Cache("a test's", entries=9, nbytes=1000, size_of=lambda x: x.nbytes)
    for number in range(5):
        cache.get(number, lambda: torch.zeros(100))
        assert cache.nbytes == 400 * len(cache) <= 1000
    assert len(cache) == 2
    large = cache.get("large", lambda: torch.zeros(1000))  # itself more than fits: kept alone, until the next one
    assert len(cache) == 1
    assert cache.get("large", lambda: torch.zeros(1)) is large


def test_an_error_reaches_all_and_is_not_kept(of_this_test):
    cache: Cache[str, float] = Cache("a test's", entries=2)
    with pytest.raises(ZeroDivisionError):
        cache.get("x", lambda: 1 // 0)
    assert cache.get("x", lambda: 7) == 7


def test_one_makes_it_and_who_needs_another_does_not_wait(of_this_test):
    cache: Cache[str, str] = Cache("a test's", entries=4)
    begun, finish, made = threading.Event(), threading.Event(), []

    def slowly():
        made.append("slow")
        begun.set()
        finish.wait()
        return "slow"

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(cache.get, "slow", slowly)
        begun.wait()
        second = pool.submit(cache.get, "slow", slowly)
        assert pool.submit(cache.get, "other", lambda: "other").result(timeout=60) == "other"
        assert not first.done()
        assert not second.done()
        finish.set()
        assert first.result() == second.result() == "slow"
    assert made == ["slow"]


def test_compiling_one_kernel_does_not_hold_up_another(compiled_steps, monkeypatch):
    """A softcap kernel that takes until it is told to finish, and a plain one in memory, which another thread needs."""
    q = torch.randn(1, 40, 2, 8)

    def call(**options):
        with use_engine("tiled"):
            return flash_attn_func(q, q, q, **options)

    STEPS.clear()
    expected = call(causal=True)
    begun, finish = threading.Event(), threading.Event()
    compile_graph = graphs.compile_graph

    def held_up(*arguments):
        begun.set()
        finish.wait()
        return compile_graph(*arguments)

    monkeypatch.setattr(graphs, "compile_graph", held_up)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call, softcap=3.0)
        begun.wait()
        assert torch.equal(pool.submit(call, causal=True).result(timeout=300), expected)
        assert not first.done()
        finish.set()
        capped = first.result()
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")
    assert torch.allclose(capped, call(softcap=3.0), atol=1e-6)


def test_all_graphs_are_compiled_by_one_thread(monkeypatch):
    """Two are a crash where torch 2.11 has CUDA, and the machine has not."""
    threads: list[int] = []
    monkeypatch.setattr(graphs, "compile_graph", lambda *_: threads.append(threading.get_ident()))

    def compile_one():
        graphs.compiled_graph(print, lambda size: [], "a test")

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(compile_one).result()
    compile_one()
    assert len(threads) == 3
    assert set(threads) == {threads[0]} != {threading.get_ident()}


def test_a_graph_is_compiled_while_a_module_is_imported(tmp_path):
    """By the thread that imports it: another one would wait for the import, which waits for it."""
    (tmp_path / "computes_when_imported.py").write_text(
        "import torch\n"
        "from compiled_fa import flash_attn_func\n"
        "q = torch.randn(1, 600, 2, 16)\n"
        "out = flash_attn_func(q, q, q, softcap=2.0)\n"
    )
    program = "import computes_when_imported; print(*computes_when_imported.out.shape)"
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": path, "COMPILED_FA_COMPILE": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # else it would wait for ever
        check=True,
    )
    assert done.stdout.split() == ["1", "600", "2", "16"]


@pytest.mark.parametrize("named_by_asserts", [False, True])
def test_sizes_are_asserted_where_that_names_them(named_by_asserts, monkeypatch):
    """As Inductor of torch 2.14 does; without, its code is a NameError."""
    import torch._inductor.config as inductor_config

    found = []

    def examples(size):
        found.append(inductor_config.size_asserts)
        return [torch.empty(size("n", 8))]

    monkeypatch.setattr(graphs, "_asserts_name_sizes", lambda: named_by_asserts)
    graphs.compile_graph(lambda x: (x + 1,), examples, {"size_asserts": False})
    assert found == [named_by_asserts]


def test_kernels_compiled_at_once_are_right(compiled_steps):
    """Six pieces of code by six threads; each with its own options for Inductor."""
    STEPS.clear()
    kinds: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {"causal": True}),
        (torch.float32, {"softcap": 3.0}),
        (torch.float64, {"slopes": "heads"}),
        (torch.float32, {"dropout_p": 0.3}),
        (torch.float64, {"softcap": 2.0, "causal": True}),
        (torch.float32, {"slopes": "batch", "softcap": 5.0}),
    ]
    cases = [Case(((50, 70), (3, 9)), seed=seed, dtype=dtype, **options) for seed, (dtype, options) in enumerate(kinds)]

    def results(case):
        data = make(case)
        q, k, v = (x.clone().requires_grad_() for x in (data.q, data.k, data.v))
        longest = [max(pair[side] for pair in case.lengths) for side in (0, 1)]
        out, lse = ops.varlen_attention(q, k, v, *data.cu_seqlens, *longest, None, *data.options, "tiled")
        gradients = torch.autograd.grad((out, lse), (q, k, v), (data.dout, data.dlse))
        return packed(data, (out.detach(), lse.detach(), *gradients))

    with ThreadPoolExecutor(len(cases)) as pool:
        for case, found in zip(cases, list(pool.map(results, cases)), strict=True):
            check_against_float64(make(case), found)
    assert not any("could not compile" in said for said in messages._said)


# ----------------------------------------------------------------------------------------------------- inference mode

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "nothing but itself": {"window_size": (0, 0)},
    "softcap": {"softcap": 3.0},
    "ALiBi": {"alibi": True},
    "dropout": {"dropout_p": 0.4},
    "all": {"causal": True, "window_size": (3, 0), "softcap": 3.0, "alibi": True, "dropout_p": 0.4},
}


def run(lengths, dense, mode, alibi=False, head_dim=4, **options):
    """A call, with its gradients where the mode is to train."""
    torch.manual_seed(len(lengths))
    if alibi:
        options["alibi_slopes"] = torch.tensor([0.3, 0.1])
    with torch.inference_mode() if mode == "evaluate" else torch.set_grad_enabled(mode == "train"):
        x = torch.randn(sum(lengths), 2, head_dim, requires_grad=mode == "train")
        if dense:
            batch = x.unflatten(0, (len(lengths), -1))
            out = flash_attn_func(batch, batch, batch, **options).flatten(0, 1)
        else:
            cu_seqlens = cumulative(lengths)
            out = flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, max(lengths), max(lengths), **options)
        if mode != "train":
            return [out.clone()]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]


@pytest.mark.parametrize("engine", ["auto", "tiled"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_inference_mode_leaves_nothing_behind(features, dense, engine):
    """Evaluate, train, evaluate longer, ...: any order, and each call's results are those of a process of its own."""
    short, long = [2, 2] if dense else [2, 3, 0], [40, 40] if dense else [40, 70, 1]
    calls = [(short, "evaluate"), (short, "train"), (long, "evaluate"), (long, "train"), (long, "no_grad")]
    with use_engine(engine):
        expected = {}
        for lengths, mode in calls:
            compiled_fa.clear_caches()
            expected[len(lengths) * 1000 + max(lengths), mode] = run(lengths, dense, mode, **features)
        for order in [calls, *list(permutations(calls))[7::23]]:
            compiled_fa.clear_caches()
            for lengths, mode in order:
                found = run(lengths, dense, mode, **features)
                for one, other in zip(found, expected[len(lengths) * 1000 + max(lengths), mode], strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize("step", ["decode", "short"])
def test_plans_made_in_inference_mode_serve_others(monkeypatch, compiled_steps, step):
    always = {"decode_beside_sdpa": AT_EVERY_CALL, "short_beside_sdpa": AT_EVERY_CALL}
    retune(monkeypatch, split_kv={"decode_from_keys": 1, "decode_from_elements": 1, "short_from_elements": 1, **always})
    lengths_q, lengths_k = ([1, 1], [90, 70]) if step == "decode" else ([9, 30, 4], [9, 30, 4])
    sides = (lengths_q, lengths_k, lengths_k)
    q, k, v = (torch.randn(sum(lengths), 2, 32, requires_grad=True) for lengths in sides)
    arguments = cumulative(lengths_q), cumulative(lengths_k), max(lengths_q), max(lengths_k)
    compiled_fa.clear_caches()
    with torch.inference_mode():
        expected = flash_attn_varlen_func(q, k, v, *arguments).clone()
    out = flash_attn_varlen_func(q, k, v, *arguments)
    assert torch.equal(out.detach(), expected)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_a_compiled_model_after_inference_mode():
    torch._dynamo.reset()
    compiled_fa.clear_caches()
    compiled = torch.compile(
        lambda x: flash_attn_func(x, x, x, window_size=(0, 0)), backend="aot_eager", fullgraph=True
    )
    x = torch.randn(1, 2, 1, 4)
    with torch.inference_mode():
        compiled(x.clone())
    trained = x.clone().requires_grad_()
    compiled(trained).sum().backward()
    assert trained.grad is not None
    assert torch.allclose(trained.grad, torch.ones_like(x))  # each query sees itself alone: out is v


# ------------------------------------------------------------------------------------------------------------- scratch


def test_scratch_is_bounded_and_reused(of_this_test):
    scratch = Scratch("a test's", lambda: (4000, 5000))
    small = scratch.take("small", (100,), torch.float32)
    large = scratch.take("large", (1001,), torch.float32)
    assert scratch.take("small", (10, 10), torch.float32).data_ptr() == small.data_ptr()
    scratch.trim()
    assert scratch.nbytes == 400
    del large
    for number in range(20):
        scratch.take(f"number {number}", (250,), torch.float32)
    scratch.trim()
    assert scratch.nbytes == 5000
    assert scratch.take("number 19", (250,), torch.float32).shape == (250,)
    scratch.clear()
    assert scratch.nbytes == 0


def test_threads_have_buffers_of_their_own(of_this_test):
    scratch = Scratch("a test's", lambda: (4000, 5000))
    mine = scratch.take("x", (100,), torch.float32)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(scratch.take, "x", (100,), torch.float32).result()
        assert theirs.data_ptr() != mine.data_ptr()
        assert scratch.nbytes == 800
    assert scratch.nbytes == 400  # with the thread its buffers go


def test_new_keys_make_room_an_eighth_at_a_time(of_this_test):
    """Of lengths that grow at every call each has a key of its own; the latest stay."""
    cache: Cache[int, int] = Cache("a test's", entries=80)
    held = []
    for key in range(300):
        cache.get(key, partial(abs, key))
        held.append(len(cache))
    assert max(held) == held[79] == 80
    assert held[80] == 70
    assert held[80:].count(70) == 20  # of 220 calls, so many looked for the oldest
    assert cache.get(299, lambda: -1) == 299
    assert cache.get(230, lambda: -1) == 230
    assert cache.get(0, lambda: -1) == -1


def test_clear_caches_forgets_all_and_changes_nothing():
    q = torch.randn(2, 50, 2, 8)

    def call():
        return flash_attn_func(q, q, q, window_size=(5, 3), softcap=2.0)

    expected = call()
    assert "scratch 0 MB of" not in caches.contents()
    compiled_fa.clear_caches()
    for held in caches.contents().split("; "):
        assert re.search(r" 0 of \d+|^scratch 0 MB of ", held), held
    assert torch.equal(call(), expected)


def test_values_of_tensors(of_this_test):
    """Kept for these very tensors, until someone writes to one, or it is gone; and no more than its bounds."""
    cache = caches.TensorCache[list[int]]("a test's", entries=2, nbytes=100, size_of=lambda value: 8 * len(value))

    def value_of(x, key=0):
        return cache.get((x, x), key, x.tolist)

    x, y, z = (torch.tensor([n]) for n in (3, 5, 7))
    assert value_of(x) is value_of(x)
    assert value_of(x, 1) is not value_of(x)
    assert len(cache) == 2
    x.add_(1)
    assert value_of(x) == [4]
    assert value_of(x[:]) is not value_of(x)  # another tensor
    assert value_of(y) == [5]
    assert value_of(z) == [7]
    assert len(cache) == 2
    del y, z
    assert len(cache) == 0
    with torch.inference_mode():
        unversioned = torch.tensor([9])
    assert value_of(unversioned) is not value_of(unversioned)
    value_of(x)
    large = torch.zeros(50)
    assert value_of(large) is value_of(large)
    assert len(cache) == 1  # alone, though it is over the bound
    cache.clear()
    assert cache.contents() == "a test's 0 of 2, 0 MB of 9.537e-05 MB"
