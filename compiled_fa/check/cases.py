"""What `python -m compiled_fa` checks: a case a feature, small enough to finish and large enough to have many tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .budget import budget, error, magnitudes
from .naive import keep_decisions, naive_attention

RESULTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """lengths: one for dense inputs of that batch, or one of each sequence. options: those of naive_attention."""

    name: str
    lengths: tuple[int, ...]
    nheads_k: int = 8
    varlen: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    nheads: int = 8
    head_dim: int = 64


CASES = (
    Case("dense causal", (768, 768), options={"causal": True}),
    Case("GQA", (768, 768), nheads_k=2),
    Case("varlen", (700, 1, 0, 333, 64, 129, 17), varlen=True, options={"causal": True}),
    Case("window + ALiBi", (1024,), options={"window_size": (200, 0), "alibi_slopes": True}),
    Case("softcap", (768,), options={"softcap": 20.0}),
    Case("dropout", (768,), options={"dropout_p": 0.1}),
)


class Run:
    """One case with its inputs: ours, naive attention and SDPA, forward and gradients."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, engine: str) -> None:
        self.case, self.engine = case, engine
        generator = torch.Generator().manual_seed(0)

        def rows(nheads: int) -> Tensor:
            shape = (sum(case.lengths), nheads, case.head_dim)
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.q, self.k, self.v = rows(case.nheads), rows(case.nheads_k), rows(case.nheads_k)
        self.dout = rows(case.nheads)
        self.options = dict(case.options)
        if "alibi_slopes" in self.options:
            self.options["alibi_slopes"] = torch.rand(case.nheads, generator=generator).to(device)
        self.seed = torch.tensor([2026], device=device) if "dropout_p" in self.options else None
        starts = [sum(case.lengths[:at]) for at in range(len(case.lengths) + 1)]
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = dict(self.options)
        left, right = options.pop("window_size", (-1, -1))
        options |= {"window_left": left, "window_right": right, "dropout_seed": self.seed, "engine": self.engine}
        out: Tensor
        if self.case.varlen:
            longest = max(self.case.lengths)
            out, _ = ops.varlen_attention(q, k, v, self.cu_seqlens, self.cu_seqlens, longest, longest, **options)
            return out
        batch = len(self.case.lengths)
        out, _ = ops.attention(*(x.unflatten(0, (batch, -1)) for x in (q, k, v)), **options)
        return out.flatten(0, 1)

    def naive(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for sequence, (qs, ks, vs) in enumerate(zip(*(x.split(self.case.lengths) for x in (q, k, v)), strict=True)):
            keep = None
            if self.seed is not None:
                sizes = len(self.case.lengths), q.shape[1], qs.shape[0], ks.shape[0]
                keep = keep_decisions(self.seed, self.options["dropout_p"], *sizes)[sequence : sequence + 1]
            outs.append(naive_attention(qs[None], ks[None], vs[None], keep=keep, **self.options)[0][0])
        return torch.cat(outs)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """F.scaled_dot_product_attention, where it can do the case without a bias of Sq · Sk."""
        options: dict[str, Any] = {"is_causal": self.options.get("causal", False)}
        options |= {"dropout_p": self.options.get("dropout_p", 0.0), "enable_gqa": q.shape[1] != k.shape[1]}
        outs = []
        lengths = self.case.lengths if self.case.varlen else (self.case.lengths[0],) * len(self.case.lengths)
        if self.case.varlen:
            for qs, ks, vs in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
                heads_first = (x[None].transpose(1, 2) for x in (qs, ks, vs))
                outs.append(F.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)[0])
            return torch.cat(outs)
        heads_first = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2).flatten(0, 1)

    @property
    def has_sdpa(self) -> bool:
        return not {"window_size", "alibi_slopes", "softcap"} & set(self.options)

    def results(self, attention: Callable[..., Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """out, dq, dk, dv."""
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out = attention(*inputs)
        return out, *torch.autograd.grad(out, inputs, self.dout.to(out.dtype))

    def errors(self) -> dict[str, dict[str, float]]:
        """For each result: our error against float64, naive attention's, and the budget."""
        exact = self.results(self.naive, torch.float64)
        naive, ours = self.results(self.naive), self.results(self.ours)
        keep_probability = 1.0 - self.options.get("dropout_p", 0.0)
        sizes = magnitudes(self.q, self.k, self.v, self.dout, self.q.shape[-1] ** -0.5, keep_probability)
        return {
            name: {"ours": error(o, e), "naive": error(n, e), "budget": budget(n, e, sizes[name])}
            for name, o, n, e in zip(RESULTS, ours, naive, exact, strict=True)
        }
