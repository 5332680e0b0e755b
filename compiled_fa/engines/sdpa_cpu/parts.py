"""Attention on (B, S, H, D) by the parts that PyTorch's kernel can do, merged by lse."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ...memory import new_empty
from ...problem import Problem, bias_part
from ...tuning import current
from . import kernel

Gradients = tuple[Tensor, Tensor, Tensor]


class Part(NamedTuple):
    """What the kernel can do at once: queries from `first` to the last, against keys `first_key` to `last_key`."""

    first: int
    first_key: int
    last_key: int
    causal: bool


def is_causal(problem: Problem, q: Tensor, k: Tensor) -> bool:
    """Does the call's window hide anything from these queries, (B, S, H, D)? From a single one it does not."""
    return problem.window_in_force.in_force(q.shape[1], k.shape[1]).right is not None


def at_once(problem: Problem, q: Tensor, k: Tensor) -> bool:
    """Can the kernel do tensors (B, S, H, D) as they are?"""
    batch, seqlen_q, *_ = q.shape
    seqlen_k = k.shape[1]
    return bool(batch and seqlen_q and seqlen_k) and (seqlen_q == seqlen_k or not is_causal(problem, q, k))


def _parts(q: Tensor, k: Tensor) -> list[Part]:
    """Of causal attention, aligned to the bottom right: a triangle on the last keys, and a rectangle on those that lie
    before all queries; queries that lie before all keys see none."""
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if not (batch and seqlen_q and seqlen_k):
        return []
    before = seqlen_k - seqlen_q
    if before < 0:
        return [Part(-before, 0, seqlen_k, True)]
    return [Part(0, before, seqlen_k, True), Part(0, 0, before, False)]


def _kernels_layout(x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B, H, S, D). The kernel takes any strides but of head_dim, which it believes to be 1."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _added(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """The call's bias as the kernel takes it: floating point, and of size 1 where it is expanded."""
    if problem.bias is None:
        return None
    bias = problem.bias[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in problem.bias.stride())]
    if bias.dtype == torch.bool:
        return torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill_(~bias, -inf)
    return bias.to(dtype)


