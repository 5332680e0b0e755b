"""Padded batches and packed rows."""

from compiled_fa.drop_in.rearranging import rearrange
from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
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

__getattr__ = _names_of(__name__)
