"""The functions, and the private ones of that time: windows in one argument, eight results, gradients returned.

The eight are out, q, k, v, out, softmax_lse, S_dmask, rng_state: q, k, v and the second out were padded copies once.
"""

from __future__ import annotations

from types import SimpleNamespace as _SimpleNamespace
from typing import Any

from torch import Tensor

from compiled_fa import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    forward_backward,
)
from compiled_fa.drop_in import extension
from compiled_fa.forward_backward import _get_block_size_n

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "flash_attn_cuda",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# Not as typed: tuples of arguments are laid out here in between others.
_now: Any = forward_backward
_extension: Any = extension

Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float | None,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Eight:
    out, lse, probabilities, rng_state = _now._flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes, return_softmax
    )
    return out, q, k, v, out, lse, probabilities, rng_state


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Eight:
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores = (dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes)
    out, lse, probabilities, rng_state = _now._flash_attn_varlen_forward(
        q, k, v, *packing, *scores, return_softmax, block_table, leftpad_k, seqused_k
    )
    return out, q, k, v, out, lse, probabilities, rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    scores = (dropout_p, softmax_scale, causal, *window_size, softcap)
    gradients: list[Tensor] = _extension.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, *scores, deterministic, None, rng_state
    )
    return gradients


def _flash_attn_varlen_backward(
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    packing = (cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q, max_seqlen_k)
    scores = (dropout_p, softmax_scale, False, causal, *window_size, softcap)
    gradients: list[Tensor] = _extension.varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, *packing, *scores, deterministic, None, rng_state
    )
    return gradients


def _with_eight(forward: Any) -> Any:
    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Eight:
        out, lse, probabilities, rng_state = forward(q, k, v, *rest)
        return out, q, k, v, out, lse, probabilities, rng_state

    return call


flash_attn_cuda = _SimpleNamespace(
    fwd=_with_eight(_extension.fwd),
    varlen_fwd=_with_eight(_extension.varlen_fwd),
    bwd=_extension.bwd,
    varlen_bwd=_extension.varlen_bwd,
    fwd_kvcache=_extension.fwd_kvcache,
)
