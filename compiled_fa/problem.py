"""One attention call, validated and normalised: what the ops hand to an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from .scores import Dropout, ScoreProgram, Window
from .tuning import Sizes

Direction = Literal["forward", "backward"]
Found = TypeVar("Found")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of lse, and of the arithmetic, for inputs of a dtype: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def once_a_call(function: Callable[[Problem], Found]) -> Callable[[Problem], Found]:
    """What a function finds out about a problem, found out once: who chooses an engine asks the same as the engine."""

    @functools.wraps(function)
    def remembered(problem: Problem) -> Found:
        notes = problem.notes
        if function not in notes:
            notes[function] = function(problem)
        found: Found = notes[function]
        return found

    return remembered


def bias_part(bias: Tensor, batch: slice, heads: slice, queries: slice, keys: slice) -> Tensor:
    """What some scores have of a problem's bias, broadcastable to (batch, heads, queries, keys): a view."""
    parts = zip(bias.shape, (batch, heads, queries, keys), strict=True)
    return bias[tuple(slice(None) if size == 1 else part for size, part in parts)]


class Options(NamedTuple):
    """What the ops take besides tensors and where they lie, in their order. Defaults: the schema's."""

    softmax_scale: float | None = None
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    def changed(self, **fields: Any) -> Options:
        """As _replace, which Dynamo of torch 2.11 gets wrong, without a word, where there are tensors."""
        return Options(**{**dict(zip(self._fields, self, strict=True)), **fields})


@dataclass(frozen=True)
class Packed:
    """Where the sequences of a varlen call lie in their packed tensors.

    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), the running sums of the lengths, from 0 to the totals.
    max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
    block_table: int32 (batch, blocks) where k and v are paged, (num_blocks, block_size, nheads_k, head_dim); or None.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None

    @functools.cached_property
    def host_sums(self) -> tuple[list[int], list[int]]:
        """cu_seqlens_q and cu_seqlens_k, read by the host, once a call: elsewhere than on a CPU it waits for them."""
        if self.cu_seqlens_k is self.cu_seqlens_q:
            sums = self.cu_seqlens_q.tolist()
            return sums, sums
        if self.cu_seqlens_q.device.type == "cpu":
            return self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        both: list[int] = torch.cat([self.cu_seqlens_q, self.cu_seqlens_k]).tolist()
        return both[: len(both) // 2], both[len(both) // 2 :]

    @functools.cached_property
    def host_lengths(self) -> tuple[list[int], list[int]]:
        """The lengths of queries and of keys, likewise."""
        q, k = ([stop - start for start, stop in pairwise(sums)] for sums in self.host_sums)
        return q, k

    @property
    def first_keys(self) -> Tensor | None:
        """Where in its pages each sequence begins, int32 (batch,); None: at their beginning."""
        return None

    @property
    def asked_splits(self) -> int:
        """Into how many parts each sequence's keys shall be split, where engines split them; 0: as they find best."""
        return 0

    @property
    def is_fixed(self) -> bool:
        """Do all calls with the problem's signature have their keys in the same places?"""
        return False

    @property
    def one_page_each(self) -> bool:
        """Do keys lie in pages, and each sequence's in one: in one piece?"""
        return self.block_table is not None and self.block_table.shape[1] == 1

    @functools.cached_property
    def host_pieces(self) -> list[tuple[int, int]] | None:
        """The page of each sequence, and where in it the sequence begins; None: not one page each. The host reads."""
        if self.block_table is None or not self.one_page_each:
            return None
        pages = self.block_table[:, 0].tolist()
        return list(zip(pages, [0] * len(pages) if self.first_keys is None else self.first_keys.tolist(), strict=True))


