"""flash_attn_with_kvcache: the name, argument order and defaults of flash_attn 2.8's interface.

It brings arguments into the form that the op takes, and computes nothing itself.

B batch, Sq queries, Sn new keys, H and Hk query and key heads, D and Dv head_dims of q and k, and of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import arguments, cache_call, cache_ops, cache_validation, engines, forward_mode, straight, validation
from .interface import Result


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """Write new keys and values to a cache, in place, and attend to all that it has then: one step of inference.

    Row b of the batch has the keys cache_leftpad[b] to cache_seqlens[b] of its row of the cache, or of its pages, and
    the Sn new ones, which are written behind these. Causal and window are aligned to the bottom right, as in
    flash_attn_func: the last query stands at the last key. Time grows with the keys that there are, not with the cache.

    Forward only: the result has no gradient.

    Args:
        q: (B, Sq, H, D), fp16, bf16, fp32 or fp64; D from 1 to 512. Under autocast q, k and v take k_cache's dtype.
        k_cache: (rows, seqlen_cache, Hk, D); with block_table (num_blocks, page_block_size, Hk, D), pages of any size.
            H is a multiple of Hk, and query head h reads key head h // (H / Hk).
        v_cache: as k_cache, with Dv in place of D.
        k: (B, Sn, Hk, D), new keys; or None.
        v: (B, Sn, Hk, Dv), given where k is.
        rotary_cos, rotary_sin: (positions, R / 2), where k is given: q and k are rotated (compiled_fa.rotary) in their
            first R elements, k as of positions cache_seqlens[b], cache_seqlens[b] + 1, ..., and so q if causal or with
            a window; else all of q as of position cache_seqlens[b].
        cache_seqlens: keys before the new ones: an int for all rows, or int32 (B,); None, without k: as many as fit.
        cache_batch_idx: int32 (B,), each one's row of k_cache; None: 0, 1, ... Without block_table.
        cache_leftpad: int32 (B,), where rows begin; None: at 0. Masks, ALiBi and lengths count from there, rotary
            positions do not.
        block_table: int32 (B, pages): key j of row b is row j % page_block_size of page
            block_table[b, j // page_block_size]. What lies behind a row's last page may be any number.
            Rows may share pages, but no new key may be written over another row's.
        softmax_scale: factor of q kᵀ; None: 1 / sqrt(D).
        causal: a query sees no key after its position.
        window_size: (left, right): a query sees keys from position - left to position + right; -1: unbounded.
        softcap: c > 0: scores become c · tanh(score / c). 0 or None: off.
        rotary_interleaved: pair elements 0 and 1, 2 and 3, ... (GPT-J); else element j with j + R / 2 (GPT-NeoX).
        alibi_slopes: fp32 (H,) or (B, H): scores lose slope · |position - key|.
        num_splits: 1: the bits of a row's result do not depend on the rows beside it. Else into how many parts a GPU
            splits each row's keys, if there are so many; 0: as engines find best.
        return_softmax_lse: return lse, too.

    Returns:
        out (B, Sq, H, Dv); with return_softmax_lse (out, softmax_lse): (B, H, Sq), natural log, fp32 (fp64 for fp64
        inputs). Queries without a key have out 0 and lse -inf.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, and the cache is as it was. Where the cache
            or the table has no room, it is a RuntimeError as well, which flash_attn raises. Values of tensors are
            checked on a CPU, and elsewhere with COMPILED_FA_CHECK=1.
        RuntimeError: the engine asked for by name cannot serve this call.
        NotImplementedError: an argument has a tangent (torch.func.jvp, dual tensors).

    Example:
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True)
        cache_seqlens += 1

    Source: flash_attn.flash_attn_with_kvcache; Flash-Decoding (Dao, Haziza, Massa and Sizov 2023).
    """
    tables = rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    tensors: Given = q, k_cache, v_cache, k, v, *tables
    scores = softmax_scale, causal, window_size, softcap
    returns_lse = validation.flag("return_softmax_lse", return_softmax_lse)
    if (right := _like(tensors, scores, alibi_slopes, rotary_interleaved, num_splits)) is not None:
        out, lse = cache_ops.attend_like(right, alibi_slopes, *tensors)
        return (out, lse) if returns_lse else out
    tensors = _with_tensor_of_lengths(tensors)
    numbers = _numbers(tensors, scores, alibi_slopes, rotary_interleaved, num_splits)
    forward_mode.refuse_tangents("flash_attn_with_kvcache", q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if arguments.casts(k_cache) and k_cache.is_floating_point():  # to the dtype of the cache, which stays
        q, k, v = _cast(q, k_cache), _cast(k, k_cache), _cast(v, k_cache)
    tensors = q, k_cache, v_cache, k, v, *tensors[5:]
    # Else the cache would be a result of all that was ever written to it.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        out, lse = cache_ops.attention_with_kvcache(*tensors, *numbers)
    return (out, lse) if returns_lse else out


_TENSORS = cache_call.CacheCall._fields[: cache_ops.TENSORS]
_SEQLENS = _TENSORS.index("cache_seqlens")

Given = tuple[Any, ...]  # _TENSORS as they are given: cache_seqlens may be a number
Scores = tuple[float | None, bool, Sequence[int] | Tensor, float | None]


def _with_tensor_of_lengths(tensors: Given) -> Given:
    q, seqlens = tensors[0], tensors[_SEQLENS]
    if seqlens is None or isinstance(seqlens, Tensor):
        return tensors
    validation.tensor("q", q, cache_validation.QUERIES)
    length = cast(int, validation.length("cache_seqlens", seqlens, 32))  # or a symbol of one
    return _with_lengths(tensors, cache_call.equal_lengths(length, q.shape[0], q.device))


def _with_lengths(tensors: Given, seqlens: Tensor | int | None) -> Given:
    return *tensors[:_SEQLENS], seqlens, *tensors[_SEQLENS + 1 :]


def _numbers(
    tensors: Given,
    scores: Scores,
    alibi_slopes: Tensor | None,
    rotary_interleaved: bool,
    num_splits: int,
) -> tuple[Any, ...]:
    """What the op takes after its first tensors, which are checked to be some."""
    for argument, given in zip(_TENSORS, tensors, strict=True):
        if given is not None or argument in _TENSORS[:3]:
            validation.tensor_given(argument, given)
    options = arguments.options(None, *scores, alibi_slopes)
    interleaved = validation.flag("rotary_interleaved", rotary_interleaved)
    splits = validation.length("num_splits", num_splits)
    if eager := not torch.compiler.is_compiling():
        splits = int(splits)
    how = interleaved, splits, engines.requested(), eager
    return *options[: cache_ops.SCORES], *how  # there is no dropout


_calls: straight.Calls[cache_ops.RightCall] = straight.Calls("calls of flash_attn_with_kvcache")


def _like(
    tensors: Given,
    scores: Scores,
    alibi_slopes: Tensor | None,
    rotary_interleaved: bool,
    num_splits: int,
) -> cache_ops.RightCall | None:
    """What the arguments come to, of a call that goes straight to an engine; None: of another."""
    one_for_all = type(tensors[_SEQLENS]) is int  # whichever: like a tensor's, it is checked for each call

    def found() -> cache_ops.RightCall | None:
        given = _with_tensor_of_lengths(_with_lengths(tensors, 0)) if one_for_all else tensors
        return cache_ops.like(*given, *_numbers(given, scores, alibi_slopes, rotary_interleaved, num_splits))

    scale, causal, window_size, softcap = scores
    others = scale, causal, *arguments.sides(window_size), softcap, rotary_interleaved, num_splits, engines.requested()
    known = _with_lengths(tensors, None) if one_for_all else tensors
    return _calls.get((*known, alibi_slopes), (*others, one_for_all), found)


Cast = TypeVar("Cast", Tensor, Tensor | None)


def _cast(x: Cast, cache: Tensor) -> Cast:
    return x if x is None or not x.is_floating_point() else x.to(cache.dtype)