def _pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Sequences, query heads and key heads whose copies in fp32 are few enough at a time, or one key head's."""
    most = current().sdpa_cpu.widened_bytes
    batch, nheads_k = k.shape[0], k.shape[2]
    heads_per_key = q.shape[2] // nheads_k
    bytes_per_head = 4 * (q[0].numel() + 2 * k[0].numel()) // nheads_k if batch else 1
    heads = max(1, min(nheads_k, most // max(1, bytes_per_head)))
    sequences = max(1, most // max(1, bytes_per_head * nheads_k))
    for first in range(0, batch, sequences):
        for head in range(0, nheads_k, heads):
            stop = min(head + heads, nheads_k)
            yield slice(first, first + sequences), slice(head * heads_per_key, stop * heads_per_key), slice(head, stop)


def is_one_piece(q: Tensor, k: Tensor) -> bool:
    return len(list(_pieces(q, k))) == 1


def widens(q: Tensor) -> bool:
    """Is forward computed in fp32, in pieces? In fp16 the kernel takes twice the time that it takes in fp32; in bf16 it
    depends on the CPU."""
    return q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and current().sdpa_cpu.widens_bf16)


def widens_backward(q: Tensor) -> bool:
    """Is backward? Every block of queries, and every query head that reads a key head, adds to a gradient in the
    kernel's dtype: in 16 bits such a sum loses more with each of them."""
    return q.dtype in (torch.float16, torch.bfloat16)


def attend(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) -> out and lse (B, H, Sq)."""
    if not widens(q):
        return _attend_by_parts(problem, q, k, v)
    if is_one_piece(q, k):
        wide_out, wide_lse = _attend_by_parts(problem, q.float(), k.float(), v.float())
        return wide_out.to(q.dtype), wide_lse
    out = new_empty(q, q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=problem.lse_dtype)
    for sequences, heads, heads_k in _pieces(q, k):
        queries, keys = (sequences, slice(None), heads), (sequences, slice(None), heads_k)
        out[queries], lse[sequences, heads] = _attend_by_parts(
            problem, q[queries].float(), k[keys].float(), v[keys].float()
        )
    return out, lse


def attend_at_once(
    causal: bool, softmax_scale: float, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, S, H, D), and a bias as `_added` gives it -> out and lse (B, H, Sq)."""
    queries, keys, values = _kernels_layout(q), _kernels_layout(k), _kernels_layout(v)
    out, lse = kernel.forward(queries, keys, values, causal, softmax_scale, bias)
    if bias is not None:  # the kernel says 0 of rows that see nothing
        lse = torch.where(bias.amax(-1) == -inf, -inf, lse)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def attend_at_once_widened(
    causal: bool, softmax_scale: float, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Likewise, computed in fp32."""
    out, lse = attend_at_once(causal, softmax_scale, q.float(), k.float(), v.float())
    return out.to(q.dtype), lse


def _attend_by_parts(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scale = problem.softmax_scale
    if at_once(problem, q, k):
        return attend_at_once(is_causal(problem, q, k), scale, q, k, v, _added(problem, q.dtype))
    queries, keys, values = _kernels_layout(q), _kernels_layout(k), _kernels_layout(v)
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -inf, dtype=problem.lse_dtype)
    for first, *span, causal in _parts(q, k):
        seen = slice(*span)
        part_out, part_lse = kernel.forward(queries[:, :, first:], keys[:, :, seen], values[:, :, seen], causal, scale)
        merged = torch.logaddexp(lse[:, :, first:], part_lse)
        old, new = ((x - merged).exp().mT[..., None] for x in (lse[:, :, first:], part_lse))
        out[:, first:] = old * out[:, first:] + new * part_out.transpose(1, 2)
        lse[:, :, first:] = merged
    return out, lse


def differentiate(
    problem: Problem,
    of_queries: tuple[Tensor, Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    lse: Tensor,
    dlse: Tensor | None,
) -> Gradients:
    """-> dq, dk, dv (B, S, H, D); of_queries: q, dout and out; of_keys: k and v."""
    q, k = of_queries[0], of_keys[0]
    if not widens_backward(q) and dlse is None:
        return _differentiate_by_parts(problem, of_queries, of_keys, lse)
    gradients = new_empty(q, q.shape), new_empty(k, k.shape), new_empty(k, k.shape)
    for sequences, heads, heads_k in _pieces(q, k):
        queries, keys = (sequences, slice(None), heads), (sequences, slice(None), heads_k)
        wide = problem.lse_dtype
        piece_q, piece_dout, piece_out = (x[queries].to(wide) for x in of_queries)
        piece_k, piece_v = (x[keys].to(wide) for x in of_keys)
        if dlse is not None:
            # rowsum(dO * O) - dlse: one more column, 1 in dO and -dlse in O. It meets zeros everywhere else.
            column = dlse[sequences, heads].mT[..., None].to(wide)
            piece_q, piece_k, piece_v = (torch.nn.functional.pad(x, (0, 1)) for x in (piece_q, piece_k, piece_v))
            piece_dout = torch.cat([piece_dout, torch.ones_like(column)], -1)
            piece_out = torch.cat([piece_out, -column], -1)
        piece = _differentiate_by_parts(
            problem, (piece_q, piece_dout, piece_out), (piece_k, piece_v), lse[sequences, heads], (sequences, heads)
        )
        for gradient, rows, of_piece in zip(gradients, (queries, keys, keys), piece, strict=True):
            gradient[rows] = of_piece[..., : gradient.shape[-1]]
    return gradients


def _differentiate_by_parts(
    problem: Problem,
    of_queries: tuple[Tensor, Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    lse: Tensor,
    piece: tuple[slice, slice] = (slice(None), slice(None)),
) -> Gradients:
    """piece: the sequences and query heads that these are of the call's."""
    scale = problem.softmax_scale
    q, dout, out = (_kernels_layout(x) for x in of_queries)
    k, v = (_kernels_layout(x) for x in of_keys)
    if at_once(problem, of_queries[0], of_keys[0]):
        bias = _added(problem, q.dtype)
        if bias is not None:
            bias, lse = bias_part(bias, *piece, slice(None), slice(None)), lse.masked_fill(lse == -inf, inf)
        causal = is_causal(problem, of_queries[0], of_keys[0])
        dq, dk, dv = kernel.backward((q, dout, out), (k, v), lse, causal, scale, bias)
    else:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, *span, causal in _parts(of_queries[0], of_keys[0]):
            seen = slice(*span)
            q_part, dout_part, out_part = (x[:, :, first:] for x in (q, dout, out))
            some_keys = k[:, :, seen], v[:, :, seen]
            part = kernel.backward((q_part, dout_part, out_part), some_keys, lse[:, :, first:], causal, scale)
            for gradient, added in zip((dq[:, :, first:], dk[:, :, seen], dv[:, :, seen]), part, strict=True):
                gradient += added
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()
