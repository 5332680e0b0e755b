"""Inside torch.compile: one graph, few recompilations; and the engine's own steps, compiled by Inductor."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from support import Case, check_against_float64, cumulative, make, run_tiled
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from compiled_fa import flash_attn_func, flash_attn_varlen_func, messages
from compiled_fa.engines.tiled import TileSizes
from compiled_fa.inductor import graphs
from compiled_fa.inductor.steps import STEPS

FEATURES = {
    "plain": {"window_size": (-1, -1)},
    "causal": {"causal": True},
    "softcap, slopes, window": {"softcap": 5.0, "slopes": "batch", "window_size": (30, 4)},
    "dropout": {"dropout_p": 0.2},
}


def run_program(program, **environment):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_compiled_steps_agree_with_float64(compiled_steps, options):
    """One piece of machine code serves every shape, tile size, scale and head_dim."""
    case = Case(((67, 90), (0, 3), (5, 0), (1, 40), (33, 20)), heads_per_key=2, head_dim_v=12, **options)
    check_against_float64(make(case), run_tiled(make(case)))
    compiled = len(STEPS)
    for change in (
        {"heads_per_key": 1, "nheads_k": 1, "head_dim": 1, "head_dim_v": 1},
        {"tiles": TileSizes(16, 16, 3)},
        {"lengths": ((100, 100),) * 2, "dense": True, "softmax_scale": 0.2, "dtype": torch.bfloat16},
    ):
        other = Case(**{**case.__dict__, **change})
        check_against_float64(make(other), run_tiled(make(other)))
    assert not any("could not compile" in said for said in messages._said)
    assert len(STEPS) <= compiled + 2  # code without a mask, where it is now first needed


def test_a_first_call_inside_a_compiled_graph_compiles_its_steps():
    """There the engine first runs under AOTAutograd's own modes; in a process of its own, to be the first."""
    program = (
        "import torch, compiled_fa\n"
        "q = torch.randn(1, 16, 2, 8, requires_grad=True)\n"
        "attend = lambda q: compiled_fa.flash_attn_func(q, q, q, causal=True, softcap=9.0).sum()\n"
        "torch.compile(attend, fullgraph=True, backend='aot_eager')(q).backward()\n"
    )
    done = run_program(program, COMPILED_FA_COMPILE="1")
    assert done.returncode == 0, done.stderr
    assert "eagerly" not in done.stderr


def test_steps_drop_the_same_compiled_or_not(compiled_steps, monkeypatch):
    case = Case(((100, 130),), heads_per_key=2, dropout_p=0.5)
    compiled = run_tiled(make(case))
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")
    eager = run_tiled(make(case))
    assert all(torch.allclose(compiled[name], x, rtol=1e-4, atol=1e-5) for name, x in eager.items())


class Model(torch.nn.Module):
    def __init__(self, dropout_p=0.0):
        super().__init__()
        self.inner, self.outer, self.dropout_p = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16), dropout_p

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(-1, (3, 4, 4)).unbind(-3)
        return self.outer(flash_attn_func(q, k, v, self.dropout_p, causal=True).flatten(-2))


def gradients(model, x):
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def unique_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


