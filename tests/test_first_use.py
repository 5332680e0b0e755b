"""Compiling ahead, and what a person who waits is told."""

import io
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

import compiled_fa
from compiled_fa import messages, tuning
from compiled_fa.inductor import graphs
from compiled_fa.inductor.steps import STEPS


class Terminal(io.StringIO):
    def isatty(self):
        return True


def waited(monkeypatch, terminal, is_compiling, looks=4, seconds_a_look=1.0):
    """result_of a future that is done after some looks at it, which take time by a clock of their own."""
    future: Future[int] = Future()
    now = 0.0

    def wait(futures, timeout):
        nonlocal now
        now += seconds_a_look
        if now > looks * seconds_a_look:
            future.set_result(7)
        return SimpleNamespace(done=future.done())

    monkeypatch.setattr(messages, "wait", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    return messages.result_of(future, "a test", is_compiling, terminal)


def test_a_terminal_is_told_once_and_then_of_progress(monkeypatch):
    terminal = Terminal()
    assert waited(monkeypatch, terminal, lambda: True) == 7
    line = "compiled_fa: compiling a test, once for this machine"
    assert terminal.getvalue() == "\r".join(
        [f"{line} ...", *(f"{line} ... {n} s" for n in (2, 3, 4)), f"{line}: 5.0 s\n"]
    )


def test_what_is_on_disk_is_not_said_to_be_compiled(monkeypatch):
    terminal = Terminal()
    assert waited(monkeypatch, terminal, lambda: False, looks=1) == 7
    assert terminal.getvalue() == ""
    waited(monkeypatch, terminal, lambda: False)
    assert terminal.getvalue().startswith("compiled_fa: loading a test ...\r")


def test_nothing_is_said_to_a_program(monkeypatch):
    pipe = io.StringIO()
    future: Future[int] = Future()
    future.set_result(7)
    assert messages.result_of(future, "a test", lambda: True, pipe) == 7
    assert pipe.getvalue() == ""


def test_a_miss_of_the_cache_on_disk_is_noticed(compiled_steps, tmp_path):
    """In processes of their own: the first finds an empty cache, the second what the first has left there."""
    program = (
        "import torch\n"
        "from compiled_fa.inductor import graphs\n"
        "before = graphs._cache_misses()\n"
        "make = lambda size: [torch.empty(size('n', 8))]\n"
        "graphs.compile_graph(lambda x: (x + 1,), make, {})\n"
        "print(graphs._cache_misses() - before)"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    first, second = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    assert (first.stdout, second.stdout) == ("1\n", "0\n"), first.stderr + second.stderr


def test_errors_pass_through():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        messages.result_of(pool.submit(lambda: 1 / 0), "a test", lambda: True, Terminal())


FEATURES = {"causal": True, "softcap": 5.0, "dropout_p": 0.1}


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, FEATURES), (torch.float32, {}), (torch.bfloat16, {})], ids=str
)
def test_warmup_compiles_what_calls_need(compiled_steps, varlen, dtype, options, monkeypatch):
    STEPS.clear()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert compiled_fa.warmup(seqlen=300, varlen=varlen, dtype=dtype, **options) > 0
    assert torch.equal(torch.get_rng_state(), state)
    if options or (dtype == torch.bfloat16 and tuning.current().tiled.bf16_from_scores < tuning.NEVER):
        assert len(STEPS)
    monkeypatch.setattr(graphs, "compile_graph", None)  # to compile anything now is an error
    if varlen:
        many, q = [60] * 70, torch.randn(60 * 70, 2, 64, dtype=dtype)
        cu_seqlens = torch.tensor([0, *accumulate(many)], dtype=torch.int32)
        compiled_fa.flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 60, 60, **options)
    for lengths in ([340], [50], [17] * 9, list(range(1, 60)), [100, 240], list(range(110, 200, 11))):
        q = torch.randn(1, sum(lengths), 3, 16, dtype=dtype, requires_grad=True)
        if varlen:
            cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
            rows, longest = q[0], max(lengths)
            out = compiled_fa.flash_attn_varlen_func(
                rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest, **options
            )
        else:
            out = compiled_fa.flash_attn_func(q, q, q, **options)
        out.sum().backward()
    assert not any("could not compile" in said for said in messages._said)


def test_warmup_compiles_decoding(compiled_steps, monkeypatch):
    compiled_fa.clear_caches()
    compiled_fa.warmup(seqlen=64, nheads=4, nheads_k=2, head_dim=32, decode=True, backward=False)
    assert len(STEPS) == 1
    monkeypatch.setattr(graphs, "compile_graph", None)
    q, cache = torch.randn(3, 1, 6, 32), torch.randn(3, 2048, 3, 32)
    dense = compiled_fa.flash_attn_func(q, cache, cache)
    cu_q, cu_k = torch.arange(4, dtype=torch.int32), 2048 * torch.arange(4, dtype=torch.int32)
    pages, table = cache.view(3 * 8, 256, 3, 32), torch.arange(3 * 8, dtype=torch.int32).view(3, 8)
    paged = compiled_fa.flash_attn_varlen_func(q[:, 0], pages, pages, cu_q, cu_k, 1, 2048, block_table=table)
    assert torch.equal(dense[:, 0], paged)
    assert not any("could not compile" in said for said in messages._said)


def test_warmup_refuses_what_calls_refuse():
    with pytest.raises(ValueError, match="softcap"):
        compiled_fa.warmup(softcap=-1.0)
    with pytest.raises(ValueError, match="seqlen must be at least 1, got 0"):
        compiled_fa.warmup(seqlen=0, varlen=True)
