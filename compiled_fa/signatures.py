"""What two calls have in common that are checked, and served, alike: all that is not in their tensors' elements."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def of_call(arguments: Sequence[Any]) -> Hashable | None:
    """None: there is a tensor among them that is more than its shape, strides, dtype and device, as a fake one is."""
    found = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if type(argument) not in _PLAIN:
                return None
            found.append((argument.shape, argument.stride(), argument.dtype, argument.device))
        else:
            found.append(argument)
    return tuple(found)
