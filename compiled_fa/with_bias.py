"""attention and varlen_attention: flash_attn's functions with what flash_attn has no argument for: attention sinks, and
for dense calls a bias of every score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments, engines, ops, validation
from .interface import Result


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """softmax(softmax_scale · q kᵀ + bias) v for every head, in memory linear in the lengths beside the bias itself.

    Differentiable once, in q, k, v, a bias of floating point and sinks, in reverse mode; in forward mode in q, k and v.

    Args:
        q: (B, Sq, H, D), fp16, bf16, fp32 or fp64; D from 1 to 512.
        k: (B, Sk, Hk, D); H is a multiple of Hk, and query head h reads key head h // (H / Hk).
        v: (B, Sk, Hk, Dv).
        bias: what broadcasts to (B, H, Sq, Sk), of any strides, and is read where it lies, expanded or not. bool: True
            where the query sees the key. fp16, bf16, fp32 or fp64, not necessarily q's: added to the scores, natural
            logarithms, behind softmax_scale, softcap and ALiBi; -inf hides a key. What causal and window_size hide
            stays hidden. Its gradient has its shape and dtype, summed in fp32 (fp64 for fp64 inputs) over what was
            broadcast: for a small one give dimensions of size 1, not of expand(), whose gradient is of full size.
        sinks: floating point (H,): one more score a head, natural logarithm, that takes its share of each row's softmax
            and has no value, as in gpt-oss.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as flash_attn_func.
        return_lse: return lse, too: (B, H, Sq), natural logarithm, fp32 (fp64 for fp64 inputs), with the sink in it.

    Returns:
        out (B, Sq, H, Dv), 0 for rows that see no key; or (out, lse).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: the engine asked for by name cannot serve this call.

    Example:
        out = attention(q, k, v, position_bias)  # (1, H, Sq, Sk), as in T5

    Source: FlashAttention-2 (arXiv 2307.08691); F.scaled_dot_product_attention's attn_mask; attention sinks as in
    gpt-oss, arXiv 2508.10925.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    q, k, v = arguments.autocast(q, k, v)
    options = arguments.options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return_lse = validation.flag("return_lse", return_lse)
    if bias is not None:
        arguments.check_tensors(bias=bias)
    if sinks is not None:
        validation.sinks(q, sinks)
    out: Tensor
    lse: Tensor
    if bias is None:
        options = arguments.seeded(options, ops.check_dense, q, k, v)
        out, lse = ops.attention(q, k, v, *arguments.of_op(q, options, engines.requested()))
    else:
        options = arguments.seeded(options, ops.check_biased, q, k, v, bias)
        out, lse = ops.biased_attention(q, k, v, bias, *arguments.of_op(q, options, engines.requested()))
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    sinks: Tensor | None = None,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """flash_attn_varlen_func with attention sinks.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table: as flash_attn_varlen_func.
        sinks: as attention.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: as flash_attn_func.
        return_lse: return lse, too: (H, Tq), natural logarithm, fp32 (fp64 for fp64 inputs), with the sink in it.

    Returns:
        out (Tq, H, Dv), or (out, lse).

    Raises: as flash_attn_varlen_func.

    Example:
        out = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 250, 250, sinks=sinks, causal=True)

    Source: as attention.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    q, k, v = arguments.autocast(q, k, v)
    packing = arguments.packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    options = arguments.options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return_lse = validation.flag("return_lse", return_lse)
    if sinks is not None:
        validation.sinks(q, sinks)
    options = arguments.seeded(options, ops.check_packed, q, k, v, *packing)
    out: Tensor
    lse: Tensor
    out, lse = ops.varlen_attention(q, k, v, *packing, *arguments.of_op(q, options, engines.requested()))
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, Sq, H, Dv) and lse (B, H, Sq), or packed (Tq, H, Dv) and (H, Tq), of all keys -> of these and sinks (H,).

    With L = lse and s a sink, exp(L) of exp(L) + exp(s) is left for the keys.
    """
    sink = sinks.to(lse.dtype)[:, None]
    # A row without a key has lse -inf, and keeps nothing of what is 0; -inf - a sink of -inf were nan.
    share = torch.sigmoid(lse.clamp(min=torch.finfo(lse.dtype).min) - sink)
    return (out * share.mT[..., None]).to(out.dtype), torch.logaddexp(lse, sink)
