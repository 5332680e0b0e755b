"""memory_efficient_attention: xformers' layouts and masks brought into flash_attn's form, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..interface import flash_attn_func, flash_attn_varlen_func
from ..with_bias import attention
from .attn_bias import (
    AttentionBias,
    LowerTriangularMaskWithTensorBias,
    PagedBlockDiagonalPaddedKeysMask,
    _Blocks,
)
from .calls import Call

DIMS = {
    3: "batch, seqlen, head_dim",
    4: "batch, seqlen, nheads, head_dim",
    5: "batch, seqlen, groups, nheads, head_dim",
}


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """xformers.ops.memory_efficient_attention: softmax(scale · query keyᵀ + mask) value, in linear memory.

    Args:
        query: (B, M, H, K); or (B, M, K), one head; or (B, M, G, H, K), G groups of H heads.
        key, value: (B, N, H, K) and (B, N, H, Kv), in as many dimensions as query. For GQA of five dimensions they
            are expanded, as for xformers: heads of stride 0 are read as one. Of four dimensions they may have fewer
            heads than query, too. Masks whose names have BlockDiagonal want B = 1.
        attn_bias: a mask of compiled_fa.xformers_api; or a tensor that is added to scores, (B, H, M, N), (B, M, N) or
            (B, G, H, M, N) as query has it, of any strides, expanded ones, too, and of sizes 1 where it broadcasts:
            compiled_fa.attention's bias; None: every query sees every key.
        p: dropout's probability, flash_attn_func's dropout_p.
        scale: flash_attn_func's softmax_scale; None: 1 / sqrt(K).
        op: None. Which engine computes is said by compiled_fa.use_engine.
        output_dtype: query's, or None.

    Returns:
        (B, M, H, Kv), in as many dimensions as query. Queries without a key give 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Example:
        out = memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())

    Source: xformers.ops.memory_efficient_attention.
    """
    if op is not None:
        validation.refuse("op", "None: xformers' operators are not here", op)
    for argument, x in (("query", query), ("key", key), ("value", value)):
        validation.tensor_given(argument, x)
        if x.dim() not in DIMS or x.dim() != query.dim():
            wanted = " or ".join(f"({DIMS[n]})" for n in ([query.dim()] if query.dim() in DIMS else DIMS))
            validation.refuse(argument, wanted, f"shape {tuple(x.shape)}")
    if output_dtype not in (None, query.dtype):
        validation.refuse("output_dtype", f"query's, {query.dtype}, or None", output_dtype)
    if attn_bias is not None and not isinstance(attn_bias, (Tensor, AttentionBias)):
        wanted = "None, a tensor or a mask of compiled_fa.xformers_api"
        validation.refuse("attn_bias", wanted, type(attn_bias).__name__, TypeError)
    q, k, v = _four_dimensions(query, key, value)
    if isinstance(attn_bias, (_Blocks, PagedBlockDiagonalPaddedKeysMask)):
        out = _of_blocks(q, k, v, attn_bias, p, scale)
    elif isinstance(attn_bias, Tensor):
        out = attention(q, k, v, _by_heads(attn_bias, query.dim()), dropout_p=p, softmax_scale=scale)
    else:
        out = _dense(q, k, v, attn_bias, p, scale, query.dim())
    return out.unflatten(2, query.shape[2:-1]) if query.dim() == 5 else out.reshape(*query.shape[:-1], -1)


def _four_dimensions(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> (B, M, H, K) with all heads, (B, N, Hk, K) and (B, N, Hk, Kv) with those that are not an expanded other one:
    query head h reads key head h // (H / Hk)."""
    if query.dim() == 3:
        return query[:, :, None], key[:, :, None], value[:, :, None]
    if query.dim() == 4:
        return query, key, value
    groups, nheads = query.shape[2:4]
    for argument, x in (("key", key), ("value", value)):
        if x.shape[2:4] != (groups, nheads):
            validation.refuse(argument, f"expanded to query's groups and heads, {(groups, nheads)}", tuple(x.shape))
    if all(_is_one(x, 3) for x in (key, value)):
        key, value = key[:, :, :, :1], value[:, :, :, :1]
        if all(_is_one(x, 2) for x in (key, value)):
            key, value = key[:, :, :1], value[:, :, :1]
    q, k, v = (x.flatten(2, 3) for x in (query, key, value))
    return q, k, v


def _by_heads(bias: Tensor, dims: int) -> Tensor:
    """-> (B, H, M, N) with all heads, for queries of so many dimensions."""
    if bias.dim() != dims:
        wanted = DIMS[dims].replace("seqlen, ", "").replace("head_dim", "seqlen_q, seqlen_k")
        validation.refuse("attn_bias", f"({wanted})", f"shape {tuple(bias.shape)}")
    if dims == 3:
        return bias[:, None]
    return bias if dims == 4 else bias.flatten(1, 2)


def _is_one(x: Tensor, dim: int) -> bool:
    """Are all elements along dim the same one?"""
    return x.shape[dim] == 1 or x.stride(dim) == 0


def _dense(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionBias | None, p: float, scale: float | None, dims: int
) -> Tensor:
    """dims: of the query as it was given."""
    out: Tensor
    if mask is None:
        out = flash_attn_func(q, k, v, p, scale)
        return out
    _, keys, window_size = mask.band.at_bottom_right(q.shape[1], k.shape[1])
    k, v = k[:, :keys], v[:, :keys]
    if isinstance(mask, LowerTriangularMaskWithTensorBias):
        bias = _by_heads(mask.bias, dims)[..., :keys]
        out = attention(q, k, v, bias, dropout_p=p, softmax_scale=scale, window_size=window_size)
    else:
        out = flash_attn_func(q, k, v, p, scale, window_size=window_size)
    return out


def _of_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: _Blocks | PagedBlockDiagonalPaddedKeysMask, p: float, scale: float | None
) -> Tensor:
    for argument, x in (("query", q), ("key", k), ("value", v)):
        if x.shape[0] != 1:
            validation.refuse(argument, f"of one row, batch size 1, with {type(mask).__name__}", tuple(x.shape))
    if mask.q_seqinfo.total != q.shape[1]:
        validation.refuse("query", f"of {mask.q_seqinfo.total} rows, the mask's", q.shape[1])
    if isinstance(mask, PagedBlockDiagonalPaddedKeysMask):
        return _of_pages(q, k, v, mask, p, scale)
    if mask.k_seqinfo.total != k.shape[1]:
        validation.refuse("key", f"of {mask.k_seqinfo.total} rows, the mask's", k.shape[1])
    first, *others = (_varlen(q[0], k[0], v[0], call, p, scale) for call in mask.calls(q.device))
    for out in others:
        first = first + out
    return first[None]


def _of_pages(
    q: Tensor, k: Tensor, v: Tensor, mask: PagedBlockDiagonalPaddedKeysMask, p: float, scale: float | None
) -> Tensor:
    size = mask.page_size
    if size < 1 or k.shape[1] % size:
        validation.refuse("key", f"of pages of {size} rows", k.shape[1])
    k, v = (x[0].unflatten(0, (-1, size)) for x in (k, v))
    return _varlen(q[0], k, v, mask.call(q.device), p, scale, mask.block_tables.to(q.device))[None]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, call: Call, p: float, scale: float | None, block_table: Tensor | None = None
) -> Tensor:
    packing = call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k
    out: Tensor = flash_attn_varlen_func(
        q, k, v, *packing, p, scale, window_size=call.window_size, block_table=block_table
    )
    return out
