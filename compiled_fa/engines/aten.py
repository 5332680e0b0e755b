"""The aten engine: on a CPU, rectangles and triangles of plain scores go to PyTorch's own flash kernel.

The kernel knows a scale, "every query sees every key", and causal in a square; nothing of it is compiled at first use.
What it gives for parts of the keys is merged by lse. Everything else of a score program is for the other engines.

Private API: aten::_scaled_dot_product_flash_attention_for_cpu and its backward, the kernel below
F.scaled_dot_product_attention, which gives lse too. Tried with torch 2.13.0; where it is missing, the tiled engine
serves in its place, and a warning says so once.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hardware import fast_bfloat16
from ..inductor import say_once
from ..problem import Direction, Packed, Problem
from ..scores import Window

_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)

WIDENED_BYTES = 32 << 20  # of fp32 copies at a time, where half precision is computed in fp32
LONG = 96  # mean tokens of packed sequences from which a call for each of them pays
FEW = 256  # tokens up to which nothing beats a single call
DECODING, MANY = 4, 4096  # queries up to which, and keys from which, tiles read keys faster

EVERYTHING, CAUSAL = Window(), Window(right=0)

Gradients = tuple[Tensor, Tensor, Tensor]


def why_not(device: torch.device, problem: Problem | None = None) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if device.type != "cpu":
        return f"its kernel is for CPUs, and this is {device.type}"
    if _forward is None or _backward is None:
        reason = f"torch {torch.__version__} does not have its kernel"
        say_once(f"not the aten engine on a CPU: {reason}")
        return reason
    if problem is None:
        return None
    if problem.softcap or problem.alibi_slopes is not None or problem.dropout_p:
        return "its kernel has no softcap, ALiBi or dropout of ours"
    if problem.window_in_force not in (EVERYTHING, CAUSAL):
        return "its kernel has no window but causal"
    if not problem.softmax_scale > 0.0:
        return "its kernel multiplies the -inf of masked scores by softmax_scale, which must be positive"
    if problem.packed is not None and problem.packed.block_table is not None:
        return "its kernel does not read pages"
    if problem.q.shape[-1] != problem.v.shape[-1]:
        return "its kernel wants one head_dim for q, k and v"
    return None


def slower(problem: Problem, direction: Direction) -> bool:
    """Is another engine faster at a call that this one could serve? As measured: bench/NOTES.md."""
    q, k, packed = problem.q, problem.k, problem.packed
    sequences = 1 if packed is None else max(1, problem.batch)
    seqlen_q, seqlen_k = q.shape[-3] // sequences, k.shape[-3] // sequences  # on average
    if packed is not None and max(seqlen_q, seqlen_k) < LONG:
        return True  # short sequences side by side
    half = q.dtype == torch.bfloat16 and fast_bfloat16()
    if direction == "backward":
        return half or (seqlen_q > FEW and problem.window_in_force != EVERYTHING)
    return seqlen_k >= (FEW if half else MANY) and (half or seqlen_q <= DECODING)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q, and lse, (B, H, Sq) or, packed, (H, T)."""
    q, k, v, packed = problem.q, problem.k, problem.v, problem.packed
    if packed is None:
        return _attend(problem, q, k, v)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=problem.lse_dtype)
    for queries, keys in _sequences(packed):
        one_out, one_lse = _attend(problem, q[None, queries], k[None, keys], v[None, keys])
        out[queries] = one_out[0]
        lse[:, queries] = one_lse[0]
    return out, lse


def backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None) -> Gradients:
    """-> dq, dk, dv, from the lse given, which may be merged over more keys than these; dlse: its gradient, or None."""
    q, k, v, packed = problem.q, problem.k, problem.v, problem.packed
    if packed is None:
        return _differentiate(problem, (q, dout, out), (k, v), lse, dlse)
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for queries, keys in _sequences(packed):
        one = _differentiate(
            problem,
            (q[None, queries], dout[None, queries], out[None, queries]),
            (k[None, keys], v[None, keys]),
            lse[None, :, queries],
            dlse[None, :, queries] if dlse is not None else None,
        )
        for gradient, rows, of_one in zip(gradients, (queries, keys, keys), one, strict=True):
            gradient[rows] = of_one[0]
    return gradients