@dataclass(frozen=True)
class Cached(Packed):
    """Rows of a KV cache, which is pages: one that is not paged is a page a row, as long as the cache.

    leftpad: int32 (batch,), the first key of each row, before which its pages hold nothing; None: 0. The keys that
    cu_seqlens_k counts, and the score program, begin with it.
    num_splits: of each row's keys, where engines split them; 0: as they find best.
    fixed: is_fixed.
    """

    leftpad: Tensor | None = None
    num_splits: int = 0
    fixed: bool = False

    @property
    def first_keys(self) -> Tensor | None:
        return self.leftpad

    @property
    def asked_splits(self) -> int:
        return self.num_splits

    @property
    def is_fixed(self) -> bool:
        return self.fixed


@dataclass(frozen=True)
class Problem:
    """Shapes: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv); packed: the first two dimensions are one, T.

    dropout_seed: int64 of one element where dropout_p > 0; without one nothing is dropped.
    bias: of a dense call, four dimensions, each that of (B, H, Sq, Sk) or 1, of any strides; bool, True where a key is
    seen, or floating point, added to scores. bias_gradient: backward gives its gradient, too.
    signature: what calls that are checked, and served, alike have in common; None: of this call nobody knows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    window: Window
    softcap: float
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    packed: Packed | None = None
    signature: Hashable | None = None
    notes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # of once_a_call
    bias: Tensor | None = None
    bias_gradient: bool = False

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        packed: Packed | None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_left: int = -1,
        window_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: Tensor | None = None,
        *,
        signature: Hashable | None = None,
        bias: Tensor | None = None,
        bias_gradient: bool = False,
    ) -> Problem:
        """From the arguments of the ops, in their order."""
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        window = Window.of(causal, window_left, window_right)
        numbers = scale, window, softcap, alibi_slopes, dropout_p, dropout_seed
        return cls(q, k, v, *numbers, packed, signature, bias=bias, bias_gradient=bias_gradient)

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.packed is None else self.packed.cu_seqlens_q.shape[0] - 1

    @functools.cached_property
    def window_in_force(self) -> Window:
        """The window without sides that hide nothing at these lengths."""
        packed = self.packed
        longest = (self.q.shape[1], self.k.shape[1]) if packed is None else (packed.max_seqlen_q, packed.max_seqlen_k)
        return self.window.in_force(*longest)

    @property
    def heads_per_key(self) -> int:
        """Query head h reads key head h // heads_per_key."""
        return self.q.shape[-2] // self.k.shape[-2]

    @functools.cached_property
    def mean_seqlens(self) -> tuple[int, int]:
        """Queries and keys of an average sequence, rounded down; of keys in pages, as many as the cache holds."""
        if self.packed is None:
            return self.q.shape[1], self.k.shape[1]
        sequences = max(1, self.batch)
        return self.q.shape[0] // sequences, self.total_k // sequences

    @property
    def total_k(self) -> int:
        """Keys of all sequences; of keys in pages, as many as the cache holds."""
        if self.packed is None:
            return self.k.shape[0] * self.k.shape[1]
        return self.k.shape[0] if self.packed.block_table is None else self.packed.host_sums[1][-1]

    @functools.cached_property
    def features(self) -> tuple[float, ...]:
        """What a tuned rule weighs."""
        (queries, keys), (nheads, head_dim) = self.mean_seqlens, self.q.shape[-2:]
        causal, packed = bool(self.window_in_force.right == 0), self.packed is not None
        return Sizes(queries, keys, self.batch, nheads, self.heads_per_key, head_dim, causal, packed).features()

    @property
    def lse_dtype(self) -> torch.dtype:
        return lse_dtype(self.q.dtype)

    def program(self, seqlen_q: int | Tensor, seqlen_k: int | Tensor) -> ScoreProgram:
        """The call's score program; the lengths are an int for all sequences or a tensor (batch,)."""
        slopes = self.alibi_slopes
        return ScoreProgram(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap if self.softcap > 0.0 else None,
            alibi_slopes=slopes.to(self.lse_dtype).expand(self.batch, -1) if slopes is not None else None,
            window=self.window,
            dropout=Dropout.of(self.dropout_p, self.dropout_seed) if self.dropout_seed is not None else None,
        )
