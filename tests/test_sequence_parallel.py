"""Packages for sequence parallelism that import flash_attn: themselves on ranks (ranks_clients.py), if they are
installed, and their forms of calls.

    pip install -c constraints.txt ".[parallel]"
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import pytest
import ranks
import ranks_clients
import torch
from torch import Tensor

from compiled_fa import drop_in, flash_attn_func
from compiled_fa.drop_in import present

REAL = present.on_path()
pytestmark = pytest.mark.skipif(REAL is not None, reason=f"there is {REAL}")


@pytest.mark.parametrize("name", ranks_clients.NAMES)
def test_on_ranks(name):
    if name not in ranks.CHECKS:
        pytest.skip(f"{ranks_clients.package_of(name)} is not installed")
    if wrong := ranks.outcomes("ranks_clients")[name]:
        pytest.fail(wrong, pytrace=False)


@pytest.fixture
def private(request):
    """flash_attn's module of private functions, of the profile asked for."""
    drop_in.install(request.param)
    try:
        yield importlib.import_module("flash_attn.flash_attn_interface")
    finally:
        drop_in.uninstall()


SCALE, CHUNKS = 0.3, 3


def forward_2_7_4(private, q, k, v, causal):
    options = {"causal": causal, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
    out, lse, _, _ = private._flash_attn_forward(
        q, k, v, 0.0, SCALE, alibi_slopes=None, return_softmax=False, **options
    )
    return out, lse


def backward_2_7_4(private, tensors, causal):
    private._flash_attn_backward(*tensors, 0.0, SCALE, causal, -1, -1, 0.0, None, False, rng_state=None)


def forward_2_6_3(private, q, k, v, causal):
    options = {"causal": causal, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None}
    out, _, _, _, _, lse, _, _ = private._flash_attn_forward(q, k, v, 0.0, SCALE, return_softmax=False, **options)
    return out, lse


def backward_2_6_3(private, tensors, causal):
    options = {"softcap": 0.0, "alibi_slopes": None, "deterministic": False, "rng_state": None}
    private._flash_attn_backward(*tensors, 0.0, SCALE, causal, (-1, -1), **options)


def _by_name(function, **given):
    """Every parameter that has a default, and those given: how ring-flash-attn and yunchang call."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return function(**{**defaults, **given})


NAMED = {
    "dropout_p": 0.0,
    "softmax_scale": SCALE,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def forward_by_name(private, q, k, v, causal):
    out, lse, _, _ = _by_name(private._flash_attn_forward, q=q, k=k, v=v, causal=causal, return_softmax=False, **NAMED)
    return out, lse


def backward_by_name(private, tensors, causal):
    names = "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"
    given = dict(zip(names, tensors, strict=True))
    _by_name(private._flash_attn_backward, causal=causal, deterministic=False, **given, **NAMED)


@pytest.mark.parametrize(
    ("private", "forward", "backward"),
    [
        pytest.param("2.7.4", forward_2_7_4, backward_2_7_4, id="FPDT, 2.7"),
        pytest.param("2.6.3", forward_2_6_3, backward_2_6_3, id="FPDT, 2.6"),
        pytest.param("2.7.4", forward_by_name, backward_by_name, id="rings"),
    ],
    indirect=["private"],
)
def test_chunks_of_a_sequence_give_the_whole(private, forward, backward):
    """Chunks of queries on chunks of keys, out and lse merged over them, and given to backward, which writes into
    views of larger buffers."""
    q, k, v, dout = torch.randn(4, 2, 12, 2, 8, dtype=torch.float64).unbind(0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    attend: Any = functools.partial(flash_attn_func, softmax_scale=SCALE, causal=True)
    expected = attend(*leaves)
    gradients = torch.autograd.grad(expected, leaves, dout)

    pieces = [x.chunk(CHUNKS, dim=1) for x in (q, k, v, dout)]
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for i, rows in enumerate(pieces[0]):
        parts = [forward(private, rows, pieces[1][j], pieces[2][j], i == j) for j in range(i + 1)]
        lse = functools.reduce(torch.logaddexp, [part_lse for _, part_lse in parts])
        out = sum(part * torch.exp(part_lse - lse).mT[..., None] for part, part_lse in parts)
        assert isinstance(out, Tensor)
        torch.testing.assert_close(out, expected.chunk(CHUNKS, dim=1)[i])
        for j in range(i + 1):
            buffers = [torch.empty(2, 2 * rows.shape[1], 2, 8, dtype=q.dtype)[:, ::2] for _ in range(3)]
            backward(private, (pieces[3][i], rows, pieces[1][j], pieces[2][j], out, lse, *buffers), i == j)
            for total, buffer, at in zip(found, buffers, (i, j, j), strict=True):
                total.chunk(CHUNKS, dim=1)[at].add_(buffer)
    torch.testing.assert_close(found, list(gradients))


def test_heads_that_were_exchanged_for_rows_give_the_whole():
    """DistributedAttention and Ulysses: each rank has all rows of some heads, as they lie after the exchange."""
    rows = torch.randn(3, 6, 4, 2, 8, dtype=torch.float64).unbind(0)  # (seqlen, heads, batch, head_dim)
    attend: Any = functools.partial(flash_attn_func, causal=True)
    parts = [attend(*(x.chunk(2, dim=1)[rank].permute(2, 0, 1, 3) for x in rows)) for rank in range(2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), attend(*(x.permute(2, 0, 1, 3).contiguous() for x in rows)))
