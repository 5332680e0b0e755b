"""Is what a peer computes this attention? A peer is timed only where it is.

The reference is attention in float64 of a sample: one key head of the first and one of the last sequence, with all the
query heads that read it; heads and sequences do not depend on one another. Where even that score matrix would be too
large, the sample is the last rows only, which bottom right alignment makes a problem of its own: it gives out and dq,
and under causal dk and dv of the last keys, which no other query sees.

Ours may have the error that check/budget.py allows; a peer, which is not what is tested, PEER_SLACK times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compiled_fa.check.budget import budget, error, magnitudes
from compiled_fa.check.naive import naive_attention
from compiled_fa.scores import Dropout

from .cases import Direction, Inputs

LARGEST_SAMPLE = 1 << 26  # score elements of a sample
LAST_ROWS = 64
PEER_SLACK = 4.0
RESULTS = ("out", "dq", "dk", "dv")
SIDES = {"out": 0, "dq": 0, "dk": 1, "dv": 1}


@dataclass(frozen=True)
class Sample:
    """Key head `head` of sequence `number`; rows: how many of its last queries."""

    number: int
    head: int
    rows: int


@dataclass(frozen=True)
class Expected:
    exact: Tensor
    allowed: float


class Reference:
    """What a case's results are, in its samples. dropout_seed: of ours; None: dropout is left out."""

    def __init__(self, inputs: Inputs, direction: Direction, dropout_seed: Tensor | None = None) -> None:
        self.inputs, self.direction, self.seed = inputs, direction, dropout_seed
        self._expected = [(sample, self._expect(sample)) for sample in self._samples()]

    def _samples(self) -> list[Sample]:
        case = self.inputs.case
        filled = [number for number, lengths in enumerate(case.lengths) if all(lengths)]
        samples = []
        for number, head in sorted({(filled[0], 0), (filled[-1], case.nheads_k - 1)}):
            seqlen_q, seqlen_k = case.lengths[number]
            small = case.heads_per_key * seqlen_q * seqlen_k <= LARGEST_SAMPLE
            samples.append(Sample(number, head, seqlen_q if small else LAST_ROWS))
        return samples

    def _part(self, sample: Sample, tensor: Tensor, side: int) -> Tensor:
        """The sample's rows and heads of a packed tensor. side: 0 q, out, dq and dout; 1 k, v, dk and dv."""
        heads = self.inputs.case.heads_per_key if side == 0 else 1
        part = self.inputs.sequence(tensor, sample.number, side)[:, sample.head * heads : (sample.head + 1) * heads]
        return part[-sample.rows :] if side == 0 else part

    def _attend(self, sample: Sample, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        case = self.inputs.case
        *qkv, dout = (x.detach().to(dtype)[None] for x in tensors)
        qkv = [x.requires_grad_(self.direction != "forward") for x in qkv]
        heads = slice(sample.head * case.heads_per_key, (sample.head + 1) * case.heads_per_key)
        slopes = self.inputs.alibi_slopes
        out, _ = naive_attention(
            *qkv,
            causal=case.causal,
            window_size=case.window_size,
            softcap=case.softcap,
            alibi_slopes=slopes[heads] if slopes is not None else None,
            dropout_p=case.dropout_p if self.seed is not None else 0.0,
            keep=self._keep(sample, heads),
        )
        results = {"out": out.detach()[0]}
        if self.direction != "forward":
            gradients = torch.autograd.grad(out, qkv, dout)
            results |= {name: x[0] for name, x in zip(RESULTS[1:], gradients, strict=True)}
            results = self._whole(sample, results)
        return results

    def _keep(self, sample: Sample, heads: slice) -> Tensor | None:
        if self.seed is None:
            return None
        seqlen_q, seqlen_k = self.inputs.case.lengths[sample.number]
        spans = (sample.number, sample.number + 1), (heads.start, heads.stop), (seqlen_q - sample.rows, seqlen_q)
        indices = [
            torch.arange(first, stop, dtype=torch.int32, device=self.seed.device).view(-1, *[1] * (3 - at))
            for at, (first, stop) in enumerate((*spans, (0, seqlen_k)))
        ]
        return Dropout.of(self.inputs.case.dropout_p, self.seed).keep(*indices)

    def _whole(self, sample: Sample, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the gradients of keys that queries outside the sample see."""
        if sample.rows == self.inputs.case.lengths[sample.number][0]:
            return results
        kept = {name: results[name] for name in ("out", "dq")}
        if self.inputs.case.causal:
            kept |= {name: results[name][-sample.rows :] for name in ("dk", "dv")}
        return kept

    def _expect(self, sample: Sample) -> dict[str, Expected]:
        inputs, case = self.inputs, self.inputs.case
        sides = (inputs.q, 0), (inputs.k, 1), (inputs.v, 1), (inputs.dout, 0)
        tensors = tuple(self._part(sample, tensor, side) for tensor, side in sides)
        exact = self._attend(sample, tensors, torch.float64)
        naive = self._attend(sample, tensors, getattr(torch, case.dtype))
        keep_probability = 1.0 - (case.dropout_p if self.seed is not None else 0.0)
        q, k, v, dout = tensors
        sizes = magnitudes(q, k, v, dout, case.head_dim**-0.5, keep_probability)
        return {name: Expected(x, budget(naive[name], x, sizes[name])) for name, x in exact.items()}

    def complaint(self, results: tuple[Tensor, ...], slack: float) -> str | None:
        """What is wrong with (out,) or (out, dq, dk, dv), packed as the inputs; None: nothing."""
        found = dict(zip(RESULTS, results, strict=False))
        for sample, expected in self._expected:
            for name, wanted in expected.items():
                part = self._part(sample, found[name], SIDES[name])[-len(wanted.exact) :]
                off, allowed = error(part, wanted.exact), slack * wanted.allowed
                if not off <= allowed:
                    return f"{name} is off by {off:.2g}, allowed {allowed:.2g}"
        return None
