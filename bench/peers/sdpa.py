"""F.scaled_dot_product_attention on the same tensors, transposed; and the bandwidth of a copy, for decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Case, Direction, Inputs
from .base import Peer, Prepared, dense

LARGEST_MASK = 2 << 30  # bytes of a mask or bias
COPIED = 128 << 20  # bytes of the large copy: read once and written once


def refusal(case: Case, direction: Direction, device_type: str) -> str | None:
    if case.varlen:
        return "see SDPA padded and SDPA loop"
    if case.softcap:
        return "has no softcap"
    seqlen_q, seqlen_k = case.lengths[0]
    itemsize = case.dtype.itemsize
    if case.alibi and case.nheads * seqlen_q * seqlen_k * itemsize > LARGEST_MASK:
        return "its bias would be too large"
    if not _plain(case) and seqlen_q * seqlen_k > LARGEST_MASK:
        return "its mask would be too large"
    return None


def _plain(case: Case) -> bool:
    """Without a mask: is_causal says it, which SDPA aligns to the top left."""
    seqlen_q, seqlen_k = case.lengths[0]
    only_causal = case.causal and case.window_size == (-1, -1)
    return not case.alibi and (not case.banded or (only_causal and seqlen_q == seqlen_k))


def _mask(inputs: Inputs) -> Tensor | None:
    if _plain(inputs.case):
        return None
    visible, bias = inputs.visible(*inputs.case.lengths[0]), inputs.alibi_bias(*inputs.case.lengths[0])
    if bias is None:
        return visible
    return bias if visible is None else bias.masked_fill_(~visible, float("-inf"))


def prepared(inputs: Inputs, sdpa: Callable[..., Tensor]) -> Prepared:
    """By a function of scaled_dot_product_attention's arguments."""
    case, mask = inputs.case, _mask(inputs)
    is_causal, gqa = case.causal and mask is None, case.heads_per_key > 1

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sdpa(q, k, v, mask, dropout_p, is_causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    checked = (lambda q, k, v: attend(q, k, v, 0.0)) if case.dropout_p else None
    return dense(inputs, lambda q, k, v: attend(q, k, v, case.dropout_p), checked)


def _prepare(inputs: Inputs) -> Prepared:
    return prepared(inputs, F.scaled_dot_product_attention)


def _prepare_copy(inputs: Inputs) -> Prepared:
    """Moves COPIED bytes twice, and computes nothing: race.py scales its time to the bytes of the case's keys."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=inputs.device)
    target = torch.zeros_like(source)
    copying = dense(inputs, lambda q, k, v: target.copy_(source))
    copying.moves = 2 * COPIED
    return copying


def on_backend(backend: SDPBackend) -> Peer:
    """SDPA made to use one of its kernels; on a GPU only, where it has several to choose from."""

    def refused(case: Case, direction: Direction, device_type: str) -> str | None:
        return "on a GPU only" if device_type != "cuda" else refusal(case, direction, device_type)

    def prepare(inputs: Inputs) -> Prepared:
        plainly = _prepare(inputs)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return plainly.attend(q, k, v)

        return replace(plainly, attend=attend)

    return Peer(refused, prepare)


SDPA = Peer(refusal, _prepare)
COPY = Peer(lambda case, direction, device: None if case.max_seqlen_q == 1 else "for decoding", _prepare_copy)
