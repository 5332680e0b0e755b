"""Every check of an argument, and the wording of every refusal: which argument, what is wanted, what came."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import config, forward_mode
from .problem import Packed, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 512


def refuse(argument: str, wanted: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{argument} must be {wanted}, got {got}")


def tensor_given(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        refuse(argument, "a tensor", type(value).__name__, TypeError)


def tensor(argument: str, value: object, dims: str) -> Tensor:
    """A tensor whose dimensions are those named, like "batch, seqlen, nheads, head_dim"."""
    if not isinstance(value, Tensor):
        refuse(argument, f"a tensor ({dims})", type(value).__name__, TypeError)
    if value.dim() != dims.count(",") + 1:
        refuse(argument, f"({dims})", f"shape {tuple(value.shape)}")
    return value


def _equal(argument: str, wanted: str, got: Any, want: Any) -> None:
    if got != want:
        refuse(argument, f"{wanted}, {want}", got)


def qkv(q: Tensor, k: Tensor, v: Tensor, layout: tuple[str, str], names: tuple[str, str] = ("k", "v")) -> None:
    """What q, k and v must have in common; layout: the dimensions of q, and of k and v; names: of k and v."""
    name_k, name_v = names
    tensor("q", q, layout[0])
    tensor(name_k, k, layout[1])
    tensor(name_v, v, layout[1])
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        refuse("q", "float16, bfloat16, float32 or float64", dtype, TypeError)
    for argument, other in ((name_k, k), (name_v, v)):
        if other.dtype != dtype:
            refuse(argument, f"of q's dtype, {dtype}", other.dtype, TypeError)
        if other.device != device:
            refuse(argument, f"on q's device, {device}", other.device)
    *_, nheads, head_dim = q.shape
    *rows_k, nheads_k, head_dim_k = k.shape
    *rows_v, nheads_v, head_dim_v = v.shape
    _equal(name_k, "of q's head_dim", head_dim_k, head_dim)
    if rows_v != rows_k or nheads_v != nheads_k:
        refuse(name_v, f"of {name_k}'s shape up to head_dim, {(*rows_k, nheads_k)}", (*rows_v, nheads_v))
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        refuse("q", f"of a head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if not 1 <= head_dim_v <= MAX_HEAD_DIM:
        refuse(name_v, f"of a head_dim from 1 to {MAX_HEAD_DIM}", head_dim_v)
    if nheads < 1 or nheads_k < 1 or nheads % nheads_k:
        refuse(name_k, f"of a number of heads that divides q's {nheads}", nheads_k)


def _scalar(value: Any) -> Any:
    """The Python number in a tensor or array of one element, or a NumPy number; anything else as it is."""
    if isinstance(value, (int, float, torch.SymInt)) or not hasattr(value, "tolist"):
        return value
    if isinstance(value, Tensor) and (value.is_meta or value.numel() != 1):
        return value
    found = value.tolist()
    while isinstance(found, list) and len(found) == 1:
        (found,) = found
    return found


def _known(argument: str, wanted: str, value: Any) -> None:
    """Compiled code is made for one value of it."""
    if torch.compiler.is_compiling() and hasattr(value, "tolist"):
        refuse(argument, f"{wanted} known when it is compiled", "a tensor or an array", TypeError)


def number(argument: str, value: Any) -> float:
    """A number in any form. Nothing differentiates it."""
    if isinstance(value, (float, int)):
        return value
    if isinstance(value, Tensor) and (differentiated := forward_mode.differentiated(value)) is not None:
        refuse(argument, "a number that nothing differentiates", differentiated)
    _known(argument, "a number", value)
    found = _scalar(value)
    if not isinstance(found, (float, int)):
        refuse(argument, "a number", repr(value), TypeError)
    return found


def flag(argument: str, value: Any) -> bool:
    """A truth value in any form; None: false."""
    if isinstance(value, bool):
        return value
    _known(argument, "a bool", value)
    found = _scalar(value)
    if not (found is None or isinstance(found, (bool, int, float))):
        refuse(argument, "a bool", repr(value), TypeError)
    return bool(found)


def of_bits(argument: str, value: int, bits: int = 64) -> int:
    """In eager code: as PyTorch's ints are, or elements of a tensor."""
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        refuse(argument, f"a number of {bits} bits", value)
    return value


