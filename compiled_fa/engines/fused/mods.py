"""The score program in the form that the flex template inlines: score, mask, and the gradient of a score.

The template calls them with its own row and column numbers. For dense inputs those are indices within the sequence; for
block-aligned ones, tables lead from a row to its sequence and its index there. Everything else is the score program's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...flattening import Flattened
from ...scores import Dropout, ScoreProgram, Window
from ...scores.arguments import NO_SEED

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
        """Of Buffers, those that the kernel reads in both directions."""
        names = ["alibi_slopes"] if self.alibi else []
        names += ["dropout_low", "dropout_high"] if self.threshold is not None else []
        names += ["seqlens_q", "seqlens_k", "q_batch", "q_index", "k_batch", "k_index"] if self.packed else []
        names += ["shift"] if not self.packed and not self.square else []
        return tuple(names)


@dataclass(frozen=True)
class Buffers(Flattened):
    """Tensors that the kernel reads besides q, k, v, in the order in which the mods take them; None: not needed.

    alibi_slopes: (batch, nheads). dropout_low, dropout_high: int32 (batch, nheads, rows), of Dropout.row. seqlens_q,
    seqlens_k: int32 (batch,); q_batch, q_index, k_batch, k_index: int32, of each row, its sequence and its index there.
    shift: int32 (), seqlen_k - seqlen_q of dense inputs. lse, delta: backward only, where dropout needs them.
    """

    alibi_slopes: Tensor | None = None
    dropout_low: Tensor | None = None
    dropout_high: Tensor | None = None
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    q_batch: Tensor | None = None
    q_index: Tensor | None = None
    k_batch: Tensor | None = None
    k_index: Tensor | None = None
    shift: Tensor | None = None
    lse: Tensor | None = None
    delta: Tensor | None = None

    def without_dropout(self) -> Buffers:
        return replace(self, dropout_low=None, dropout_high=None)


@dataclass(frozen=True)
class Mods:
    """The functions the template inlines, each taking `buffers` after its own arguments."""

    features: Features

    def _program(self, buffers: Buffers) -> ScoreProgram:
        f = self.features
        # Dense: the template itself stays within the lengths, and a position needs their difference only.
        seqlen_q: int | Tensor = given(buffers.seqlens_q) if f.packed else 0
        seqlen_k: int | Tensor = given(buffers.seqlens_k) if f.packed else (0 if f.square else given(buffers.shift))
        return ScoreProgram(
            seqlen_q,
            seqlen_k,
            f.softmax_scale,
            f.softcap,
            buffers.alibi_slopes,
            f.window,
            Dropout(NO_SEED, f.threshold) if f.threshold is not None else None,
        )

    def _unpack(
        self, tensors: tuple[Tensor, ...], batch: Tensor, head: Tensor, row: Tensor, column: Tensor
    ) -> tuple[ScoreProgram, Indices, Buffers]:
        names = (*self.features.buffer_names(), "lse", "delta")[: len(tensors)]
        buffers = Buffers.unflatten(names, iter(tensors))
        program = self._program(buffers)
        if not self.features.packed:
            return program, (batch, head, row, column), buffers
        sequence, q_idx, kv_idx = (
            given(buffers.q_batch)[row],
            given(buffers.q_index)[row],
            given(buffers.k_index)[column],
        )
        return program, (sequence, head, q_idx, kv_idx), buffers

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
        return (at[0] == given(buffers.k_batch)[column]) & program.mask(*at)

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
            probability = torch.exp(program.score(product, *at) - given(buffers.lse)[batch, head, row])
            dropped = -probability * given(buffers.delta)[batch, head, row]
            dscore = torch.where(_keep(program, buffers, batch, head, row, at[-1]), dscore, dropped)
        return [program.product_gradient(dscore, product), *[None] * (4 + len(tensors))]


def _keep(program: ScoreProgram, buffers: Buffers, batch: Tensor, head: Tensor, row: Tensor, kv_idx: Tensor) -> Tensor:
    """Dropout's decision, from what is common to a row: hashed once a row, outside the kernel."""
    if program.dropout is None:
        raise ValueError("this kernel has no dropout")
    low, high = given(buffers.dropout_low), given(buffers.dropout_high)
    return program.dropout.keep_in_row((low[batch, head, row], high[batch, head, row]), kv_idx)


def given(buffer: Tensor | None) -> Tensor:
    """A buffer that the features say is there."""
    if buffer is None:
        raise ValueError("this kernel was not given all of its buffers")
    return buffer
