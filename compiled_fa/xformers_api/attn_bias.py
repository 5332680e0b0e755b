"""xformers' masks, for memory_efficient_attention's attn_bias: what each lets a query see, and the calls that do that.

Two corners are told apart, which matters where there are not as many queries as keys:

    LowerTriangularMask, 2 queries on 4 keys: 1 0 0 0     LowerTriangularFromBottomRightMask: 1 1 1 0
      (top left: the first query at the first key) 1 1 0 0       (the last query at the last key)    1 1 1 1

Names that begin with BlockDiagonal are of sequences packed into one row: query (1, sum of lengths, H, K). Queries that
see no key give 0, where xformers refuses some such masks.

Source: xformers.ops.fmha.attn_bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from typing_extensions import Self

from .. import validation
from . import lengths
from .calls import Band, Call, calls_of
from .lengths import SeqLenInfo

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    "PagedBlockDiagonalPaddedKeysMask",
]

Device = torch.device | str | None


def _window(argument: str, size: int, least: int) -> int:
    if size < least:
        validation.refuse(argument, f"at least {least}", size)
    return size


class AttentionBias:
    """What attn_bias may be besides None. `band`: which keys a query of a sequence sees."""

    @property
    def band(self) -> Band:
        return Band()

    def visible(self, seqlen_q: int, seqlen_k: int, device: Device = "cpu") -> Tensor:
        """bool (seqlen_q, seqlen_k): the mask written out, for tests."""
        return self.band.visible(seqlen_q, seqlen_k, device)

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        """What would be added to scores of this shape, (..., M, N): 0 where a key is seen, -inf elsewhere."""
        bias = torch.zeros(tuple(shape[-2:]), dtype=dtype, device=device)
        return bias.masked_fill_(~self.visible(shape[-2], shape[-1], device), -math.inf).expand(tuple(shape))

    def to(self, device: torch.device | str) -> Self:
        """The mask with what it has of tensors on this device."""
        return self


class LowerTriangularMask(AttentionBias):
    """Causal from the top left: query i sees keys 0 to i."""

    def __init__(self, device: Device = None) -> None:
        pass  # xformers takes a device, for nothing

    @property
    def band(self) -> Band:
        return Band(right=0, top_left=True)

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """bias: as attn_bias, a tensor; added to the scores of the keys that are seen."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """LowerTriangularMask, and a tensor (B, H, M, N) that is added to the scores, or what broadcasts to it."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        validation.tensor_given("bias", bias)
        self.bias = bias

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.bias.to(device))

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Device = "cpu") -> Tensor:
        return super().materialize(shape, dtype, device) + self.bias.to(device=device, dtype=dtype)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal from the bottom right, as flash_attn's: the last query sees all keys."""

    @property
    def band(self) -> Band:
        return Band(right=0)

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Of those keys only the last _window_size, the query's own included."""

    _window_size: int

    def __post_init__(self) -> None:
        _window("_window_size", self._window_size, 1)

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window of keys to both sides of a query's position: flash_attn's window_size."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _window("window_left", self.window_left, 0)
        _window("window_right", self.window_right, 0)

    @property
    def band(self) -> Band:
        return Band(self.window_left, self.window_right)


@dataclass
class _Blocks(AttentionBias):
    """Sequence i of the queries sees sequence i of the keys, and of those what `band` says.

    q_seqinfo, k_seqinfo: where sequences lie.
    """

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _calls: list[Call] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        queries, keys = len(self.q_seqinfo.seqlen_py), len(self.k_seqinfo.seqlen_py)
        if keys != queries:
            validation.refuse("kv_seqlen", f"as many lengths as q_seqlen, {queries}", keys)
        device = self.q_seqinfo.seqstart.device
        intervals = self.q_seqinfo.intervals(), self.k_seqinfo.intervals()
        self._calls = calls_of(*intervals, self.k_seqinfo.total, self.band, device)

    def calls(self, device: torch.device) -> list[Call]:
        """The calls whose results, added up, are attention. Their tensors move to this device and stay there."""
        if self._calls[0].cu_seqlens_q.device != device:
            self._calls = [call.to(device) for call in self._calls]
        return self._calls

    def to(self, device: torch.device | str) -> Self:
        queries, keys = (info.to(torch.device(device)) for info in (self.q_seqinfo, self.k_seqinfo))
        return replace(self, q_seqinfo=queries, k_seqinfo=keys)

    def visible(self, seqlen_q: int, seqlen_k: int, device: Device = "cpu") -> Tensor:
        wanted = self.q_seqinfo.total, self.k_seqinfo.total
        if (seqlen_q, seqlen_k) != wanted:
            validation.refuse("shape", f"(..., {wanted[0]}, {wanted[1]}), this mask's", (seqlen_q, seqlen_k))
        seen = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        for (q, end_q), (k, end_k) in zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True):
            seen[q:end_q, k:end_k] = self.band.visible(end_q - q, end_k - k, device)
        return seen


