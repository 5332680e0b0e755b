"""Compiling ahead, and what a person who waits is told."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import compiled_fa
from compiled_fa import inductor, progress
from compiled_fa.engines.tiled import inductor as steps_inductor


class Terminal(io.StringIO):
    def isatty(self):
        return True


def waited(result, terminal, held=True):
    """result_of a future that is held back until it has been waited for once in vain, or is there at once."""
    release = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: (release.wait(), result)[1])
        if not held:
            release.set()
            future.result()
        patched, calls = progress.wait, []

        def wait(futures, timeout):
            calls.append(timeout)
            if len(calls) > 3:
                release.set()
                return patched(futures)
            return patched(futures, 0)

        progress.wait = wait
        try:
            return progress.result_of(future, "a test", terminal)
        finally:
            progress.wait = patched
            release.set()


def test_a_terminal_is_told_once_and_then_of_progress():
    terminal = Terminal()
    assert waited(7, terminal) == 7
    said = terminal.getvalue()
    assert said.count("\n") == 1
    assert said.startswith("compiled_fa: compiling a test, once for this machine ...\r")
    assert said.endswith(" s\n")


def test_nothing_is_said_of_what_is_there_at_once():
    terminal = Terminal()
    assert waited(7, terminal, held=False) == 7
    assert terminal.getvalue() == ""


def test_nothing_is_said_to_a_program():
    pipe = io.StringIO()
    with ThreadPoolExecutor(1) as pool:
        assert progress.result_of(pool.submit(lambda: 7), "a test", pipe) == 7
    assert pipe.getvalue() == ""


def test_errors_pass_through():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        progress.result_of(pool.submit(lambda: 1 / 0), "a test", Terminal())


@pytest.mark.parametrize("varlen", [False, True])
def test_warmup_compiles_what_calls_need(compiled_steps, varlen, monkeypatch):
    options = {"causal": True, "softcap": 5.0}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert compiled_fa.warmup(seqlen=300, varlen=varlen, dropout_p=0.1, **options) > 0
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(inductor, "compile_graph", None)  # to compile anything now is an error
    q = torch.randn(2, 340, 3, 16, requires_grad=True)
    if varlen:
        cu_seqlens = torch.tensor([0, 100, 340], dtype=torch.int32)
        out = compiled_fa.flash_attn_varlen_func(*[q[0]] * 3, cu_seqlens, cu_seqlens, 240, 240, 0.1, **options)
    else:
        out = compiled_fa.flash_attn_func(q, q, q, 0.1, **options)
    out.sum().backward()
    assert not steps_inductor._failed


def test_warmup_refuses_what_calls_refuse():
    with pytest.raises(ValueError, match="softcap"):
        compiled_fa.warmup(softcap=-1.0)
