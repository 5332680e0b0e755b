"""Every check of what a KV cache and a rotary embedding are given; wording and forms are validation.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config
from .validation import DTYPES, length, refuse, tensor

__all__ = ["keys_and_values", "queries_and_keys", "refuse", "rotary", "rotary_dim"]


def readable(*tensors: Tensor) -> bool:
    """May these be read to be checked? On a CPU, outside of tracing; elsewhere (a host sync) with COMPILED_FA_CHECK=1.

    Of tensors that stand for others, such as fake ones, there are no values.
    """
    if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False
    return all(x.device.type == "cpu" or (config.checks_values() and not x.is_meta) for x in tensors)


# Rotary


def rotary_dim(argument: str, dim: object) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0 or dim % 2:
        refuse(argument, "an even number of elements", repr(dim))


def _integers(argument: str, x: Tensor, device: torch.device, dims: str) -> None:
    tensor(argument, x, dims)
    if x.dtype not in (torch.int32, torch.int64):
        refuse(argument, "of dtype int32 or int64", x.dtype, TypeError)
    if x.device != device:
        refuse(argument, f"on x's device, {device}", x.device)


def rotary_table(cos: object, sin: object, head_dim: int, device: torch.device, names: tuple[str, str]) -> None:
    """cos and sin (positions, R / 2), R at most head_dim."""
    for argument, table in zip(names, (cos, sin), strict=True):
        found = tensor(argument, table, "positions, rotary_dim / 2")
        if not found.is_floating_point():
            refuse(argument, "of a floating point dtype", found.dtype, TypeError)
        if found.device != device:
            refuse(argument, f"on the device of what it rotates, {device}", found.device)
        if 2 * found.shape[1] > head_dim:
            refuse(argument, f"of at most head_dim / 2 = {head_dim / 2:g} columns", found.shape[1])
    if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.shape != sin.shape:
        refuse(names[1], f"of {names[0]}'s shape, {tuple(cos.shape)}", tuple(sin.shape))


def rotary(
    argument: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Arguments of apply_rotary_emb. argument: the name of x, or of what it is a part of."""
    tensor(argument, x, "batch, seqlen, nheads, head_dim" if cu_seqlens is None else "total, nheads, head_dim")
    if x.dtype not in DTYPES:
        refuse(argument, "float16, bfloat16, float32 or float64", x.dtype, TypeError)
    rotary_table(cos, sin, x.shape[-1], x.device, ("cos", "sin"))
    if cu_seqlens is not None:
        _integers("cu_seqlens", cu_seqlens, x.device, "batch + 1")
        if cu_seqlens.shape[0] < 2:
            refuse("cu_seqlens", "of batch + 1 elements, at least 2", cu_seqlens.shape[0])
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, Tensor):
        _integers("seqlen_offsets", seqlen_offsets, x.device, "batch")
        if seqlen_offsets.shape[0] != batch:
            refuse("seqlen_offsets", f"an int or of one element a sequence, {batch}", seqlen_offsets.shape[0])
    else:
        first = length("seqlen_offsets", seqlen_offsets)
        if first < 0:
            refuse("seqlen_offsets", "at least 0", first)
        if cu_seqlens is None:
            _positions(first + x.shape[1], cos.shape[0])
        elif max_seqlen is not None:
            _positions(first + length("max_seqlen", max_seqlen), cos.shape[0])
    _rotary_values(x, cos.shape[0], seqlen_offsets, cu_seqlens)


def _rotary_values(x: Tensor, rows: int, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None) -> None:
    given = [of for of in (seqlen_offsets, cu_seqlens) if isinstance(of, Tensor)]
    if not given or not readable(*given):
        return
    batch = x.shape[0]
    lengths = torch.full((batch,), x.shape[1]) if cu_seqlens is None else cu_seqlens.cpu().diff()
    if cu_seqlens is not None:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != x.shape[0] or int(lengths.min()) < 0:
            wanted = f"running sums of lengths, from 0 to x's total, {x.shape[0]}"
            refuse("cu_seqlens", wanted, cu_seqlens.tolist() if len(lengths) < 20 else f"{first} to {last}")
    offsets = seqlen_offsets.cpu() if isinstance(seqlen_offsets, Tensor) else torch.tensor([seqlen_offsets])
    if not lengths.numel():
        return
    if int(offsets.min()) < 0:
        refuse("seqlen_offsets", "at least 0", int(offsets.min()))
    ends = torch.where(lengths > 0, lengths + offsets, 0)
    _positions(int(ends.max()), rows)


def _positions(wanted: int | torch.SymInt, rows: int, argument: str = "cos") -> None:
    if wanted > rows:
        refuse(argument, f"of a row for each of {wanted} positions", f"{rows} rows")


def queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of q and k in qkv, (B, S, 3, H, D) or with the heads of all three side by side."""
    if not isinstance(qkv, Tensor) or qkv.dim() == 5:
        tensor("qkv", qkv, "batch, seqlen, 3, nheads, head_dim")
        if qkv.shape[2] != 3:
            refuse("qkv", "(batch, seqlen, 3, nheads, head_dim)", f"shape {tuple(qkv.shape)}")
        return qkv[:, :, 0], qkv[:, :, 1]
    tensor("qkv", qkv, "batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim")
    if num_heads_q is None:
        refuse("num_heads_q", "given where qkv has 4 dimensions", None)
    others = qkv.shape[2] - num_heads_q
    if num_heads_q < 1 or others < 2 or others % 2:
        refuse("num_heads_q", f"the heads of q among qkv's {qkv.shape[2]}, those of k and v the rest", num_heads_q)
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + others // 2]


def keys_and_values(kv: Tensor) -> None:
    tensor("kv", kv, "batch, seqlen, 2, nheads, head_dim")
    if kv.shape[2] != 2:
        refuse("kv", "(batch, seqlen, 2, nheads, head_dim)", f"shape {tuple(kv.shape)}")
