"""Packages that need a GPU, where they are installed and support it. Written from their documented interfaces.

What they support, they are asked: a case that raises is reported as unable, with its own words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case, Direction, Inputs
from . import sdpa
from .base import Peer, Prepared, dense, not_installed, packed


def _on_gpu(module: str, case: Case, device_type: str, dtypes: tuple[str, ...]) -> str | None:
    if reason := not_installed(module):
        return reason
    if device_type != "cuda":
        return "CUDA devices only"
    return None if case.dtype_name in dtypes else f"not in {case.dtype_name}"


def _refuse_flash_attn(case: Case, direction: Direction, device_type: str) -> str | None:
    if reason := _on_gpu("flash_attn", case, device_type, ("float16", "bfloat16")):
        return reason
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0"
    return "not wired for pages" if case.page_size else None


def _prepare_flash_attn(inputs: Inputs) -> Prepared:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    case = inputs.case
    options: dict[str, Any] = {"causal": case.causal, "window_size": case.window_size, "softcap": case.softcap}
    options["alibi_slopes"] = inputs.alibi_slopes
    if case.varlen:
        arguments = (*inputs.packing, case.dropout_p)
        return packed(inputs, lambda q, k, v: flash_attn_varlen_func(q, k, v, *arguments, **options))
    checked = (lambda q, k, v: flash_attn_func(q, k, v, **options)) if case.dropout_p else None
    return dense(inputs, lambda q, k, v: flash_attn_func(q, k, v, case.dropout_p, **options), checked)


def _refuse_xformers(case: Case, direction: Direction, device_type: str) -> str | None:
    if reason := _on_gpu("xformers", case, device_type, ("float16", "bfloat16", "float32")):
        return reason
    if case.alibi or case.softcap or case.page_size or case.heads_per_key > 1 or case.window_size != (-1, -1):
        return "not wired for this feature"
    return None


def _prepare_xformers(inputs: Inputs) -> Prepared:
    from xformers.ops import fmha, memory_efficient_attention

    case = inputs.case
    if case.varlen:
        lengths_q, lengths_k = ([pair[side] for pair in case.lengths] for side in (0, 1))
        mask: Any = fmha.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
        mask = mask.make_causal_from_bottomright() if case.causal else mask
    else:
        mask = fmha.attn_bias.LowerTriangularFromBottomRightMask() if case.causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout_p)
        return out

    if case.varlen:
        q, k, v, dout = (x[None] for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        return Prepared((q, k, v), lambda q, k, v: attend(q, k, v, case.dropout_p), dout)
    checked = (lambda q, k, v: attend(q, k, v, 0.0)) if case.dropout_p else None
    return dense(inputs, lambda q, k, v: attend(q, k, v, case.dropout_p), checked)


def _refuse_turing(case: Case, direction: Direction, device_type: str) -> str | None:
    if reason := _on_gpu("flash_attn_turing", case, device_type, ("float16",)):
        return reason
    if case.head_dim not in (64, 128):
        return "head_dim 64 and 128 only"
    if case.window_size != (-1, -1) or case.softcap or case.alibi or case.dropout_p or case.page_size:
        return "has no such feature"
    return not_installed("flash_attention_interface")  # its Python side, beside the extension


def _prepare_turing(inputs: Inputs) -> Prepared:
    from flash_attention_interface import flash_attn_func, flash_attn_varlen_func

    case = inputs.case
    if case.varlen:
        packing = inputs.packing
        return packed(inputs, lambda q, k, v: flash_attn_varlen_func(q, k, v, *packing, case.causal))
    return dense(inputs, lambda q, k, v: flash_attn_func(q, k, v, case.causal))


def _refuse_noflash(case: Case, direction: Direction, device_type: str) -> str | None:
    if reason := _on_gpu("noflash_attention", case, device_type, ("float16", "bfloat16", "float32")):
        return reason
    return sdpa.refusal(case, direction, device_type)


def _prepare_noflash(inputs: Inputs) -> Prepared:
    before = F.scaled_dot_product_attention
    import noflash_attention

    F.scaled_dot_product_attention = before  # its import may put its own in that place, for every peer
    return sdpa.prepared(inputs, noflash_attention.patched_sdpa)


FLASH_ATTN = Peer(_refuse_flash_attn, _prepare_flash_attn)
XFORMERS = Peer(_refuse_xformers, _prepare_xformers)
TURING = Peer(_refuse_turing, _prepare_turing)
NOFLASH = Peer(_refuse_noflash, _prepare_noflash)