def length(argument: str, value: Any, bits: int = 64) -> int | torch.SymInt:
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, (int, torch.SymInt)):
        refuse(argument, "an int or a tensor of one element", repr(value), TypeError)
    return of_bits(argument, found, bits) if isinstance(found, int) and not torch.compiler.is_compiling() else found


def window_size(value: Any) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """(left, right) of a pair of integers in any form."""
    wanted = "two integers, (left, right)"
    if isinstance(value, Tensor) and value.is_meta:
        refuse("window_size", wanted, "a meta tensor, which has no values")
    sides = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(sides, (tuple, list)):
        refuse("window_size", wanted, value, TypeError)
    if len(sides) != 2:
        refuse("window_size", wanted, value)
    left, right = (_scalar(side) for side in sides)
    if not (isinstance(left, (int, torch.SymInt)) and isinstance(right, (int, torch.SymInt))):
        refuse("window_size", wanted, value, TypeError)
    return left, right


def window_side(argument: str, side: int) -> None:
    if side < -1:
        refuse(argument, "-1 (unbounded) or at least 0", side)


def dropout_probability(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        refuse("dropout_p", "at least 0 and below 1", dropout_p)


def options(problem: Problem, window_left: int = -1, window_right: int = -1) -> None:
    """Everything of a call but q, k, v and where the sequences lie."""
    q, batch, softmax_scale, softcap = problem.q, problem.batch, problem.softmax_scale, problem.softcap
    dropout_p, dropout_seed, alibi_slopes = problem.dropout_p, problem.dropout_seed, problem.alibi_slopes
    if not math.isfinite(softmax_scale):
        refuse("softmax_scale", "finite", softmax_scale)
    window_side("window_size[0]", window_left)
    window_side("window_size[1]", window_right)
    if not (math.isfinite(softcap) and softcap >= 0.0):
        refuse("softcap", "finite and at least 0 (0: none)", softcap)
    dropout_probability(dropout_p)
    if dropout_p > 0.0 and dropout_seed is None:
        refuse("dropout_seed", "an int64 tensor of one element where dropout_p > 0", None)
    if dropout_seed is not None:
        if dropout_seed.dtype != torch.int64:
            refuse("dropout_seed", "of dtype int64", dropout_seed.dtype, TypeError)
        if dropout_seed.numel() != 1:
            refuse("dropout_seed", "of one element", f"shape {tuple(dropout_seed.shape)}")
        if dropout_seed.device != q.device:
            refuse("dropout_seed", f"on q's device, {q.device}", dropout_seed.device)
    if alibi_slopes is not None:
        if alibi_slopes.dtype != torch.float32:
            refuse("alibi_slopes", "of dtype float32", alibi_slopes.dtype, TypeError)
        if alibi_slopes.device != q.device:
            refuse("alibi_slopes", f"on q's device, {q.device}", alibi_slopes.device)
        nheads = q.shape[-2]
        if tuple(alibi_slopes.shape) not in ((nheads,), (batch, nheads)):
            refuse(
                "alibi_slopes",
                f"of shape (nheads,) = ({nheads},) or (batch, nheads) = ({batch}, {nheads})",
                tuple(alibi_slopes.shape),
            )


def numbers(given: Tensor) -> None:
    """softmax_scale, softcap and dropout_p, as compiled code hands them to an op."""
    wanted = "(softmax_scale, softcap, dropout_p), float64 (3,) on a CPU"
    if given.dtype != torch.float64 or tuple(given.shape) != (3,) or given.device.type != "cpu":
        refuse("numbers", wanted, f"{given.dtype} {tuple(given.shape)} on {given.device}")


def bias(problem: Problem, given: Tensor) -> None:
    """A bias of a dense call's scores."""
    q = problem.q
    tensor_given("bias", given)
    if given.dtype not in (torch.bool, *DTYPES):
        refuse("bias", "bool, float16, bfloat16, float32 or float64", given.dtype, TypeError)
    if given.device != q.device:
        refuse("bias", f"on q's device, {q.device}", given.device)
    scores = q.shape[0], q.shape[2], q.shape[1], problem.k.shape[1]
    sizes = (1,) * (4 - given.dim()) + tuple(given.shape)
    if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, scores, strict=True)):
        wanted = f"broadcastable to (batch, nheads, seqlen_q, seqlen_k), {scores}"
        refuse("bias", wanted, f"shape {tuple(given.shape)}")


