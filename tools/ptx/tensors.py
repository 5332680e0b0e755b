"""Tensors of PyTorch as arguments of a launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .run import Argument, Pointer


def as_argument(value: Any) -> Argument:
    """A tensor as a place in its storage; numbers as they are."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, float) else int(value)  # sizes may be symbols
    dtype = torch.int16 if value.dtype == torch.bfloat16 else value.dtype  # NumPy has no bfloat16
    storage = torch.empty(0, dtype=dtype).set_(value.untyped_storage())
    return Pointer(storage.numpy(), int(value.storage_offset()))
