"""Forward and backward as functions of their own, with lse and dropout's state in the open: flash_attn's private names.

    _flash_attn_forward         _flash_attn_backward           q (B, Sq, H, D), lse (B, H, Sq)
    _flash_attn_varlen_forward  _flash_attn_varlen_backward    q (Tq, H, D), lse (H, Tq)

Ring attention, context parallelism and operators of others call them, and merge out and lse over several calls between
the two: backward recomputes probabilities from the lse that it is given, and takes delta = rowsum(dout · out) of the
out that it is given. Signatures are those of flash_attn 2.7 and 2.8, by which some callers look for arguments.

rng_state: int64 (2,): dropout's seed, and 0. The backward that is given it drops what its forward dropped.

Source: flash_attn.flash_attn_interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, engines, ops, validation
from .padding import reads_values, running_sums
from .probabilities import dense_probabilities, varlen_probabilities
from .problem import Options, lse_dtype


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flash_attn_func's forward.

    Returns:
        (out, softmax_lse, S_dmask, rng_state): softmax_lse fp32 (fp64 for fp64 inputs), a natural logarithm; S_dmask
        (B, H, Sq, Sk), negative where dropped, with return_softmax and dropout, else of no elements.

    Raises: as flash_attn_func.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    window = (window_size_left, window_size_right)
    options = arguments.options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    drops = arguments.wants_probabilities("return_softmax", return_softmax, options)
    options = arguments.seeded(options, ops.check_dense, q, k, v)
    out, lse = ops.attention(q, k, v, *options, engines.requested())
    return out, lse, dense_probabilities(q, k, lse, *options) if drops else q.new_empty(0), _rng_state(q, options)


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
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The gradients, written into dq, dk and dv, of any strides; None: that one is not wanted.

    Returns:
        delta, rowsum(dout · out), as softmax_lse: fp32 (B, H, Sq).

    Raises: as flash_attn_func, and before anything is written.
    """
    arguments.check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
    window = (window_size_left, window_size_right)
    options = arguments.options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    options = _given_seed(options, rng_state, q)
    targets = _checked_targets((q, k, v), (dq, dk, dv))
    lse = softmax_lse.to(lse_dtype(q.dtype))
    gradients = ops.attention_backward(dout, None, out, lse, q, k, v, *options, engines.requested())
    _write(targets, gradients)
    return _delta(dout, out, lse)


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
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """flash_attn_varlen_func's forward.

    Args:
        seqused_k: int32 (B,): only so many of a sequence's keys count, and the last query stands at the last of them.
        leftpad_k: int32 (B,): the first so many keys do not count. Not with block_table.
        zero_tensors, num_splits: accepted; nothing depends on them.

    Without block_table the keys that count are copied, and on a GPU the host waits for their number.

    Returns:
        (out, softmax_lse, S_dmask, rng_state): as _flash_attn_forward, softmax_lse (H, Tq).

    Raises: as flash_attn_varlen_func.
    """
    arguments.check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if leftpad_k is not None or seqused_k is not None:
        k, v, cu_seqlens_k = _keys_that_count(k, v, cu_seqlens_k, block_table, leftpad_k, seqused_k)
    packing = arguments.packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    window = (window_size_left, window_size_right)
    options = arguments.options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    drops = arguments.wants_probabilities("return_softmax", return_softmax, options, block_table)
    options = arguments.seeded(options, ops.check_packed, q, k, v, *packing)
    out, lse = ops.varlen_attention(q, k, v, *packing, *options, engines.requested())
    probabilities = varlen_probabilities(q, k, lse, packing, *options) if drops else q.new_empty(0)
    return out, lse, probabilities, _rng_state(q, options)


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
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """_flash_attn_backward of packed sequences; softmax_lse and what is returned are (H, Tq)."""
    arguments.check_tensors(dout=dout, q=q, k=k, v=v, out=out, softmax_lse=softmax_lse)
    packing = arguments.packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    window = (window_size_left, window_size_right)
    options = arguments.options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    options = _given_seed(options, rng_state, q)
    targets = _checked_targets((q, k, v), (dq, dk, dv))
    lse = softmax_lse.to(lse_dtype(q.dtype))
    gradients = ops.varlen_attention_backward(dout, None, out, lse, q, k, v, *packing, *options, engines.requested())
    _write(targets, gradients)
    return _delta(dout, out, lse)


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys in a block of S_dmask: more than there ever are.

    flash_attn divides what it writes there by the greatest of a row's blocks so far, and callers who undo that ask for
    this number. Here a row is one block.
    """
    return 1 << 30


def _keys_that_count(
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys from leftpad_k to seqused_k of each sequence, packed, and their cu_seqlens."""
    lengths = cu_seqlens_k.diff()
    for argument, counts in (("leftpad_k", leftpad_k), ("seqused_k", seqused_k)):
        if counts is None:
            continue
        validation.tensor(argument, counts, "batch")
        if counts.dtype != torch.int32:
            validation.refuse(argument, "of dtype int32", counts.dtype, TypeError)
        if counts.shape != lengths.shape:
            validation.refuse(argument, f"of one element a sequence, {lengths.shape[0]}", counts.shape[0])
        if block_table is None and reads_values(counts) and ((counts < 0) | (counts > lengths)).any():
            validation.refuse(argument, f"from 0 to the lengths of the sequences, {lengths.tolist()}", counts.tolist())
    stop = lengths if seqused_k is None else seqused_k
    if block_table is not None:
        if leftpad_k is not None:
            validation.refuse("leftpad_k", "None with block_table", "a tensor")
        return k, v, running_sums(stop)
    start = torch.zeros_like(stop) if leftpad_k is None else leftpad_k
    counts = (stop - start).clamp(min=0)
    first = cu_seqlens_k[:-1] + start
    sums = running_sums(counts)
    total = int(sums[-1])
    shift = (first - sums[:-1]).repeat_interleave(counts, output_size=total)  # which would wait for the total again
    rows = torch.arange(total, device=k.device) + shift
    return k.index_select(0, rows), v.index_select(0, rows), sums


def _rng_state(q: Tensor, options: Options) -> Tensor:
    state = torch.zeros(2, dtype=torch.int64, device=q.device)
    return state if options.dropout_seed is None else torch.cat([options.dropout_seed, state[:1]])


def _given_seed(options: Options, rng_state: Tensor | None, q: Tensor) -> Options:
    if not options.dropout_p:
        return options
    wanted = f"what the forward gave as rng_state, int64 (2,) on {q.device}, where dropout_p > 0"
    if rng_state is None:
        validation.refuse("rng_state", wanted, None)
    arguments.check_tensors(rng_state=rng_state)
    if rng_state.numel() != 2 or rng_state.dtype != torch.int64 or rng_state.device != q.device:
        validation.refuse("rng_state", wanted, f"{rng_state.dtype} {tuple(rng_state.shape)} on {rng_state.device}")
    return options.changed(dropout_seed=rng_state.flatten()[:1])


def _checked_targets(
    inputs: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor | None, ...]:
    for argument, target, x in zip(("dq", "dk", "dv"), targets, inputs, strict=True):
        if target is not None:
            arguments.check_target(argument, target, tuple(x.shape), inputs[0])
    return targets


def _write(targets: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> None:
    for target, gradient in zip(targets, gradients, strict=True):
        if target is not None:
            target.copy_(gradient)


def _delta(dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    delta: Tensor = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).mT.contiguous()
    return delta
