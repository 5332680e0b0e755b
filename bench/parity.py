"""Is what a peer computes this attention? A peer is timed only where it is.

The reference is attention in float64 of a sample: one key head of the first and one of the last sequence, with all the
query heads that read it; heads and sequences do not depend on one another. Where even that score matrix would be too
large, the sample is the last rows only, which bottom right alignment makes a problem of its own: it gives out and dq,
and under causal dk and dv of the last keys, which no other query sees.

Ours may have the error that compiled_fa/testing/budget.py allows; a peer, which is not what is tested, PEER_SLACK times
as much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compiled_fa.testing import run_naive
from compiled_fa.testing.budget import Expected, error, magnitudes
from compiled_fa.testing.run import Results

from .cases import Direction, Inputs

LARGEST_SAMPLE = 1 << 26  # score elements of a sample
LAST_ROWS = 64
PEER_SLACK = 4.0
COMPARED = ("out", "dq", "dk", "dv")
SIDES = {"out": 0, "dq": 0, "dk": 1, "dv": 1}


@dataclass(frozen=True)
class Sample:
    """Key head `head` of sequence `number`; queries: how many of its last."""

    number: int
    head: int
    queries: int


class Reference:
    """What a case's results are, in its samples. dropout_seed: of ours; None: dropout is left out."""

    def __init__(self, inputs: Inputs, direction: Direction, dropout_seed: Tensor | None = None) -> None:
        case = inputs.case if dropout_seed is not None else replace(inputs.case, dropout_p=0.0)
        changed: dict[str, Any] = {"case": case, "dropout_seed": dropout_seed, "dlse": None}
        self.inputs = replace(inputs, **changed)
        self._expected = [(sample, self._expect(sample, direction != "forward")) for sample in self._samples()]

    def _samples(self) -> list[Sample]:
        case = self.inputs.case
        filled = [number for number, lengths in enumerate(case.lengths) if all(lengths)]
        samples = []
        for number, head in sorted({(filled[0], 0), (filled[-1], case.nheads_k - 1)}):
            seqlen_q, seqlen_k = case.lengths[number]
            small = case.heads_per_key * seqlen_q * seqlen_k <= LARGEST_SAMPLE
            samples.append(Sample(number, head, seqlen_q if small else LAST_ROWS))
        return samples

    def _expect(self, sample: Sample, gradients: bool) -> dict[str, Expected]:
        part = self.inputs.part(sample.number, sample.head, sample.queries)
        exact, naive = (
            self._whole(sample, run_naive(part, dtype, gradients)) for dtype in (torch.float64, part.case.dtype)
        )
        sizes = magnitudes(part)
        return {name: Expected.of(naive[name], x, sizes[name]) for name, x in exact.items()}

    def _whole(self, sample: Sample, results: Results) -> Results:
        """What is compared, without the gradients of keys that queries outside the sample see."""
        case, found = self.inputs.case, {name: results[name] for name in COMPARED if name in results}
        if sample.queries == case.lengths[sample.number][0]:
            return found
        last = {name: x[-sample.queries :] for name, x in found.items()}
        return last if case.causal else {name: x for name, x in last.items() if SIDES[name] == 0}

    def _part(self, sample: Sample, tensor: Tensor, side: int) -> Tensor:
        """The sample's heads of the rows of a sequence."""
        heads = self.inputs.case.heads_per_key if side == 0 else 1
        return self.inputs.sequence(tensor, sample.number, side)[:, sample.head * heads : (sample.head + 1) * heads]

    def complaint(self, results: tuple[Tensor, ...], slack: float) -> str | None:
        """What is wrong with (out,) or (out, dq, dk, dv), packed as the inputs; None: nothing."""
        found = dict(zip(COMPARED, results, strict=False))
        for sample, results_expected in self._expected:
            for name, wanted in results_expected.items():
                part = self._part(sample, found[name], SIDES[name])[-len(wanted.exact) :]
                off = error(part, wanted.exact)
                if not wanted.allows(off, slack):
                    return f"{name} is off by {off:.2g}, allowed {slack * wanted.allowed:.2g}"
        return None
