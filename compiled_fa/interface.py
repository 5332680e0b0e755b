"""The six flash_attn functions: the names, argument order and defaults of flash_attn 2.8's interface.

They bring arguments into the form that the ops take, and compute nothing themselves.

B batch, Sq and Sk lengths, H and Hk query and key heads, D and Dv head_dims of q, k and of v, T total tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import arguments, engines, ops, straight, validation
from .probabilities import dense_probabilities, varlen_probabilities

# Any is the tuple that return_attn_probs asks for; named, everybody who does not ask for it would have to rule it out.
Result = Tensor | Any


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """softmax(softmax_scale · q kᵀ) v for every head, in memory linear in the lengths.

    Differentiable once, in q, k and v, in reverse mode or in forward mode (torch.func.jvp, jacfwd, linearize).

    Causal and window are aligned to the bottom right: the last query stands at the last key.

        causal, Sq = 2, Sk = 5: 1 1 1 1 0     causal, Sq = 5, Sk = 2: 0 0     (rows without a key give out 0, lse -inf)
                                1 1 1 1 1                             0 0
                                                                      0 0
                                                                      1 0
                                                                      1 1

    Args:
        q: (B, Sq, H, D), fp16, bf16, fp32 or fp64; D from 1 to 512.
        k: (B, Sk, Hk, D); H is a multiple of Hk, and query head h reads key head h // (H / Hk).
        v: (B, Sk, Hk, Dv); Dv may differ from D.
        dropout_p: probability to drop an attention probability, in [0, 1); None: 0. torch.manual_seed governs
            the choice.
        softmax_scale: factor of q kᵀ; None: 1 / sqrt(D).
        causal: a query sees no key after its position.
        window_size: (left, right): a query sees keys from position - left to position + right; -1: unbounded.
        softcap: c > 0: scores become c · tanh(score / c). 0 or None: off.
        alibi_slopes: fp32 (H,) or (B, H): scores lose slope · |position - key|. Not differentiated.
        deterministic: accepted; results always are.
        return_attn_probs: return lse and, with dropout, the probabilities too. For tests: Sq · Sk memory.

    Returns:
        out (B, Sq, H, Dv); with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse (B, H, Sq), natural log,
        fp32 (fp64 for fp64 inputs); S_dmask (B, H, Sq, Sk), probabilities divided by each row's greatest, negative
        where dropped, or None without dropout.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: the engine asked for by name cannot serve this device.

    Example:
        out = flash_attn_func(q, k, v, causal=True)

    Source: FlashAttention-2 (arXiv 2307.08691); flash_attn.flash_attn_func.
    """
    given = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    if (like := _like(q, k, v, given, return_attn_probs)) is not None:
        return ops.attend_like(like, q, k, v)[0]
    arguments.check_tensors(q=q, k=k, v=v)
    q, k, v = arguments.autocast(q, k, v)
    options = arguments.options(*given)
    return_attn_probs = validation.flag("return_attn_probs", return_attn_probs)
    drops = arguments.wants_probabilities("return_attn_probs", return_attn_probs, options)
    options = arguments.seeded(options, ops.check_dense, q, k, v)
    out: Tensor
    lse: Tensor
    out, lse = ops.attention(q, k, v, *arguments.of_op(q, options, engines.requested()))
    if not return_attn_probs:
        return out
    return out, lse, dense_probabilities(q, k, lse, *options) if drops else None


_calls: straight.Calls[ops.RightCall] = straight.Calls("calls of flash_attn_func")


def _like(q: Tensor, k: Tensor, v: Tensor, given: tuple[Any, ...], return_attn_probs: bool) -> ops.RightCall | None:
    """What flash_attn_func's arguments come to, of a call that goes straight to an engine; None: of another. given: as
    arguments.options takes them."""
    engine = engines.requested()

    def found() -> ops.RightCall | None:
        arguments.check_tensors(q=q, k=k, v=v)
        options = arguments.options(*given)
        if options.dropout_p or validation.flag("return_attn_probs", return_attn_probs):
            return None
        return ops.dense_like(q, k, v, *arguments.of_op(q, options, engine))

    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes = given
    numbers = dropout_p, softmax_scale, causal, *arguments.sides(window_size), softcap
    return _calls.get((q, k, v), (*numbers, alibi_slopes, return_attn_probs, engine), found)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func with k and v in one tensor, kv (B, Sk, 2, Hk, D); q (B, Sq, H, D).

    Args, Returns, Raises: as flash_attn_func.

    Source: flash_attn.flash_attn_kvpacked_func.
    """
    k, v = arguments.unpacked("kv", kv, "batch, seqlen_k, 2, nheads_k, head_dim", 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func with q, k and v in one tensor, qkv (B, S, 3, H, D).

    Args, Returns, Raises: as flash_attn_func.

    Source: flash_attn.flash_attn_qkvpacked_func.
    """
    q, k, v = arguments.unpacked("qkv", qkv, "batch, seqlen, 3, nheads, head_dim", 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """flash_attn_func on B sequences of any lengths, 0 included, packed behind one another without padding.

    Args:
        q: (Tq, H, D). Sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k: (Tk, Hk, D); with block_table (num_blocks, block_size, Hk, D).
        v: (Tk, Hk, Dv); with block_table (num_blocks, block_size, Hk, Dv).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), running sums of the lengths, beginning with 0.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; an int or a tensor of one element.
        block_table: int32 (B, max_num_blocks_per_seq): key j of sequence b is row j % block_size of block
            block_table[b, j // block_size]. Forward only.
        The rest: as flash_attn_func, alibi_slopes (H,) or (B, H).

    Returns:
        out (Tq, H, Dv); with return_attn_probs (out, softmax_lse (H, Tq), S_dmask (B, H, max_seqlen_q, max_seqlen_k),
        0 outside the sequences, or None without dropout; not of pages).

    Raises: as flash_attn_func. The values of cu_seqlens are checked on a CPU, and elsewhere with COMPILED_FA_CHECK=1.

    Example:
        cu_seqlens = torch.tensor([0, 100, 100, 350], dtype=torch.int32)  # lengths 100, 0, 250
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 250, 250, causal=True)

    Source: flash_attn.flash_attn_varlen_func.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    q, k, v = arguments.autocast(q, k, v)
    packing = arguments.packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    options = arguments.options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return_attn_probs = validation.flag("return_attn_probs", return_attn_probs)
    drops = arguments.wants_probabilities("return_attn_probs", return_attn_probs, options, block_table)
    options = arguments.seeded(options, ops.check_packed, q, k, v, *packing)
    out: Tensor
    lse: Tensor
    out, lse = ops.varlen_attention(q, k, v, *packing, *arguments.of_op(q, options, engines.requested()))
    if not return_attn_probs:
        return out
    return out, lse, varlen_probabilities(q, k, lse, packing, *options) if drops else None


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with k and v in one tensor, kv (Tk, 2, Hk, D); q (Tq, H, D).

    Args, Returns, Raises: as flash_attn_varlen_func.

    Source: flash_attn.flash_attn_varlen_kvpacked_func.
    """
    k, v = arguments.unpacked("kv", kv, "total_k, 2, nheads_k, head_dim", 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float | None = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | Tensor = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with q, k and v in one tensor, qkv (T, 3, H, D), and one set of lengths.

    Args, Returns, Raises: as flash_attn_varlen_func.

    Source: flash_attn.flash_attn_varlen_qkvpacked_func.
    """
    q, k, v = arguments.unpacked("qkv", qkv, "total, 3, nheads, head_dim", 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