def test_model_keeps_one_graph_and_recompiles_once_for_all_shapes():
    model = Model()
    compiled = torch.compile(model, fullgraph=True)
    for batch, seqlen in ((2, 16), (3, 24), (3, 33), (5, 7), (4, 100)):
        x = torch.randn(batch, seqlen, 16)
        for found, expected in zip(gradients(compiled, x), gradients(model, x), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"]
    assert unique_graphs() <= 2  # as first seen, then dynamic


def test_varlen_recompiles_once_for_all_lengths():
    def attend(q, k, v, cu_seqlens, max_seqlen):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 9], [12, 3], [30, 11], [2, 4, 6], [7, 1, 1, 1]):
        q, k, v = (torch.randn(sum(lengths), 2, 8, requires_grad=True) for _ in range(3))
        arguments = q, k, v, cumulative(lengths), max(lengths)
        found, expected = compiled(*arguments), attend(*arguments)
        assert torch.allclose(found, expected, atol=1e-6)
        (gradient,), (wanted,) = (torch.autograd.grad(out.square().sum(), q) for out in (found, expected))
        assert torch.allclose(gradient, wanted, atol=1e-5)
    assert not counters["graph_break"]
    assert unique_graphs() <= 3  # lengths change first, then the batch too


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_numbers_that_change_recompile_once_for_all_of_them(packed):
    def attend(q, k, v, dropout_p, softmax_scale, softcap):
        if packed:
            return flash_attn_varlen_func(q, k, v, ends, ends, 9, 9, dropout_p, softmax_scale, softcap=softcap)
        return flash_attn_func(q, k, v, dropout_p, softmax_scale, softcap=softcap)

    ends = cumulative([9, 5])
    q, k, v = (torch.randn(*((14,) if packed else (2, 9)), 2, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for numbers in ((0.1, 0.5, 3.0), (0.2, 0.6, 4.0), (0.3, 0.7, 5.0), (0.4, 0.8, 6.0)):
        results = []
        for function in (compiled, attend):
            torch.manual_seed(3)
            out = function(q, k, v, *numbers)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        for found, expected in zip(*results, strict=True):
            assert torch.allclose(found, expected, atol=1e-5)
    assert not counters["graph_break"]
    assert unique_graphs() == 2  # as first seen, then any


def test_a_tensor_max_seqlen_breaks_no_graph():
    def attend(q, cu_seqlens, max_seqlen):
        return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    q, arguments = torch.randn(9, 2, 8), (cumulative([4, 5]), torch.tensor(5))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *arguments), attend(q, *arguments))


def test_dropout_in_a_compiled_model():
    """Governed by torch.manual_seed, new at every call, and replayed by activation checkpointing."""
    q, k, v = (torch.randn(2, 12, 2, 4, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        return flash_attn_func(q.sin(), k, v, dropout_p=0.5).cos()

    def out_and_gradients(function):
        torch.manual_seed(3)
        out = function(q, k, v)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]

    compiled = torch.compile(attend, fullgraph=True)
    first, again = out_and_gradients(compiled), out_and_gradients(compiled)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(compiled(q, k, v), compiled(q, k, v))

    replayed = torch.compile(lambda *x: checkpoint(attend, *x, use_reentrant=False), fullgraph=True)
    with torch._inductor.config.patch(fallback_random=True):  # so that all three draw the same seed
        torch._dynamo.reset()
        expected = out_and_gradients(attend)
        for function in (compiled, replayed):
            found = out_and_gradients(function)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_errors_reach_the_caller_of_a_compiled_model():
    compiled = torch.compile(lambda q, k: flash_attn_func(q, k, k), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="number of heads that divides q's 4, got 3"):
        compiled(torch.randn(1, 5, 4, 8), torch.randn(1, 5, 3, 8))


def test_without_compiling_it_says_so_once(caplog, monkeypatch):
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")
    monkeypatch.setattr(messages, "_said", set())
    q = torch.randn(1, 5, 2, 8)
    with caplog.at_level(logging.WARNING, logger="compiled_fa"):
        for _ in range(3):
            flash_attn_func(q, q, q, softcap=5.0)
    assert len(caplog.records) == 1
    assert "COMPILED_FA_COMPILE=0" in caplog.text


def test_without_a_compiler_it_runs_eagerly_and_says_so_once():
    """In a process of its own, whose CXX does not exist."""
    program = (
        "import torch, compiled_fa\n"
        "q = torch.randn(1, 50, 2, 8)\n"
        "with compiled_fa.use_engine('tiled'):\n"
        "    for _ in range(2): out = compiled_fa.flash_attn_func(q, q, q, causal=True)\n"
        "expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True)\n"
        "assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)\n"
    )
    done = run_program(program, COMPILED_FA_COMPILE="1", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no C++ compiler") == 1


def test_a_step_that_inductor_cannot_compile_runs_eagerly(compiled_steps, monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(graphs, "compile_graph", broken)
    STEPS.clear()
    monkeypatch.setattr(messages, "_said", set())
    case = Case(((20, 30),), causal=True)
    with caplog.at_level(logging.WARNING, logger="compiled_fa"):
        check_against_float64(make(case), run_tiled(make(case)))
    STEPS.clear()  # of the failures
    assert "RuntimeError: planted" in caplog.text
