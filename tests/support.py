"""Attention cases drawn by hypothesis, and the comparison that they all go through."""

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from compiled_fa.check.budget import budget, error, magnitudes
from compiled_fa.check.naive import keep_decisions, naive_attention
from compiled_fa.engines import tiled
from compiled_fa.engines.tiled import TileSizes
from compiled_fa.problem import Packed, Problem

TILE = 16
# Nothing, one, around a tile and its multiples, primes.
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 3, 7, 13, 23, 37, 53]),
    st.integers(0, 70),
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
WINDOW_SIDE = st.one_of(st.just(-1), st.integers(0, 40))
RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """lengths: (seqlen_q, seqlen_k) of every sequence; dense: all alike, and batched."""

    lengths: tuple[tuple[int, int], ...]
    dense: bool = False
    nheads_k: int = 2
    heads_per_key: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    slopes: str = "none"  # none, heads (nheads,), batch (batch, nheads)
    dropout_p: float = 0.0
    tiles: TileSizes | None = None
    seed: int = 0

    @property
    def nheads(self) -> int:
        return self.nheads_k * self.heads_per_key


@st.composite
def cases(draw: Any, dense: bool, **fixed: Any) -> Case:
    if dense:
        lengths = (draw(st.tuples(LENGTHS, LENGTHS)),) * draw(st.integers(0, 3))
    else:
        lengths = tuple(draw(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=0, max_size=6)))
    drawn = {
        "lengths": lengths,
        "nheads_k": draw(st.integers(1, 3)),
        "heads_per_key": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([1, 3, 8, 16, 33])),
        "head_dim_v": draw(st.sampled_from([1, 5, 8, 24])),
        "dtype": draw(DTYPES),
        "causal": draw(st.booleans()),
        "window_size": draw(st.one_of(st.just((-1, -1)), st.tuples(WINDOW_SIDE, WINDOW_SIDE))),
        "softmax_scale": draw(st.sampled_from([None, None, 0.05, 1.0, -0.3])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        "slopes": draw(st.sampled_from(["none", "none", "heads", "batch"])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.7])),
        "tiles": draw(
            st.one_of(
                st.none(),
                st.builds(TileSizes, st.sampled_from([6, TILE]), st.sampled_from([7, TILE]), st.integers(1, 7)),
            )
        ),
        "seed": draw(st.integers(0, 2**31)),
    }
    return Case(dense=dense, **{**drawn, **fixed})


