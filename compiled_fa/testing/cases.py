"""An attention problem, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from ..problem import Packed, Problem, bias_part

if TYPE_CHECKING:
    from typing_extensions import Self

Slopes = Literal["none", "heads", "batch", "paper"]
DIMS = "bhqk"  # of a bias: sequences, heads, queries, keys

NOBODY = 10**6  # a block that does not exist
UNUSED_PAGES = 2

C = TypeVar("C", bound="Case")


@dataclass(frozen=True)
class Bias:
    """A bias of a dense case, with which some keys are hidden, and of some queries all.

    varies: with which of DIMS. dtype: bool, or of floating point. The dimensions of which it has one element are
    expanded where `expanded`, else of size 1. transposed: keys lie furthest apart in memory.
    """

    varies: str = DIMS
    dtype: torch.dtype = torch.float32
    expanded: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Case:
    """lengths: (seqlen_q, seqlen_k) of every sequence.

    dense: sequences are of one length, and tensors (B, S, H, D); else they are packed, (T, H, D).
    heads_per_key: query heads that read one key head, of which there are nheads_k.
    head_dim_v: of v; 0: q's and k's head_dim.
    window_size, softmax_scale, softcap, dropout_p: as flash_attn_func's.
    slopes: ALiBi's: "none"; "heads", (H,), or "batch", (B, H), at random; "paper", (H,), the paper's for so many heads.
    seed: of the tensors and of dropout.
    page_size: rows of the pages in which keys and values lie; q is packed then. 0: they lie in one piece.
    bias: of a dense case, or None.
    """

    lengths: tuple[tuple[int, int], ...]
    dense: bool = False
    nheads_k: int = 8
    heads_per_key: int = 1
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    slopes: Slopes = "none"
    dropout_p: float = 0.0
    seed: int = 0
    page_size: int = 0
    bias: Bias | None = None

    def __post_init__(self) -> None:
        if self.dense and len(set(self.lengths)) > 1:
            raise ValueError(f"lengths must be alike where dense is True, got {self.lengths}")
        if self.bias is not None and not self.dense:
            raise ValueError(f"bias must be None where dense is False, got {self.bias}")
        if not self.head_dim_v:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    @classmethod
    def uniform(cls, seqlen: int, batch: int = 1, **fields: Any) -> Self:
        """Dense self-attention."""
        return cls(((seqlen, seqlen),) * batch, dense=True, **fields)

    @classmethod
    def packed(cls, lengths: Sequence[int], **fields: Any) -> Self:
        """Packed self-attention."""
        return cls(tuple((length, length) for length in lengths), **fields)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def nheads(self) -> int:
        return self.nheads_k * self.heads_per_key

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def max_seqlen_q(self) -> int:
        return max((q for q, _ in self.lengths), default=0)

    @property
    def max_seqlen_k(self) -> int:
        return max((k for _, k in self.lengths), default=0)


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 (B + 1,): cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@dataclass(eq=False)
class Inputs(Generic[C]):
    """A case's tensors, packed whatever its layout; `laid_out` and `per_row` bring them into the ops'.

    q: (Tq, H, D). k: (Tk, Hk, D). v: (Tk, Hk, Dv). dout: out's gradient, (Tq, H, Dv).
    dlse: lse's gradient, (H, Tq), fp32 (fp64 for fp64 inputs); None: nobody differentiates lse.
    alibi_slopes: fp32, (H,) or (B, H), or None. dropout_seed: int64, (1,), or None.
    origin: numbers of the first sequence, head and query, where these are a part of other inputs: dropout knows them.
    bias: four dimensions, or None.
    cu_seqlens_q, cu_seqlens_k: int32, (B + 1,); one and the same where lengths are, as in self-attention.
    """

    case: C
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_seed: Tensor | None = None
    origin: tuple[int, int, int] = (0, 0, 0)
    bias: Tensor | None = None
    cu_seqlens_q: Tensor = field(init=False)
    cu_seqlens_k: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths_q, lengths_k = ([pair[side] for pair in self.case.lengths] for side in (0, 1))
        self.cu_seqlens_q = self.cu_seqlens_k = cumulative(lengths_q, self.device)
        if lengths_k != lengths_q:
            self.cu_seqlens_k = cumulative(lengths_k, self.device)

    @classmethod
    def of(cls, case: C, device: torch.device | str = "cpu", std: float = 1.0) -> Self:
        """Normally distributed, of this standard deviation; made on the CPU, so that devices get the same."""
        generator = torch.Generator().manual_seed(case.seed)
        total_q, total_k = (sum(pair[side] for pair in case.lengths) for side in (0, 1))

        def rows(total: int, *shape: int) -> Tensor:
            return (torch.randn(total, *shape, generator=generator) * std).to(device, case.dtype)

        q, k = rows(total_q, case.nheads, case.head_dim), rows(total_k, case.nheads_k, case.head_dim)
        v, dout = rows(total_k, case.nheads_k, case.head_dim_v), rows(total_q, case.nheads, case.head_dim_v)
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        dlse = torch.randn(case.nheads, total_q, generator=generator, dtype=wide).to(device)
        slopes = _slopes(case, generator)
        bias = _bias(case, generator, std)
        return cls(
            case,
            q,
            k,
            v,
            dout,
            dlse,
            alibi_slopes=slopes.to(device) if slopes is not None else None,
            dropout_seed=torch.tensor([case.seed * 7919 + 1], device=device) if case.dropout_p else None,
            bias=bias.to(device) if bias is not None else None,
        )

    @property
    def device(self) -> torch.device:
        return self.q.device

    def to(self, device: torch.device | str) -> Self:
        names = ("q", "k", "v", "dout", "dlse", "alibi_slopes", "dropout_seed", "bias")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if x is not None})

    @property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        return self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def packing(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
        return *self.cu_seqlens, self.case.max_seqlen_q, self.case.max_seqlen_k

    @property
    def options(self) -> tuple[Any, ...]:
        """The ops' options, in their order, up to the engine."""
        c = self.case
        return (c.softmax_scale, c.causal, *c.window_size, c.softcap, self.alibi_slopes, c.dropout_p, self.dropout_seed)

    @property
    def varlen(self) -> bool:
        """Is it a call of the varlen op?"""
        return not self.case.dense or self.case.page_size > 0

    def batched(self, rows: Tensor) -> Tensor:
        """(T, H, D) -> (B, S, H, D)."""
        return rows.view(self.case.batch, rows.shape[0] // max(self.case.batch, 1), *rows.shape[1:])

    def laid_out(self, rows: Tensor) -> Tensor:
        """(T, H, D) -> as the ops take it."""
        return rows if self.varlen else self.batched(rows)

    def per_row(self, x: Tensor | None) -> Tensor | None:
        """(H, T) -> as lse: (B, H, S) for dense."""
        return x if x is None or self.varlen else self.batched(x.mT).mT.contiguous()

    def sequence(self, rows: Tensor, number: int, side: int) -> Tensor:
        """Rows of one sequence. side: 0 q, out and their gradients; 1 k, v and theirs."""
        first, last = self.cu_seqlens[side][number : number + 2].tolist()
        return rows[first:last]

    def part(self, number: int, head: int, queries: int) -> Self:
        """Key head `head` of sequence `number`, with the query heads that read it, and the last `queries` queries.

        Bottom right alignment makes a problem of its own of them: out and dq are those of the whole, dk and dv are what
        these queries add to them.
        """
        case, heads_per_key = self.case, self.case.heads_per_key
        seqlen_q, seqlen_k = case.lengths[number]
        heads = slice(head * heads_per_key, (head + 1) * heads_per_key)
        first = seqlen_q - queries
        of_q, of_k = (slice(first, None), heads), (slice(None), slice(head, head + 1))
        slopes, dlse, bias = self.alibi_slopes, self.dlse, self.bias
        if slopes is not None:
            slopes = slopes[heads] if slopes.dim() == 1 else slopes[number : number + 1, heads]
        return replace(
            self,
            case=replace(case, lengths=((queries, seqlen_k),), nheads_k=1),
            q=self.sequence(self.q, number, 0)[of_q],
            k=self.sequence(self.k, number, 1)[of_k],
            v=self.sequence(self.v, number, 1)[of_k],
            dout=self.sequence(self.dout, number, 0)[of_q],
            dlse=self.sequence(dlse.mT, number, 0)[of_q].mT if dlse is not None else None,
            alibi_slopes=slopes,
            bias=None if bias is None else bias_part(bias, slice(number, number + 1), *of_q[::-1], slice(None)),
            origin=(self.origin[0] + number, self.origin[1] + heads.start, self.origin[2] + first),
        )

    def pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """k and v in pages, (num_blocks, page_size, Hk, D or Dv), and their block_table, int32 (B, blocks).

        Pages lie in any order. What belongs to nobody is NaN, and where the table has no page, it names none.
        """
        page_size, lengths = self.case.page_size, [k for _, k in self.case.lengths]
        used = torch.tensor([-(-length // page_size) for length in lengths], dtype=torch.int64)
        first_page = used.cumsum(0) - used
        generator = torch.Generator().manual_seed(self.case.seed)
        order = torch.randperm(int(used.sum()) + UNUSED_PAGES, generator=generator)
        slots = torch.arange(max(used.tolist(), default=0) + 1)
        numbers = order[(first_page[:, None] + slots).clamp(max=len(order) - 1)]
        table = numbers.where(slots < used[:, None], NOBODY).to(self.device, torch.int32)
        position = torch.cat([torch.arange(length) for length in lengths] or [torch.arange(0)])
        page = order[first_page.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)) + position // page_size]
        places = (page * page_size + position % page_size).to(self.device)

        def paged(rows: Tensor) -> Tensor:
            pool = rows.new_full((len(order) * page_size, *rows.shape[1:]), torch.nan)
            return pool.index_copy_(0, places, rows).view(-1, page_size, *rows.shape[1:])

        return paged(self.k), paged(self.v), table

    def problem(self) -> Problem:
        """What an engine is given."""
        if self.case.page_size:
            k, v, block_table = self.pages()
            return Problem.of(self.q, k, v, Packed(*self.packing, block_table), *self.options)
        q, k, v = (self.laid_out(x) for x in (self.q, self.k, self.v))
        packed, bias = Packed(*self.packing) if self.varlen else None, self.bias
        bias_gradient = bias is not None and bias.is_floating_point()
        return Problem.of(q, k, v, packed, *self.options, bias=bias, bias_gradient=bias_gradient)


def _bias(case: Case, generator: torch.Generator, std: float) -> Tensor | None:
    if case.bias is None:
        return None
    full = case.batch, case.nheads, case.max_seqlen_q, case.max_seqlen_k
    sizes = [size if dim in case.bias.varies else 1 for dim, size in zip(DIMS, full, strict=True)]
    numbers = torch.randn(sizes, generator=generator)
    hidden = torch.rand(sizes, generator=generator) < 0.2
    if "q" in case.bias.varies:
        hidden |= torch.rand(*sizes[:3], 1, generator=generator) < 0.1
    if case.bias.dtype == torch.bool:
        bias = ~hidden
    else:
        bias = (numbers * std).masked_fill_(hidden, -torch.inf).to(case.bias.dtype)
    if case.bias.transposed:
        bias = bias.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    return bias.expand(full) if case.bias.expanded else bias


def _slopes(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.slopes == "none":
        return None
    if case.slopes == "paper":  # arXiv 2108.12409, for a power of two of heads
        return torch.exp2(-8.0 * torch.arange(1, case.nheads + 1) / case.nheads)
    shape = (case.nheads,) if case.slopes == "heads" else (case.batch, case.nheads)
    return torch.rand(shape, generator=generator)
