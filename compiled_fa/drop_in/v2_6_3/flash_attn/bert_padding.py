"""Padded batches and packed rows: unpad_input with four results."""

from torch import Tensor

from compiled_fa import padding as _padding
from compiled_fa.drop_in.rearranging import rearrange
from compiled_fa.padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input_for_concatenated_sequences,
)

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """compiled_fa.padding.unpad_input's first four results."""
    rows, indices, cu_seqlens, max_seqlen, _ = _padding.unpad_input(hidden_states, attention_mask)
    return rows, indices, cu_seqlens, max_seqlen
