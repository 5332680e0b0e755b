"""A case: one attention problem to be timed, and its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "forward+backward"]
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case:
    """lengths: (seqlen_q, seqlen_k) of every sequence; all alike unless varlen.

    page_size: keys and values lie in pages of that many rows; 0: they do not.
    compiled: every peer is called inside torch.compile'd code, with nothing beside it that would hide the call.
    layer: every peer is called between the projections of a layer (layer.py).
    """

    lengths: tuple[tuple[int, int], ...]
    nheads: int = 8
    nheads_k: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    varlen: bool = False
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    page_size: int = 0
    compiled: bool = False
    layer: bool = False

    @classmethod
    def dense(cls, seqlen: int, batch: int = 1, **options: Any) -> Case:
        return cls(((seqlen, seqlen),) * batch, **options)

    @classmethod
    def packed(cls, lengths: list[int], **options: Any) -> Case:
        return cls(tuple((length, length) for length in lengths), varlen=True, **options)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """From `to_json`, or from some of its fields."""
        lengths = tuple((int(q), int(k)) for q, k in fields["lengths"])
        left, right = fields.get("window_size", (-1, -1))
        return cls(**{**fields, "lengths": lengths, "window_size": (left, right)})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def max_seqlen_q(self) -> int:
        return max(q for q, _ in self.lengths)

    @property
    def max_seqlen_k(self) -> int:
        return max(k for _, k in self.lengths)

    @property
    def heads_per_key(self) -> int:
        return self.nheads // self.nheads_k

    @property
    def window(self) -> tuple[int, int]:
        """(left, right), -1 unbounded, causal included."""
        left, right = self.window_size
        return left, 0 if self.causal else right

    @property
    def banded(self) -> bool:
        return self.window != (-1, -1)

    @property
    def score_elements(self) -> int:
        """Elements of the score matrices, masked ones included: what naive attention writes down."""
        return self.nheads * sum(q * k for q, k in self.lengths)

    @property
    def useful_scores(self) -> int:
        """Scores that no window hides."""
        left, right = self.window
        total = 0
        for (seqlen_q, seqlen_k), count in _counted(self.lengths).items():
            position = torch.arange(seqlen_q) + seqlen_k - seqlen_q
            first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
            stop = (position + right + 1).clamp(max=seqlen_k) if right >= 0 else torch.full_like(position, seqlen_k)
            total += count * int((stop - first).clamp(min=0).sum())
        return self.nheads * total

    @property
    def key_bytes(self) -> int:
        """Bytes of k and v: what decoding has to read."""
        rows = sum(k for _, k in self.lengths)
        return 2 * rows * self.nheads_k * self.head_dim * getattr(torch, self.dtype).itemsize

    def flops(self, direction: Direction) -> int:
        """Of the matrix products: two forward, and five more backward (one of them recomputes the scores)."""
        return (4 if direction == "forward" else 14) * self.head_dim * self.useful_scores

    @property
    def label(self) -> str:
        shortest = min(k for _, k in self.lengths)
        if self.varlen:
            shape = f"{self.batch} seqs of {shortest}..{self.max_seqlen_k}"
        elif self.max_seqlen_q != self.max_seqlen_k:
            shape = f"B{self.batch} Sq{self.max_seqlen_q} Sk{self.max_seqlen_k}"
        else:
            shape = f"B{self.batch} N{self.max_seqlen_k}"
        heads = f"H{self.nheads}" + (f"/{self.nheads_k}" if self.nheads_k != self.nheads else "")
        features = [
            "causal" * self.causal,
            f"window {self.window_size[0]},{self.window_size[1]}" if self.window_size != (-1, -1) else "",
            f"softcap {self.softcap:g}" if self.softcap else "",
            "ALiBi" * self.alibi,
            f"dropout {self.dropout_p:g}" if self.dropout_p else "",
            f"pages of {self.page_size}" if self.page_size else "",
            "compiled" * self.compiled,
            "layer" * self.layer,
        ]
        return " ".join(filter(None, [shape, heads, f"D{self.head_dim}", SHORT_DTYPES[self.dtype], *features]))


def _counted(lengths: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for pair in lengths:
        counts[pair] = counts.get(pair, 0) + 1
    return counts


class Inputs:
    """A case's tensors, packed: q, dout (Tq, H, D), k, v (Tk, Hk, D); `batched` views them as dense."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)

        def rows(total: int, nheads: int) -> Tensor:
            dtype = getattr(torch, case.dtype)
            return torch.randn(total, nheads, case.head_dim, generator=generator, device=device, dtype=dtype)

        starts_q, starts_k = (list(accumulate((pair[side] for pair in case.lengths), initial=0)) for side in (0, 1))
        self.starts = starts_q, starts_k
        self.q, self.dout = rows(starts_q[-1], case.nheads), rows(starts_q[-1], case.nheads)
        self.k, self.v = rows(starts_k[-1], case.nheads_k), rows(starts_k[-1], case.nheads_k)
        self.cu_seqlens_q, self.cu_seqlens_k = (
            torch.tensor(starts, dtype=torch.int32, device=device) for starts in self.starts
        )
        # The slopes of the ALiBi paper (arXiv 2108.12409) for a power of two of heads.
        heads = torch.arange(1, case.nheads + 1, device=device)
        self.alibi_slopes = torch.exp2(-8.0 * heads / case.nheads) if case.alibi else None

    def batched(self, rows: Tensor) -> Tensor:
        """(T, heads, D) -> (B, S, heads, D)."""
        return rows.unflatten(0, (self.case.batch, -1))

    def sequence(self, rows: Tensor, number: int, side: int) -> Tensor:
        """Rows of one sequence. side: 0 query, 1 key."""
        return rows[self.starts[side][number] : self.starts[side][number + 1]]

    def visible(self, seqlen_q: int, seqlen_k: int) -> Tensor | None:
        """Which keys a query sees, bool (Sq, Sk); None: all."""
        left, right = self.case.window
        if not self.case.banded:
            return None
        position = torch.arange(seqlen_q, device=self.device)[:, None] + seqlen_k - seqlen_q
        key = torch.arange(seqlen_k, device=self.device)
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=self.device)
        if left >= 0:
            seen &= key >= position - left
        if right >= 0:
            seen &= key <= position + right
        return seen

    def bias(self, seqlen_q: int, seqlen_k: int) -> Tensor | None:
        """What is added to the scores, (H, Sq, Sk) in the case's dtype; None: nothing."""
        if self.alibi_slopes is None:
            return None
        position = torch.arange(seqlen_q, device=self.device)[:, None] + seqlen_k - seqlen_q
        distance = (position - torch.arange(seqlen_k, device=self.device)).abs()
        return (-self.alibi_slopes[:, None, None] * distance).to(getattr(torch, self.case.dtype))
