"""The six flash_attn functions: the names, argument order and defaults of flash_attn 2.8's interface.

They bring arguments into the form that the ops take, and compute nothing themselves.

B batch, Sq and Sk lengths, H and Hk query and key heads, D and Dv head_dims of q, k and of v, T total tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import engines, ops, seed, validation
from .probabilities import dense_probabilities, varlen_probabilities
from .problem import Options

# Any is the tuple that return_attn_probs asks for; named, everybody who does not ask for it would have to rule it out.
Result = Tensor | Any

# Below half the resolution of a keep decision (2**-32) nothing is ever dropped. Some callers pass 1e-30.
NO_DROPOUT = 2.0**-33


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
        fp32 (fp64 for fp64 inputs); S_dmask (B, H, Sq, Sk), negative where dropped, or None without dropout.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: the engine asked for by name cannot serve this device.

    Example:
        out = flash_attn_func(q, k, v, causal=True)

    Source: FlashAttention-2 (arXiv 2307.08691); flash_attn.flash_attn_func.
    """
    _check_tensors(q=q, k=k, v=v)
    q, k, v = _autocast(q, k, v)
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options = _seeded(options, ops.check_dense, q, k, v)
    out: Tensor
    lse: Tensor
    out, lse = ops.attention(q, k, v, *options, engines.requested())
    if not validation.flag("return_attn_probs", return_attn_probs):
        return out
    return out, lse, dense_probabilities(q, k, lse, *options) if options.dropout_seed is not None else None


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
    k, v = _unpacked("kv", kv, "batch, seqlen_k, 2, nheads_k, head_dim", 2)
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
    q, k, v = _unpacked("qkv", qkv, "batch, seqlen, 3, nheads, head_dim", 3)
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
        0 outside the sequences, or None without dropout).

    Raises: as flash_attn_func. The values of cu_seqlens are checked on a CPU, and elsewhere with COMPILED_FA_CHECK=1.

    Example:
        cu_seqlens = torch.tensor([0, 100, 100, 350], dtype=torch.int32)  # lengths 100, 0, 250
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 250, 250, causal=True)

    Source: flash_attn.flash_attn_varlen_func.
    """
    _check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if block_table is not None:
        _check_tensors(block_table=block_table)
    q, k, v = _autocast(q, k, v)
    paged = block_table is not None
    packing = (
        cu_seqlens_q,
        cu_seqlens_k,
        _length("max_seqlen_q", max_seqlen_q, q.shape[0]),
        _length("max_seqlen_k", max_seqlen_k, k.shape[0] * k.shape[1] if paged else k.shape[0]),
        block_table,
    )
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    options = _seeded(options, ops.check_packed, q, k, v, *packing)
    out: Tensor
    lse: Tensor
    out, lse = ops.varlen_attention(q, k, v, *packing, *options, engines.requested())
    if not validation.flag("return_attn_probs", return_attn_probs):
        return out
    return out, lse, varlen_probabilities(q, k, lse, packing, *options) if options.dropout_seed is not None else None


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
    k, v = _unpacked("kv", kv, "total_k, 2, nheads_k, head_dim", 2)
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
    q, k, v = _unpacked("qkv", qkv, "total, 3, nheads, head_dim", 3)
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


def _check_tensors(**tensors: object) -> None:
    for argument, value in tensors.items():
        validation.tensor_given(argument, value)


def _unpacked(argument: str, packed: Tensor, dims: str, parts: int) -> tuple[Tensor, ...]:
    """Views of q, k, v out of the packed tensor's third-last dimension."""
    validation.tensor(argument, packed, dims)
    if packed.shape[-3] != parts:
        validation.refuse(argument, f"({dims})", f"shape {tuple(packed.shape)}")
    return packed.unbind(-3)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast all three take its dtype, as F.scaled_dot_product_attention's do; fp64 stays."""
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # which has no autocast, and asked for it raises
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (q, k, v))
    return q, k, v


def _length(argument: str, length: Any, total: int) -> int | torch.SymInt:
    """A length as an int. To read it off another device would wait for that device, and to read it in compiled code
    would make it a symbol; the total bounds it as well."""
    if isinstance(length, Tensor):
        if length.numel() != 1:
            validation.refuse(argument, "an int or a tensor of one element", f"shape {tuple(length.shape)}")
        if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            validation.refuse(argument, "an int or a tensor of one integer", length.dtype, TypeError)
        if length.device.type != "cpu":
            return total
    if torch.compiler.is_compiling() and not isinstance(length, (int, torch.SymInt)) and hasattr(length, "tolist"):
        return total  # NumPy's numbers, too, are tensors there
    return validation.length(argument, length)


def _options(
    dropout_p: float | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Options:
    """The ops' options, but for dropout's seed."""
    left, right = cast("tuple[int, int]", validation.window_size(window_size))  # or symbols of numbers
    scale = None if softmax_scale is None else validation.number("softmax_scale", softmax_scale)
    cap = 0.0 if softcap is None else validation.number("softcap", softcap)
    dropout_p = 0.0 if dropout_p is None else validation.number("dropout_p", dropout_p)
    validation.dropout_probability(dropout_p)
    if alibi_slopes is not None:
        _check_tensors(alibi_slopes=alibi_slopes)
    if dropout_p < NO_DROPOUT:
        dropout_p = 0.0
    return Options(scale, validation.flag("causal", causal), left, right, cap, alibi_slopes, dropout_p)


def _seeded(options: Options, check: Callable[..., None], q: Tensor, k: Tensor, v: Tensor, *packing: Any) -> Options:
    """With a seed from the device's generator, where there is dropout; a call that is refused draws none."""
    if not options.dropout_p:
        return options
    if not torch.compiler.is_compiling():
        check(q, k, v, *packing, *options._replace(dropout_p=0.0))
    return options._replace(dropout_seed=seed.drawn(q, k, v))