def sinks(q: Tensor, given: Tensor) -> None:
    """One a query head."""
    tensor("sinks", given, "nheads")
    if given.dtype not in DTYPES:
        refuse("sinks", "float16, bfloat16, float32 or float64", given.dtype, TypeError)
    if given.device != q.device:
        refuse("sinks", f"on q's device, {q.device}", given.device)
    if q.dim() > 2:
        _equal("sinks", "of q's heads", given.shape[0], q.shape[-2])


def packing(q: Tensor, packed: Packed) -> None:
    """What can be told of where sequences lie without reading a tensor."""
    cu_seqlens_q, cu_seqlens_k, block_table = packed.cu_seqlens_q, packed.cu_seqlens_k, packed.block_table
    for argument, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        tensor(argument, cu_seqlens, "batch + 1")
        if cu_seqlens.dtype != torch.int32:
            refuse(argument, "of dtype int32", cu_seqlens.dtype, TypeError)
        if cu_seqlens.device != q.device:
            refuse(argument, f"on q's device, {q.device}", cu_seqlens.device)
        if cu_seqlens.shape[0] < 1:
            refuse(argument, "of batch + 1 elements", "none")
    _equal("cu_seqlens_k", "of as many elements as cu_seqlens_q", cu_seqlens_k.shape[0], cu_seqlens_q.shape[0])
    for argument, longest in (("max_seqlen_q", packed.max_seqlen_q), ("max_seqlen_k", packed.max_seqlen_k)):
        if longest < 0:
            refuse(argument, "at least 0", longest)
    if block_table is not None:
        tensor("block_table", block_table, "batch, max_num_blocks_per_seq")
        if block_table.dtype != torch.int32:
            refuse("block_table", "of dtype int32", block_table.dtype, TypeError)
        if block_table.device != q.device:
            refuse("block_table", f"on q's device, {q.device}", block_table.device)
        _equal("block_table", "of one row a sequence", block_table.shape[0], cu_seqlens_q.shape[0] - 1)


def packed_values(q: Tensor, k: Tensor, packed: Packed) -> None:
    """What must be read to be told: on a CPU always, elsewhere (a host sync) where COMPILED_FA_CHECK=1."""
    if q.device.type == "cpu" or config.checks_values():
        packed_values_read(q, k, packed)


def packed_values_read(q: Tensor, k: Tensor, packed: Packed) -> None:
    """The same for a call that reads them anyway."""
    packed_lengths(q, k, packed)
    if packed.block_table is not None:
        packed_blocks(k, packed, packed.block_table)


def packed_lengths(q: Tensor, k: Tensor, packed: Packed) -> None:
    """The lengths of sequences, and that they have room in the block table."""
    # As lists: a dozen operations on small tensors would take longer than a short call.
    (sums_q, sums_k), block_table = packed.host_sums, packed.block_table
    _lengths("cu_seqlens_q", sums_q, "max_seqlen_q", packed.max_seqlen_q)
    longest_k = _lengths("cu_seqlens_k", sums_k, "max_seqlen_k", packed.max_seqlen_k)
    if sums_q[-1] != q.shape[0]:
        refuse("cu_seqlens_q", f"q's total, {q.shape[0]}, at its end", sums_q[-1])
    if block_table is None:
        if sums_k[-1] != k.shape[0]:
            refuse("cu_seqlens_k", f"k's total, {k.shape[0]}, at its end", sums_k[-1])
    elif longest_k > block_table.shape[1] * k.shape[1]:
        refuse("block_table", f"of enough blocks of {k.shape[1]} for {longest_k} keys", block_table.shape[1])


