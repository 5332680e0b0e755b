"""The score program in the form that the flex template inlines: score, mask, and the gradient of a score.

The template calls them with its own row and column numbers. For dense inputs those are indices within the sequence; for
block-aligned ones, tables lead from a row to its sequence and its index there. Everything else is the score program's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...scores import Dropout, ScoreProgram, Window

NO_SEED = torch.empty(0, dtype=torch.int32)  # rows come hashed
Indices = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Features:
    """What is compiled into a kernel: numbers too, so that it needs to load none."""

    softmax_scale: float
    softcap: float | None
    alibi: bool
    window: Window
    threshold: int | None  # of dropout's keep decisions; None: no dropout
    packed: bool
    square: bool  # as many queries as keys, dense: then no length enters the kernel

    def without_dropout(self) -> Features:
        return replace(self, threshold=None)

    def buffer_names(self) -> tuple[str, ...]:
        """Tensors that the kernel reads besides q, k, v, in the order in which the mods take them."""
        names = ["alibi_slopes"] if self.alibi else []
        names += ["dropout_low", "dropout_high"] if self.threshold is not None else []
        names += ["seqlens_q", "seqlens_k", "q_batch", "q_index", "k_batch", "k_index"] if self.packed else []
        names += ["shift"] if not self.packed and not self.square else []
        return tuple(names)


@dataclass(frozen=True)
class Mods:
    """The functions the template inlines, each taking `buffers` after its own arguments."""

    features: Features

    def _program(self, buffers: dict[str, Tensor]) -> ScoreProgram:
        f = self.features
        # Dense: the template itself stays within the lengths, and a position needs their difference only.
        seqlen_q: int | Tensor = buffers["seqlens_q"] if f.packed else 0
        seqlen_k: int | Tensor = buffers["seqlens_k"] if f.packed else (0 if f.square else buffers["shift"])
        return ScoreProgram(
            seqlen_q,
            seqlen_k,
            f.softmax_scale,
            f.softcap,
            buffers.get("alibi_slopes"),
            f.window,
            Dropout(NO_SEED, f.threshold) if f.threshold is not None else None,
        )

    def _unpack(
        self, tensors: tuple[Tensor, ...], batch: Tensor, head: Tensor, row: Tensor, column: Tensor
    ) -> tuple[ScoreProgram, Indices, dict[str, Tensor]]:
        buffers = dict(zip((*self.features.buffer_names(), "lse", "delta"), tensors, strict=False))
        program = self._program(buffers)
        if not self.features.packed:
            return program, (batch, head, row, column), buffers
        return program, (buffers["q_batch"][row], head, buffers["q_index"][row], buffers["k_index"][column]), buffers

    def score(
        self, product: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor, *tensors: Tensor
    ) -> Tensor:
        """score_mod; without dropout, or for the lse of all keys."""
        program, at, _ = self._unpack(tensors, batch, head, row, column)
        return program.score(product, *at)

    def kept_score(
        self, product: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor, *tensors: Tensor
    ) -> Tensor:
        """score_mod that drops: -inf where dropout does."""
        program, at, buffers = self._unpack(tensors, batch, head, row, column)
        keep = _keep(program, buffers, batch, head, row, at[-1])
        return torch.where(keep, program.score(product, *at), -torch.inf)

    def mask(self, batch: Tensor, head: Tensor, row: Tensor, column: Tensor, *tensors: Tensor) -> Tensor:
        """mask_mod of partial tiles."""
        program, at, buffers = self._unpack(tensors, batch, head, row, column)
        if not self.features.packed:
            return program.in_window(*at)
        return (at[0] == buffers["k_batch"][column]) & program.mask(*at)

    def product_gradient(
        self,
        product: Tensor,
        batch: Tensor,
        head: Tensor,
        row: Tensor,
        column: Tensor,
        dscore: Tensor,
        *tensors: Tensor,
    ) -> list[Tensor | None]:
        """Gradient of the score -> of q·k; and None for each other argument.

        With dropout the template's scores are -inf where dropped, its P and dS 0. For dV and the kept ones that is
        right, with dO / (1 - p). But the softmax is over all keys: a dropped one has dS = P (0 - delta), which is put
        back here.
        """
        program, at, buffers = self._unpack(tensors, batch, head, row, column)
        if program.dropout is not None:
            probability = torch.exp(program.score(product, *at) - buffers["lse"][batch, head, row])
            dropped = -probability * buffers["delta"][batch, head, row]
            dscore = torch.where(_keep(program, buffers, batch, head, row, at[-1]), dscore, dropped)
        return [program.product_gradient(dscore, product), *[None] * (4 + len(tensors))]


def _keep(
    program: ScoreProgram, buffers: dict[str, Tensor], batch: Tensor, head: Tensor, row: Tensor, kv_idx: Tensor
) -> Tensor:
    """Dropout's decision, from what is common to a row: hashed once a row, outside the kernel."""
    if program.dropout is None:
        raise ValueError("this kernel has no dropout")
    return program.dropout.keep_in_row(
        (buffers["dropout_low"][batch, head, row], buffers["dropout_high"][batch, head, row]), kv_idx
    )


def named(buffers: dict[str, Any], features: Features) -> tuple[Any, ...]:
    """The buffers that these features need, in order."""
    return tuple(buffers[name] for name in features.buffer_names())
