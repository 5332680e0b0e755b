"""Compiling ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate

import torch

from . import engines, validation
from .interface import Result, flash_attn_func, flash_attn_varlen_func
from .problem import Problem
from .tuning import current

LONGEST_CACHE = 1 << 16
SHORT = 64  # tokens; in bf16, short tiles and those of twice the length are code of their own


def warmup(
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seqlen: int = 1024,
    nheads: int = 2,
    nheads_k: int | None = None,
    head_dim: int = 64,
    varlen: bool = False,
    decode: bool = False,
    backward: bool = True,
    dropout_p: float = 0.0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi: bool = False,
) -> float:
    """Compile what calls like this one need, so that none of them waits for it. Results are kept on disk, too.

    On a CPU one piece of machine code serves every shape, scale, window and head_dim; which of softcap, ALiBi and
    dropout there are, whether anything is masked, the dtype, and the direction tell pieces apart. On a GPU, and on a
    CPU for decoding and for short packed sequences, also head_dim and the query heads for each key head do.

    Args:
        dtype, device: of q, k and v.
        seqlen: tokens of the longest example; there are shorter ones, too, which other code may serve.
        nheads, nheads_k, head_dim: heads of q, of k and v (None: as many), and their dimension.
        varlen: compile flash_attn_varlen_func's code in place of flash_attn_func's.
        decode: also what one query on a cache of seqlen keys or more needs, in one piece or in pages.
        backward: gradients, too.
        The rest: as flash_attn_func's; alibi: with alibi_slopes.

    Returns: seconds it took.

    Raises: as flash_attn_func; ValueError where seqlen is below 1.

    Example:
        compiled_fa.warmup(dtype=torch.bfloat16, causal=True, softcap=30.0)
    """
    start = time.perf_counter()
    if seqlen < 1:
        validation.refuse("seqlen", "at least 1", seqlen)
    nheads_k = nheads if nheads_k is None else nheads_k
    device = torch.device(device)
    slopes = torch.full((nheads,), 0.1, device=device) if alibi else None
    options = (dropout_p, None, causal, window_size, softcap, slopes)

    def call(lengths: Sequence[int]) -> None:
        shapes = ((sum(lengths), heads, head_dim) for heads in (nheads, nheads_k, nheads_k))
        q, k, v = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=backward) for shape in shapes)
        out: Result
        if varlen:
            cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths), *options)
        else:
            out = flash_attn_func(q[None], k[None], v[None], *options)
        if backward and isinstance(out, torch.Tensor):
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.set_grad_enabled(backward):  # dropout draws
        for lengths in _batches(seqlen, varlen, nheads * head_dim):
            call(lengths)
        if decode:
            cache = _decoded_cache(seqlen, nheads, nheads_k, head_dim, dtype, device)
            q = torch.zeros(1, 1, nheads, head_dim, dtype=dtype, device=device)
            k = torch.zeros(1, cache, nheads_k, head_dim, dtype=dtype, device=device)
            flash_attn_func(q, k, k, *options)
    return time.perf_counter() - start


def _decoded_cache(
    seqlen: int, nheads: int, nheads_k: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """A length of the cache at which decoding has code of its own, of at least `seqlen`; that, where it never has."""
    if device.type != "cpu":
        return seqlen
    q = torch.empty(1, 1, nheads, head_dim, dtype=dtype, device=device)
    cache = seqlen
    while cache <= LONGEST_CACHE:
        k = torch.empty(1, cache, nheads_k, head_dim, dtype=dtype, device=device)
        if engines.select(Problem.of(q, k, k, None), "forward").engine.name == "split_kv":
            return cache
        cache *= 2
    return seqlen


def _batches(seqlen: int, varlen: bool, width: int) -> list[list[int]]:
    """Lengths of sequences which between them need all code: long ones, and, of one length and of many, short ones.

    width: of all heads.
    """
    short = [min(seqlen, SHORT), min(seqlen, 2 * SHORT)]
    if not varlen:
        return [[seqlen], short[:1]]
    ragged = [list(range(max(1, length - 7), length + 1)) for length in short]
    many = max(8, -(-current().split_kv.short_from_elements // (short[0] * width)))
    return [[seqlen] * 2, short[:1] * 8, short[:1] * many, *ragged]
