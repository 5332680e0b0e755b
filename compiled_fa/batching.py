"""torch.func.vmap over the ops: a mapped dimension is folded into the batch, where the op has one."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .registration import LIBRARY


def register(op: Any, tensors: int) -> None:
    """Batching rule of a dense op whose first `tensors` arguments begin with a batch (or are None)."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = list(arguments)
        for at, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True)):
            if at < tensors and isinstance(argument, Tensor):
                mapped = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
                folded[at] = mapped.flatten(0, 1)
            elif dim is not None:
                raise NotImplementedError(
                    f"{op._name} under torch.func.vmap maps over q, k and v; alibi_slopes and dropout_seed are "
                    "shared by all of them"
                )
            elif isinstance(argument, Tensor) and argument.dim() == 2:  # alibi_slopes (batch, nheads)
                folded[at] = argument.repeat(size, 1)
        outputs = op(*folded)
        return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)

    torch.library.register_vmap(op, rule, lib=LIBRARY)


def one_by_one(op: Any) -> None:
    """Batching rule of an op that is mapped over so much else (jacfwd: once for each input) that a loop is no loss."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        pairs = list(zip(arguments, in_dims, strict=True))
        calls = [
            op(*(argument if dim is None else argument.select(dim, at) for argument, dim in pairs))
            for at in range(info.batch_size)
        ]
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])

    torch.library.register_vmap(op, rule, lib=LIBRARY)


def refuse(*ops: Any) -> None:
    """A packed op has no batch to fold into."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> NoReturn:
        raise NotImplementedError(
            "varlen attention has no batching rule: pack the mapped sequences behind one another and extend cu_seqlens "
            "or map the dense function"
        )

    for op in ops:
        torch.library.register_vmap(op, rule, lib=LIBRARY)