@dataclass
class Data:
    """A case's tensors, packed: q (T, H, D), k (T, Hk, D), v (T, Hk, Dv)."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor  # (H, T)
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    cu_seqlens: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.cu_seqlens = tuple(cumulative([pair[side] for pair in self.case.lengths]) for side in (0, 1))

    @property
    def options(self) -> tuple[Any, ...]:
        """The ops' options, in their order, up to the engine."""
        c = self.case
        return (c.softmax_scale, c.causal, *c.window_size, c.softcap, self.alibi_slopes, c.dropout_p, self.dropout_seed)

    def problem(self) -> Problem:
        q, k, v = self.q, self.k, self.v
        if self.case.dense:
            return Problem.of(self.batched(q), self.batched(k), self.batched(v), None, *self.options)
        longest = [max((pair[side] for pair in self.case.lengths), default=0) for side in (0, 1)]
        return Problem.of(q, k, v, Packed(*self.cu_seqlens, *longest), *self.options)

    def batched(self, rows: Tensor) -> Tensor:
        batch = len(self.case.lengths)
        return rows.view(batch, rows.shape[0] // max(batch, 1), *rows.shape[1:])

    def per_row(self, x: Tensor) -> Tensor:
        """(H, T) -> as lse: (B, H, S) for dense."""
        return self.batched(x.mT).mT.contiguous() if self.case.dense else x


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(case: Case, std: float = 1.0) -> Data:
    generator = torch.Generator().manual_seed(case.seed)

    def rows(total: int, *shape: int) -> Tensor:
        return (torch.randn(total, *shape, generator=generator) * std).to(case.dtype)

    total_q, total_k = (sum(pair[side] for pair in case.lengths) for side in (0, 1))
    batch = len(case.lengths)
    slopes = {"none": None, "heads": (case.nheads,), "batch": (batch, case.nheads)}[case.slopes]
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Data(
        case,
        q=rows(total_q, case.nheads, case.head_dim),
        k=rows(total_k, case.nheads_k, case.head_dim),
        v=rows(total_k, case.nheads_k, case.head_dim_v),
        dout=rows(total_q, case.nheads, case.head_dim_v),
        dlse=torch.randn(case.nheads, total_q, generator=generator, dtype=wide),
        alibi_slopes=torch.rand(slopes, generator=generator) if slopes is not None else None,
        dropout_seed=torch.tensor([case.seed * 7919 + 1]) if case.dropout_p else None,
    )


def run_tiled(data: Data) -> dict[str, Tensor]:
    """The tiled engine itself, with the case's tile sizes; everything packed."""
    return run_engine(tiled, data, data.case.tiles)


def run_engine(engine: ModuleType, data: Data, *tiles: TileSizes | None) -> dict[str, Tensor]:
    """Forward and backward of an engine; everything packed."""
    problem = data.problem()
    out, lse = engine.forward(problem, *tiles)
    dout = data.batched(data.dout) if data.case.dense else data.dout
    gradients = engine.backward(problem, dout, out, lse, data.per_row(data.dlse), *tiles)
    return packed(data, (out, lse, *gradients))


def packed(data: Data, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Results in the layout of the op -> packed, by name."""
    named = dict(zip(RESULTS, results, strict=True))
    if data.case.dense:
        named = {name: x.transpose(0, 1).flatten(1) if name == "lse" else x.flatten(0, 1) for name, x in named.items()}
    return named


def run_naive(data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """Naive attention of each sequence, differentiated by autograd."""
    case = data.case
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (data.q, data.k, data.v))
    outs, lses = [q.new_zeros(0, case.nheads, case.head_dim_v)], [q.new_zeros(case.nheads, 0)]
    (cu_q, cu_k), batch = (c.tolist() for c in data.cu_seqlens), len(case.lengths)
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        keep = None
        if data.dropout_seed is not None:
            keep = keep_decisions(data.dropout_seed, case.dropout_p, batch, case.nheads, seqlen_q, seqlen_k)[b : b + 1]
        slopes = data.alibi_slopes
        rows = q[None, cu_q[b] : cu_q[b + 1]], k[None, cu_k[b] : cu_k[b + 1]], v[None, cu_k[b] : cu_k[b + 1]]
        out, lse = naive_attention(
            *rows,
            softmax_scale=case.softmax_scale,
            causal=case.causal,
            window_size=case.window_size,
            softcap=case.softcap,
            alibi_slopes=slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes,
            dropout_p=case.dropout_p,
            keep=keep,
        )
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    loss = (out * data.dout.to(dtype)).sum() + torch.where(lse.isinf(), 0.0, lse * data.dlse.to(dtype)).sum()
    loss = loss + 0.0 * (q.sum() + k.sum() + v.sum())  # also where no sequence uses them
    gradients = torch.autograd.grad(loss, (q, k, v))
    return dict(zip(RESULTS, (out, lse, *gradients), strict=True))


def check_against_float64(data: Data, results: dict[str, Tensor]) -> None:
    """Every result within the budget of check/budget.py."""
    case = data.case
    exact, naive = run_naive(data, torch.float64), run_naive(data, case.dtype)
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    sizes = magnitudes(data.q, data.k, data.v, data.dout, scale, 1.0 - case.dropout_p, data.dlse)
    for name in results:
        assert results[name].shape == exact[name].shape, name
        found, allowed = error(results[name], exact[name]), budget(naive[name], exact[name], sizes[name])
        assert found <= allowed, (
            f"{name}: error {found:.3e}, naive {error(naive[name], exact[name]):.3e}, allowed {allowed:.3e}"
        )


__all__ = [
    "LENGTHS",
    "RESULTS",
    "Case",
    "Data",
    "cases",
    "check_against_float64",
    "cumulative",
    "make",
    "replace",
    "run_naive",
    "run_tiled",
]
