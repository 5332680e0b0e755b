"""attention and varlen_attention: arguments as flash_attn has them, checked; and who computes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import arguments, forward_mode, turing, validation
from ..messages import say_once
from ..problem import Packed
from . import tiles
from .quantise import BLOCK_K, BLOCK_Q, Quantised, quantise, smoothed

LOG2_E = math.log2(math.e)
DENSE = ("batch, seqlen_q, nheads, head_dim", "batch, seqlen_k, nheads_k, head_dim")
PACKED = ("total_q, nheads, head_dim", "total_k, nheads_k, head_dim")
TURING, AMPERE = (7, 5), (8, 0)

Attend = Callable[[Quantised, Quantised, Tensor, bool, torch.dtype], Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    smooth_k: bool = True,
) -> Tensor:
    """softmax(softmax_scale · q kᵀ) v with q and k in int8, and v and the softmax's weights in fp16. Forward only.

    Keys lose their mean over the sequence, which changes no softmax; then 128 queries or 64 keys of a head share a
    scale: all of them, so that keys that a query does not see have a part in how others are rounded. How wrong results
    are, `python -m compiled_fa.int8` shows.

    Args:
        q: (B, Sq, H, D), fp16, bf16 or fp32.
        k: (B, Sk, Hk, D); H a multiple of Hk: query heads share key heads.
        v: (B, Sk, Hk, Dv). It is rounded to fp16: beyond 65,504 it is infinite.
        causal: query i sees keys up to i + Sk - Sq, as in flash_attn; a query that sees none gives 0.
        softmax_scale: of the scores; None: D ** -0.5.
        smooth_k: False leaves keys as they are, for those without a common offset.

    Returns:
        out (B, Sq, H, Dv) in q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong, or asks for gradients, which this has not; the message names it.

    Example:
        with torch.no_grad():
            out = compiled_fa.int8.attention(q, k, v, causal=True)

    Source: SageAttention (arXiv 2410.02367).
    """
    q, k, v = _checked(q, k, v, DENSE)
    if k.shape[0] != q.shape[0]:
        validation.refuse("k", f"of q's batch, {q.shape[0]}", k.shape[0])
    return _attend(q, k, v, *_options(q, causal, softmax_scale, smooth_k))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    smooth_k: bool = True,
) -> Tensor:
    """attention for packed sequences, one after another; each has a mean and scales of its own.

    Args:
        q: (Tq, H, D); k (Tk, Hk, D), v (Tk, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), running sums of the lengths; the host reads them.
        max_seqlen_q, max_seqlen_k: at least the longest lengths.
        causal, softmax_scale, smooth_k: as attention's.

    Returns:
        out (Tq, H, Dv) in q's dtype.

    Raises:
        ValueError, TypeError: as attention.
    """
    q, k, v = _checked(q, k, v, PACKED)
    *places, _ = arguments.packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    packed = Packed(*places)
    validation.packing(q, packed)
    validation.packed_values_read(q, k, packed)
    options = _options(q, causal, softmax_scale, smooth_k)
    lengths_q, lengths_k = packed.host_lengths
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    parts = [_attend(x[None], y[None], z[None], *options)[0] for x, y, z in sequences]
    return torch.cat(parts) if parts else q.new_zeros(*q.shape[:-1], v.shape[-1])


def _checked(q: Tensor, k: Tensor, v: Tensor, layout: tuple[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    arguments.check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (asked := forward_mode.differentiated(x)) is not None:
            validation.refuse(name, "without gradients, which int8 attention has none of (torch.no_grad())", asked)
    q, k, v = arguments.autocast(q, k, v)
    validation.qkv(q, k, v, layout)
    if q.dtype == torch.float64:
        validation.refuse("q", "float16, bfloat16 or float32", q.dtype, TypeError)
    return q, k, v


def _options(q: Tensor, causal: Any, softmax_scale: Any, smooth_k: Any) -> tuple[bool, float, bool]:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else validation.number("softmax_scale", softmax_scale)
    return validation.flag("causal", causal), scale, validation.flag("smooth_k", smooth_k)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float, smooth_k: bool) -> Tensor:
    """Of checked arguments, dense."""
    batch, seqlen_q, nheads, _ = q.shape
    if not (batch and seqlen_q and k.shape[1]):
        return q.new_zeros(batch, seqlen_q, nheads, v.shape[-1])
    queries = quantise(q.float() * (softmax_scale * LOG2_E), BLOCK_Q)
    keys = quantise(smoothed(k) if smooth_k else k.float(), BLOCK_K)
    values = v.half()
    if values.stride(-1) != 1:
        values = values.contiguous()
    return _who(values, q.shape[-1])(queries, keys, values, causal, q.dtype)


def _who(v: Tensor, head_dim: int) -> Attend:
    """The kernel where it can be, else PyTorch's ops."""
    if v.device.type != "cuda" or torch.version.cuda is None:
        return tiles.attend
    capability = torch.cuda.get_device_capability(v.device)
    if capability != TURING and capability < AMPERE:  # Volta's tensor cores have no int8
        return tiles.attend
    if importlib.util.find_spec("triton") is None:
        say_once("int8 attention works without its kernel, slowly: triton is not installed")
        return tiles.attend
    if capability == TURING:
        if missing := turing.missing():
            say_once(f"int8 attention works without its kernel, slowly: {missing}")
            return tiles.attend
        turing.enable()
    from . import kernel

    return kernel.attend if max(head_dim, v.shape[-1]) <= kernel.MAX_HEAD_DIM else tiles.attend
