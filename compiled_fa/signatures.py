"""What two calls have in common that are checked, and served, alike: all that is not in their tensors' elements."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

# Classes of arguments that are no more than they say, and hashable.
TENSORS = frozenset({Tensor, torch.nn.Parameter})
OTHERS = frozenset({type(None), bool, int, float, str})


def of_call(arguments: Sequence[Any]) -> Hashable | None:
    """None: there is a tensor among them that is more than its shape, strides, dtype and device, as a fake one is."""
    found = []
    for argument in arguments:
        kind = type(argument)
        if kind in TENSORS:
            found.append((argument.shape, argument.stride(), argument.dtype, argument.device))
        elif kind in OTHERS or not isinstance(argument, Tensor):
            found.append(argument)
        else:
            return None
    return tuple(found)