def _sequences(packed: Packed) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of every sequence."""
    cu_seqlens_q, cu_seqlens_k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
    for b in range(len(cu_seqlens_q) - 1):
        yield slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])


class Part(NamedTuple):
    """What the kernel can do at once: queries from `first` to the last, against keys `first_key` to `last_key`."""

    first: int
    first_key: int
    last_key: int
    causal: bool


def _parts(problem: Problem, q: Tensor, k: Tensor) -> list[Part]:
    """Of tensors (B, S, H, D). Causal, aligned to the bottom right, is a triangle on the last keys, and a rectangle on
    those that lie before all queries; queries that lie before all keys see none."""
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if not (batch and seqlen_q and seqlen_k):
        return []
    if problem.window_in_force.right is None:
        return [Part(0, 0, seqlen_k, False)]
    before = seqlen_k - seqlen_q
    if before <= 0:
        return [Part(-before, 0, seqlen_k, True)]
    return [Part(0, before, seqlen_k, True), Part(0, 0, before, False)]


def _whole(parts: list[Part]) -> bool:
    """Is everything one part? (A part alone has all keys.)"""
    return len(parts) == 1 and parts[0].first == 0


def _kernels_layout(x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B, H, S, D). The kernel takes any strides but of head_dim, which it believes to be 1."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _pieces(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Sequences, query heads and key heads whose copies in fp32 are within WIDENED_BYTES, or one key head's."""
    batch, nheads_k = k.shape[0], k.shape[2]
    heads_per_key = q.shape[2] // nheads_k
    bytes_per_head = 4 * (q[0].numel() + 2 * k[0].numel()) // nheads_k if batch else 1
    heads = max(1, min(nheads_k, WIDENED_BYTES // max(1, bytes_per_head)))
    sequences = max(1, WIDENED_BYTES // max(1, bytes_per_head * nheads_k))
    for first in range(0, batch, sequences):
        for head in range(0, nheads_k, heads):
            stop = min(head + heads, nheads_k)
            yield slice(first, first + sequences), slice(head * heads_per_key, stop * heads_per_key), slice(head, stop)


def _attend(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) -> out and lse (B, H, Sq)."""
    if q.dtype != torch.float16:
        return _attend_by_parts(problem, q, k, v)
    # In fp16 the kernel takes twice the time that it takes in fp32.
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=problem.lse_dtype)
    for sequences, heads, heads_k in _pieces(q, k):
        queries, keys = (sequences, slice(None), heads), (sequences, slice(None), heads_k)
        out[queries], lse[sequences, heads] = _attend_by_parts(
            problem, q[queries].float(), k[keys].float(), v[keys].float()
        )
    return out, lse


def _attend_by_parts(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts, scale = _parts(problem, q, k), problem.softmax_scale
    queries, keys, values = _kernels_layout(q), _kernels_layout(k), _kernels_layout(v)
    if _whole(parts):
        out, lse = _forward(queries, keys, values, 0.0, parts[0].causal, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -inf, dtype=problem.lse_dtype)
    for first, *span, causal in parts:
        seen = slice(*span)
        part_out, part_lse = _forward(
            queries[:, :, first:], keys[:, :, seen], values[:, :, seen], 0.0, causal, scale=scale
        )
        merged = torch.logaddexp(lse[:, :, first:], part_lse)
        old, new = ((x - merged).exp().mT[..., None] for x in (lse[:, :, first:], part_lse))
        out[:, first:] = old * out[:, first:] + new * part_out.transpose(1, 2)
        lse[:, :, first:] = merged
    return out, lse


def _differentiate(
    problem: Problem,
    of_queries: tuple[Tensor, Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    lse: Tensor,
    dlse: Tensor | None,
) -> Gradients:
    """-> dq, dk, dv (B, S, H, D); of_queries: q, dout and out; of_keys: k and v."""
    q, k = of_queries[0], of_keys[0]
    if q.dtype != torch.float16 and dlse is None:
        return _differentiate_by_parts(problem, of_queries, of_keys, lse)
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
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
            problem, (piece_q, piece_dout, piece_out), (piece_k, piece_v), lse[sequences, heads]
        )
        for gradient, rows, of_piece in zip(gradients, (queries, keys, keys), piece, strict=True):
            gradient[rows] = of_piece[..., : gradient.shape[-1]]
    return gradients


def _differentiate_by_parts(
    problem: Problem, of_queries: tuple[Tensor, Tensor, Tensor], of_keys: tuple[Tensor, Tensor], lse: Tensor
) -> Gradients:
    parts, scale = _parts(problem, of_queries[0], of_keys[0]), problem.softmax_scale
    q, dout, out = (_kernels_layout(x) for x in of_queries)
    k, v = (_kernels_layout(x) for x in of_keys)
    if _whole(parts):
        dq, dk, dv = _backward(dout, q, k, v, out, lse, 0.0, parts[0].causal, scale=scale)
    else:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, *span, causal in parts:
            seen = slice(*span)
            part_q, part_dout, part_out = (x[:, :, first:] for x in (q, dout, out))
            part_k, part_v, part_lse = k[:, :, seen], v[:, :, seen], lse[:, :, first:]
            part = _backward(part_dout, part_q, part_k, part_v, part_out, part_lse, 0.0, causal, scale=scale)
            for gradient, added in zip((dq[:, :, first:], dk[:, :, seen], dv[:, :, seen]), part, strict=True):
                gradient += added
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()
