"""flash_attn's compiled extension, by the names and the order of arguments that callers of it use: flash_attn_gpu.

xformers and TransformerEngine call it instead of the functions. `fwd` and `varlen_fwd` give (out, softmax_lse, S_dmask,
rng_state), `bwd` and `varlen_bwd` (dq, dk, dv, softmax_d), `fwd_kvcache` (out, softmax_lse). Results are written into
the tensors given for them, where there are any. zero_tensors, deterministic and varlen_fwd's num_splits are accepted:
nothing depends on them. generator must be None.

Source: the bindings of flash_attn 2.7 and 2.8 (mha_fwd, mha_varlen_fwd, mha_bwd, mha_varlen_bwd, mha_fwd_kvcache).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments, validation
from ..forward_backward import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from ..kvcache import flash_attn_with_kvcache


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    return_softmax: bool,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """q (B, Sq, H, D), k and v (B, Sk, Hk, D)."""
    _no_generator(generator)
    _check_out(out, q, v)
    window = (window_size_left, window_size_right)
    results = _flash_attn_forward(
        q, k, v, p_dropout, softmax_scale, is_causal, *window, softcap, alibi_slopes, return_softmax
    )
    return _into(out, *results)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    return_softmax: bool,
    generator: torch.Generator | None = None,
    num_splits: int = 0,
) -> list[Tensor]:
    """q (Tq, H, D), k and v (Tk, Hk, D), or pages with block_table."""
    _no_generator(generator)
    _check_out(out, q, v)
    results = _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        block_table,
        leftpad_k,
        seqused_k,
    )
    return _into(out, *results)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    deterministic: bool,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """Gradients that are not given a tensor get one."""
    _no_generator(generator)
    targets = _targets((q, k, v), (dq, dk, dv))
    delta = _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *targets,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
    )
    return [*targets, delta]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    deterministic: bool,
    generator: torch.Generator | None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """Gradients that are not given a tensor get one."""
    _no_generator(generator)
    targets = _targets((q, k, v), (dq, dk, dv))
    delta = _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        *targets,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
    )
    return [*targets, delta]


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """flash_attn_with_kvcache."""
    _check_out(out, q, vcache)
    found, lse = flash_attn_with_kvcache(
        q,
        kcache,
        vcache,
        k,
        v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=seqlens_k,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=leftpad_k,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        rotary_interleaved=is_rotary_interleaved,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    return _into(out, found, lse)


def _no_generator(generator: torch.Generator | None) -> None:
    if generator is not None:
        validation.refuse("generator", "None: dropout draws from the default generator of q's device", generator)


def _check_out(out: Tensor | None, q: Tensor, v: Tensor) -> None:
    if out is not None:
        arguments.check_tensors(q=q, v=v)
        arguments.check_target("out", out, (*q.shape[:-1], v.shape[-1]), q)


def _into(out: Tensor | None, found: Tensor, *others: Tensor) -> list[Tensor]:
    return [found if out is None else out.copy_(found), *others]


def _targets(
    inputs: tuple[Tensor, Tensor, Tensor], given: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) if target is None else target for x, target in zip(inputs, given, strict=True))
    return dq, dk, dv