def packed_blocks(k: Tensor, packed: Packed, block_table: Tensor) -> None:
    """The numbers of the blocks in use."""
    # Most tables hold nothing but blocks; else what lies behind a sequence's last one may be anything.
    num_blocks, block_size = k.shape[0], k.shape[1]
    if not blocks(block_table, num_blocks):
        first_row = torch.arange(block_table.shape[1], device=k.device) * block_size
        used = block_table[first_row < packed.cu_seqlens_k.diff()[:, None]]
        if not blocks(used, num_blocks):
            refuse(
                "block_table", f"block numbers from 0 to {num_blocks - 1}", f"{int(used.min())} to {int(used.max())}"
            )


def blocks(numbers: Tensor, count: int) -> bool:
    """Are all of them numbers of blocks?"""
    least, greatest = numbers.aminmax() if numbers.numel() else (0, -1)
    return int(least) >= 0 and int(greatest) < count


def _lengths(argument: str, sums: list[int], name_of_bound: str, bound: int) -> int:
    """Check the running sums of lengths -> the longest."""
    if sums[0] != 0:
        refuse(argument, "0 at its beginning", sums[0])
    lengths = [stop - start for start, stop in pairwise(sums)]
    if min(lengths, default=0) < 0:
        at = next(at for at, length in enumerate(lengths) if length < 0)
        refuse(argument, "not decreasing", f"{sums[at]} before {sums[at + 1]} at {at}")
    longest = max(lengths, default=0)
    if longest > bound:
        refuse(name_of_bound, f"at least the longest length in {argument}, {longest}", bound)
    return longest


def _given(problem: Problem, argument: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A result of the call that a derivative is taken of, or a derivative."""
    if not isinstance(given, Tensor):  # the dispatcher lets None through
        refuse(argument, "a tensor", type(given).__name__, TypeError)
    if tuple(given.shape) != shape:
        refuse(argument, f"of shape {shape}", tuple(given.shape))
    if given.dtype != dtype:
        refuse(
            argument,
            f"of q's dtype, {dtype}" if dtype == problem.q.dtype else f"of dtype {dtype}",
            given.dtype,
            TypeError,
        )
    if given.device != problem.q.device:
        refuse(argument, f"on q's device, {problem.q.device}", given.device)


def _results(problem: Problem, like_out: dict[str, Tensor], like_lse: dict[str, Tensor]) -> None:
    q, v = problem.q, problem.v
    for argument, given in like_out.items():
        _given(problem, argument, given, (*q.shape[:-1], v.shape[-1]), q.dtype)
    for argument, given in like_lse.items():
        _given(problem, argument, given, (*q.shape[:-3], q.shape[-2], q.shape[-3]), problem.lse_dtype)


def backward(problem: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """What a backward op is given besides its forward's arguments."""
    if problem.packed is not None and problem.packed.block_table is not None:
        raise RuntimeError("attention with a block_table is forward only: paged keys and values have no gradient")
    _results(problem, {"dout": dout, "out": out}, {"lse": lse} if dlse is None else {"lse": lse, "dlse": dlse})


def jvp(problem: Problem, q_tangent: Tensor, k_tangent: Tensor, v_tangent: Tensor, out: Tensor, lse: Tensor) -> None:
    """What a jvp op is given besides its forward's arguments."""
    if problem.packed is not None and problem.packed.block_table is not None:
        raise NotImplementedError("attention with a block_table does not support forward-mode AD")
    tangents = {
        "q_tangent": (q_tangent, problem.q),
        "k_tangent": (k_tangent, problem.k),
        "v_tangent": (v_tangent, problem.v),
    }
    for argument, (tangent, primal) in tangents.items():
        _given(problem, argument, tangent, tuple(primal.shape), primal.dtype)
    _results(problem, {"out": out}, {"lse": lse})
