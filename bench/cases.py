"""A case to be timed: an attention problem, and where it is called; its tensors, and what peers need of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compiled_fa import testing
from compiled_fa.testing.naive import key_positions, visible_keys

Direction = Literal["forward", "forward+backward"]
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True)
class Case(testing.Case):
    """compiled: every peer is called inside torch.compile'd code, with nothing beside it that would hide the call.

    layer: every peer is called between the projections of a layer (layer.py).
    Keys in pages are for peers that can read them; a dense case gives others its keys in one piece.
    """

    compiled: bool = False
    layer: bool = False

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """From `to_json`, or from some of its fields."""
        lengths = tuple((int(q), int(k)) for q, k in fields["lengths"])
        left, right = fields.get("window_size", (-1, -1))
        dtype = getattr(torch, fields.get("dtype", "float32"))
        return cls(**{**fields, "lengths": lengths, "window_size": (left, right), "dtype": dtype})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": self.dtype_name}

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def varlen(self) -> bool:
        return not self.dense

    @property
    def alibi(self) -> bool:
        return self.slopes != "none"

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
        for (seqlen_q, seqlen_k), count in Counter(self.lengths).items():
            position = torch.arange(seqlen_q) + seqlen_k - seqlen_q
            first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
            stop = (position + right + 1).clamp(max=seqlen_k) if right >= 0 else torch.full_like(position, seqlen_k)
            total += count * int((stop - first).clamp(min=0).sum())
        return self.nheads * total

    @property
    def key_bytes(self) -> int:
        """Bytes of k and v: what decoding has to read."""
        rows = sum(k for _, k in self.lengths)
        return rows * self.nheads_k * (self.head_dim + self.head_dim_v) * self.dtype.itemsize

    def flops(self, direction: Direction) -> int:
        """Of the matrix products: two forward, and five more backward (one of them recomputes the scores)."""
        of_q_and_k, of_v = (1, 1) if direction == "forward" else (4, 3)
        return 2 * (of_q_and_k * self.head_dim + of_v * self.head_dim_v) * self.useful_scores

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
        dtype = SHORT_DTYPES[self.dtype_name]
        return " ".join(filter(None, [shape, heads, f"D{self.head_dim}", dtype, *features]))


class Inputs(testing.Inputs[Case]):
    """A case's tensors, and what peers add to the scores."""

    def visible(self, seqlen_q: int, seqlen_k: int) -> Tensor | None:
        """Which keys a query sees, bool (Sq, Sk); None: all."""
        if not self.case.banded:
            return None
        return visible_keys(seqlen_q, seqlen_k, self.case.causal, self.case.window_size, self.device)

    def alibi_bias(self, seqlen_q: int, seqlen_k: int) -> Tensor | None:
        """What is added to the scores, (H, Sq, Sk) in the case's dtype; None: nothing."""
        if self.alibi_slopes is None:
            return None
        position, key = key_positions(seqlen_q, seqlen_k, self.device)
        return (-self.alibi_slopes[:, None, None] * (position - key).abs()).to(self.case.dtype)
