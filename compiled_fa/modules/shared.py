"""What several of these modules need: fp32 arithmetic, and a word to who asks for a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validation


def wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refuse_group(argument: str, group: Any) -> None:
    """For arguments of tensor parallelism."""
    if group is not None:
        validation.refuse(argument, "None: tensor parallelism is left to torch.distributed.tensor.parallel", group)
