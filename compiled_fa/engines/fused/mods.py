"""The score program in the form that the flex template inlines: score, mask, and the gradient of a score.

The template calls them with its own row and column numbers, those of the tensors as they lie. Tables lead from a row to
the keys that it sees, to where it stands among them, and to its sequence (blocks.py). Everything else is the score
program's, whose numbers are tensors too: one kernel serves every scale, softcap, window and probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from ...scores import Dropout, ScoreProgram
from ...scores.arguments import NO_SEED
from ...scores.masks import within

LOG2E = math.log2(math.e)  # the template's lse is in base 2

# dense: every batch has the same tables of rows. packed: one long row. padded: a batch of query rows, with tables of
# their own, on one long row of keys. paged: the same of splits of sequences, on keys where they lie (pages.py).
Layout = Literal["dense", "packed", "padded", "paged"]


@dataclass(frozen=True)
class Features:
    """What is compiled into a kernel besides shapes: which terms a score has, and how rows lie.

    heads_per_key: query heads that are rows beside each other, where they are (pages.py).
    """

    softcap: bool = False
    alibi: bool = False
    dropout: bool = False
    layout: Layout = "dense"
    bias: tuple[bool, ...] = ()  # whether it varies with the sequence, head, query and key; (): there is none
    heads_per_key: int = 1

    def score_buffers(self, dropping: bool) -> tuple[str, ...]:
        """What a score reads, in order. dropping: with dropout's decision."""
        names = ["softmax_scale"]
        names += ["softcap"] if self.softcap else []
        names += ["alibi_slopes", "position"] if self.alibi else []
        names += ["sequence"] if self.alibi and self.layout == "packed" else []
        names += ["owner", "member"] if self.alibi and self.layout == "paged" else []
        names += ["low", "high", "threshold"] if dropping else []
        names += ["key_start"] if dropping and self.layout != "dense" else []
        names += ["bias"] if self.bias else []
        return tuple(names)


MASK_BUFFERS = ("start", "stop")


@dataclass(frozen=True)
class Mods:
    """The functions that the template inlines, each taking buffers after its own arguments, as Features names them.

    dropping: do scores drop? constants: numbers of the score program that no buffer holds: they become code.

    softmax_scale, softcap: fp32 (). alibi_slopes: (sequences, nheads). low, high: int32 (batch, nheads, rows), of
    Dropout.row. threshold: int32 (). bias: of the dimensions with which it varies, of those of (batch, nheads, rows,
    columns). lse, in base 2, and delta: (batch, nheads, rows). owner, member: pages.py. The others: RowTables.
    """

    features: Features
    dropping: bool = False
    constants: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the buffers of `score`."""
        return tuple(name for name in self.features.score_buffers(self.dropping) if name not in self.constants)

    def _given(self, tensors: tuple[Tensor, ...], *more: str) -> dict[str, Any]:
        return {**self.constants, **dict(zip((*self.names, *more), tensors, strict=True))}

    def _of_row(self, table: Tensor, batch: Tensor, row: Tensor) -> Tensor:
        return table[batch, row] if self.features.layout in ("padded", "paged") else table[row]

    def _program(self, given: dict[str, Any]) -> ScoreProgram:
        # Positions come as they are, so that no length is needed to find them.
        dropout = Dropout(NO_SEED, given["threshold"]) if self.dropping else None
        slopes = given.get("alibi_slopes")
        return ScoreProgram(0, 0, given["softmax_scale"], given.get("softcap"), slopes, dropout=dropout)

    def _score(
        self, given: dict[str, Any], product: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor
    ) -> Tensor:
        sequence, position = batch, row
        if self.features.alibi:
            position = self._of_row(given["position"], batch, row)
            if self.features.layout == "packed":
                sequence = given["sequence"][row]
            elif self.features.layout == "paged":
                sequence = given["owner"][batch]
                head = head * self.features.heads_per_key + given["member"][batch, row]
        bias = self._bias(given, batch, head, row, column)
        return self._program(given).score(product, sequence, head, position, column, bias)

    def _bias(self, given: dict[str, Any], batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor | None:
        if not self.features.bias:
            return None
        at = zip((batch, head, row, column), self.features.bias, strict=True)
        bias: Tensor = given["bias"]
        return bias[tuple(index for index, varies in at if varies)] if any(self.features.bias) else bias

    def _keep(self, given: dict[str, Any], batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Dropout's decision, from what is common to a row: hashed once a row, outside the kernel."""
        dropout = self._program(given).dropout
        if dropout is None:
            raise ValueError("this kernel has no dropout")
        # A tracer shows columns of 32 bits, in which a graph wraps around; whoever runs it may have them in 64.
        column = column.to(torch.int64).to(torch.int32)
        if self.features.layout != "dense":
            column = column - self._of_row(given["key_start"], batch, row)
        return dropout.keep_in_row((given["low"][batch, head, row], given["high"][batch, head, row]), column)

    def score(
        self, product: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor, *tensors: Tensor
    ) -> Tensor:
        """score_mod. Where it drops, -inf."""
        given = self._given(tensors[: len(self.names)])  # backward has lse and delta behind
        score = self._score(given, product, batch, head, row, column)
        if not self.dropping:
            return score
        return torch.where(self._keep(given, batch, head, row, column), score, -torch.inf)

    def mask(self, batch: Tensor, head: Tensor, row: Tensor, column: Tensor, *tensors: Tensor) -> Tensor:
        """mask_mod of partial tiles. tensors: MASK_BUFFERS; by name, a tracer would count self among them."""
        start, stop = tensors
        return within(column, self._of_row(start, batch, row), self._of_row(stop, batch, row))

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

        With dropout the template's scores are -inf where dropped, its P and dS 0. For the kept ones that is right. But
        the softmax is over all keys: a dropped one has dS = P (0 - delta), which is put back here.
        """
        given = self._given(tensors, *(("lse", "delta") if self.dropping else ()))
        if self.dropping:
            score = self._score(given, product, batch, head, row, column)
            probability = torch.exp2(score * LOG2E - given["lse"][batch, head, row])
            dropped = -probability * given["delta"][batch, head, row]
            dscore = torch.where(self._keep(given, batch, head, row, column), dscore, dropped)
        return [self._program(given).product_gradient(dscore, product), *[None] * (4 + len(tensors))]