@dataclass
class BlockDiagonalMask(_Blocks):
    """Sequences that see themselves only. Queries and keys may be of different lengths.

    _batch_sizes: of so many sequences each, which are of one length, `split` makes a batch.
    """

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Device = None
    ) -> Self:
        """Args:
            q_seqlen, kv_seqlen: the sequences' lengths; kv_seqlen None: those of q_seqlen.
            device: where the lengths are put; None: on torch's default device, and from there to where they are used.

        Raises:
            ValueError, TypeError: no sequence, a length below 0 or none, not as many of one as of the other.
        """
        queries = lengths.packed("q_seqlen", q_seqlen, device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(queries, queries)
        return cls(queries, lengths.packed("kv_seqlen", kv_seqlen, device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Self, Tensor]:
        """tensors (B_i, M_i, ...) -> the mask, and their rows behind one another, (1, sum of B_i · M_i, ...)."""
        mask = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, _one_row(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Self, Tensor, Tensor, Tensor | None]:
        """from_tensor_list of queries, keys and, where given, values: -> mask, query, key, value or None."""
        batches = [x.shape[0] for x in tensors_q]
        for argument, others in (("tensors_k", tensors_k), ("tensors_v", tensors_v)):
            if others is not None and [x.shape[0] for x in others] != batches:
                validation.refuse(argument, f"of tensors_q's batch sizes, {batches}", [x.shape[0] for x in others])
        if tensors_v is not None and [x.shape[1] for x in tensors_v] != [x.shape[1] for x in tensors_k]:
            validation.refuse("tensors_v", "of tensors_k's lengths", [x.shape[1] for x in tensors_v])
        queries, keys = ([x.shape[1] for x in side for _ in range(x.shape[0])] for side in (tensors_q, tensors_k))
        mask = cls.from_seqlens(queries, keys)
        mask._batch_sizes = batches
        return mask, _one_row(tensors_q), _one_row(tensors_k), None if tensors_v is None else _one_row(tensors_v)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """(1, all queries, ...) -> views (1, length, ...) of each sequence, or (B_i, M_i, ...) as they were given."""
        return self.q_seqinfo.split("tensor", tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """split_queries for keys and values."""
        return self.k_seqinfo.split("tensor", tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """split_queries, where queries and keys are of the same lengths."""
        if self.q_seqinfo.seqlen_py != self.k_seqinfo.seqlen_py:
            validation.refuse("tensor", "split by split_queries or split_kv, whose lengths differ", "split")
        return self.split_queries(tensor)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Causal from the top left of each block."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Causal from the bottom right of each block."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """Causal from the top left, and of those keys the last window_size, the query's own included."""
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """Causal from the bottom right, and of those keys the last window_size, the query's own included."""
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )


def _one_row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(0, 1)[None] for x in tensors], dim=1)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """BlockDiagonalMask, causal from the top left of each block."""

    @property
    def band(self) -> Band:
        return Band(right=0, top_left=True)


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """BlockDiagonalMask, causal from the bottom right of each block."""

    @property
    def band(self) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """BlockDiagonalCausalMask, and of those keys the last _window_size, the query's own included."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _window("_window_size", self._window_size, 1)
        super().__post_init__()

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0, top_left=True)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """BlockDiagonalCausalFromBottomRightMask, and of those keys the last _window_size, the query's own included."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _window("_window_size", self._window_size, 1)
        super().__post_init__()

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0)


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """BlockDiagonalMask on keys in slots of one size, of which the first ones of each are there: a static cache."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: None = None,
        *,
        device: Device = None,
    ) -> Self:
        """Args:
        q_seqlen: lengths of the queries, which lie behind one another.
        kv_padding: rows of a slot of the keys.
        kv_seqlen: how many keys are there in each slot.
        causal_diagonal: has no meaning, in xformers neither.
        device: as BlockDiagonalMask.from_seqlens.
        """
        queries = lengths.packed("q_seqlen", q_seqlen, device)
        return cls(queries, lengths.padded("kv_seqlen", kv_seqlen, kv_padding, device))

    def make_paged(
        self, block_tables: Tensor, page_size: int, paged_type: type[PagedBlockDiagonalPaddedKeysMask]
    ) -> PagedBlockDiagonalPaddedKeysMask:
        """The same sequences with their keys in pages."""
        device = self.q_seqinfo.seqstart.device
        seqlens = self.q_seqinfo.seqlen_py, self.k_seqinfo.seqlen_py
        return paged_type.from_seqlens(*seqlens, block_tables, page_size, device=device)

    def make_local_attention(self, window_left: int, window_right: int) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """A window of keys to both sides of a query's position, from the bottom right of each block."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(self.q_seqinfo, self.k_seqinfo, window_left, window_right)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """BlockDiagonalPaddedKeysMask, causal from the bottom right of each block."""

    @property
    def band(self) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """BlockDiagonalPaddedKeysMask with a window, from the bottom right of each block."""

    window_left: int = 0
    window_right: int = 0

    def __post_init__(self) -> None:
        _window("window_left", self.window_left, 0)
        _window("window_right", self.window_right, 0)
        super().__post_init__()

    @property
    def band(self) -> Band:
        return Band(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        whole = BlockDiagonalPaddedKeysMask.from_seqlens(q_seqlen, kv_padding, kv_seqlen)
        return cls(whole.q_seqinfo, whole.k_seqinfo, window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """BlockDiagonalCausalWithOffsetPaddedKeysMask, and of those keys the last _window_size, the query's own too."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _window("_window_size", self._window_size, 1)
        super().__post_init__()

    @property
    def band(self) -> Band:
        return Band(self._window_size - 1, 0)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        whole = BlockDiagonalPaddedKeysMask.from_seqlens(q_seqlen, kv_padding, kv_seqlen)
        return cls(whole.q_seqinfo, whole.k_seqinfo, window_size)


@dataclass
class BlockDiagonalGappyKeysMask(_Blocks):
    """BlockDiagonalMask on keys with gaps between the sequences."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Device = None,
    ) -> Self:
        """kv_seqstarts: where each sequence of keys begins, and where all rows end. They may not overlap."""
        queries = lengths.packed("q_seqlen", q_seqlen, device)
        return cls(queries, lengths.gappy("kv_seqlen", kv_seqstarts, kv_seqlen, device))


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """BlockDiagonalGappyKeysMask, causal from the bottom right of each block."""

    @property
    def band(self) -> Band:
        return Band(right=0)


@dataclass
class PagedBlockDiagonalPaddedKeysMask(AttentionBias):
    """Keys in pages of one pool, (1, num_blocks · page_size, Hk, K). Forward only: pages have no gradient.

    block_tables: int32 (sequences, pages of the longest): key j of sequence i is row j % page_size of page
        block_tables[i, j // page_size].
    """

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    block_tables: Tensor
    page_size: int

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: Device = None,
    ) -> Self:
        """q_seqlen, kv_seqlen: the sequences' lengths. device: as BlockDiagonalMask.from_seqlens."""
        queries, keys = (
            lengths.packed(argument, seqlens, device)
            for argument, seqlens in (("q_seqlen", q_seqlen), ("kv_seqlen", kv_seqlen))
        )
        return cls(queries, keys, block_tables, page_size)

    def call(self, device: torch.device) -> Call:
        """flash_attn_varlen_func's arguments, but for block_table."""
        queries, keys = (info.to(device) for info in (self.q_seqinfo, self.k_seqinfo))
        window_size = self.band.left, self.band.right
        return Call(queries.seqstart, keys.seqstart, queries.max_seqlen, keys.max_seqlen, window_size)

    def to(self, device: torch.device | str) -> Self:
        queries, keys = (info.to(torch.device(device)) for info in (self.q_seqinfo, self.k_seqinfo))
        return replace(self, q_seqinfo=queries, k_seqinfo=keys, block_tables=self.block_tables.to(device))

    def visible(self, seqlen_q: int, seqlen_k: int, device: Device = "cpu") -> Tensor:
        """seqlen_k: rows of the pool."""
        seen = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        for table, (q, end_q), length in zip(
            self.block_tables.tolist(), self.q_seqinfo.intervals(), self.k_seqinfo.seqlen_py, strict=True
        ):
            rows = [table[key // self.page_size] * self.page_size + key % self.page_size for key in range(length)]
            seen[q:end_q, rows] = self.band.visible(end_q - q, length, device)
        return seen


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """PagedBlockDiagonalPaddedKeysMask, causal from the bottom right of each block."""

    @property
    def band(self) -> Band:
        return Band(right=0)
