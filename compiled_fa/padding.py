"""Padded batches and packed rows, one into the other: what flash_attn calls bert_padding.

    rows, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden_states, attention_mask)
    out = flash_attn_varlen_func(..., cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    padded = pad_input(out, indices, batch, seqlen)

All of them are differentiable in what they move, as often as one likes. B batch, S padded length, T rows kept.

Source: flash_attn.bert_padding, 2.7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import config, validation


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input (n, ...), indices (T,) -> rows of input, (T, ...)."""
    _rows("input", input)
    validation.tensor("indices", indices, "total")
    return input.index_select(0, indices)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """index_first_axis, and input itself beside it: gradients of both are added up."""
    return index_first_axis(input, indices), input


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """values (T, ...), indices (T,) -> (first_axis_dim, ...): row indices[t] is values[t], all others are 0."""
    _rows("values", values)
    validation.tensor("indices", indices, "total")
    if indices.shape[0] != values.shape[0]:
        validation.refuse("indices", f"of one element a row of values, {values.shape[0]}", indices.shape[0])
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows that a mask keeps, packed.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or integers: not 0 where there is a token.
        unused_mask: (B, S): not 0 where there is room that is taken, though nothing is in it yet. Never where
            attention_mask has a token.

    Returns:
        (rows (T, ...), indices int64 (T,) of the rows in (B · S, ...), cu_seqlens int32 (B + 1,), the greatest length,
        seqused int32 (B,)): lengths with the unused ones, but for seqused, which is those of attention_mask. On a GPU
        the host waits for the number of rows and for the greatest length.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Source: flash_attn.bert_padding.unpad_input; up to flash_attn 2.6 it had the first four results.
    """
    _padded(hidden_states, "attention_mask", attention_mask)
    used = kept = attention_mask != 0
    if unused_mask is not None:
        _padded(hidden_states, "unused_mask", unused_mask)
        kept = used | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    rows, indices = _packed(hidden_states, kept)
    return rows, indices, running_sums(lengths), _greatest(lengths), used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows of a batch each of whose rows holds short sequences behind one another, and then padding.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: integers (B, S): the lengths of the sequences in each row, in their order, and zeros.
            [[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]] is two sequences and one token of padding, and one sequence.

    Returns:
        (rows (T, ...), indices int64 (T,), cu_seqlens int32 (sequences + 1,), the greatest length).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. Lengths that sum to more than S are told on
            a CPU, and elsewhere with COMPILED_FA_CHECK=1.

    Source: flash_attn.bert_padding.unpad_input_for_concatenated_sequences.
    """
    _padded(hidden_states, "attention_mask_in_length", attention_mask_in_length)
    places = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    rows, indices = _packed(hidden_states, places < attention_mask_in_length.sum(-1, keepdim=True))
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    cu_seqlens = running_sums(lengths)
    known = reads_values(cu_seqlens) and not torch.compiler.is_compiling()
    if known and int(cu_seqlens[-1]) != rows.shape[0]:
        sums = attention_mask_in_length.sum(-1).tolist()
        validation.refuse("attention_mask_in_length", f"of sums from 0 to {hidden_states.shape[1]} in each row", sums)
    return rows, indices, cu_seqlens, _greatest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """hidden_states (T, ...), indices (T,) as unpad_input gives them -> (batch, seqlen, ...), 0 where there is no row.

    Source: flash_attn.bert_padding.pad_input.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *padded.shape[1:])


def _rows(argument: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        validation.refuse(argument, "a tensor", type(value).__name__, TypeError)
    if value.dim() < 2:
        validation.refuse(argument, "of two dimensions or more", f"shape {tuple(value.shape)}")


def _padded(hidden_states: Tensor, argument: str, mask: Tensor) -> None:
    _rows("hidden_states", hidden_states)
    validation.tensor(argument, mask, "batch, seqlen")
    if mask.shape != hidden_states.shape[:2]:
        wanted = f"of hidden_states' first dimensions, {tuple(hidden_states.shape[:2])}"
        validation.refuse(argument, wanted, f"shape {tuple(mask.shape)}")


def _packed(hidden_states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (B, S, ...) where kept, and their numbers in (B · S, ...)."""
    indices = kept.flatten().nonzero().flatten()
    return hidden_states.flatten(0, 1).index_select(0, indices), indices


def reads_values(x: Tensor) -> bool:
    """Are values checked that must be read to be told? On a CPU always, elsewhere (a host sync) as asked."""
    return x.device.type == "cpu" or config.checks_values()


def running_sums(lengths: Tensor) -> Tensor:
    """cu_seqlens, int32 (B + 1,), of lengths (B,)."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _greatest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0
