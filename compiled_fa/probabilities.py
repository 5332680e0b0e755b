"""The attention probabilities as one tensor, for return_attn_probs: Sq · Sk memory, meant for tests and pictures.

Each row is divided by its greatest: exp(score - greatest score of the row). So flash_attn has it, whose kernels know no
more of a row when they write it, with the greatest so far of a row's blocks; here a row is one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import Problem


def _indices(seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(seqlen, dtype=torch.int32, device=device)


def _probabilities(problem: Problem, lse: Tensor, seqlen_q: int | Tensor, seqlen_k: int | Tensor) -> Tensor:
    """(B, H, Sq, Sk) in q's dtype, from dense q and k: each row's greatest is 1; negative where dropout drops them."""
    q, k = problem.q, problem.k
    program = problem.program(seqlen_q, seqlen_k)
    at = (
        _indices(q.shape[0], q.device)[:, None, None, None],
        _indices(q.shape[2], q.device)[:, None, None],
        _indices(q.shape[1], q.device)[:, None],
        _indices(k.shape[1], k.device),
    )
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    product = torch.einsum("bqhd,bkhd->bhqk", q.to(lse.dtype), keys.to(lse.dtype))
    probs = torch.exp(program.score(product, *at) - lse[..., None])
    probs = torch.where(program.mask(*at), probs, 0.0)
    if k.shape[1]:
        probs = probs / probs.amax(-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)  # rows without a key: 0
    return torch.where(program.keep(*at), probs, -probs).to(q.dtype)


@torch.no_grad()
def dense_probabilities(q: Tensor, k: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """flash_attn's S_dmask of a dense call with dropout; options: those of the op, in its order."""
    return _probabilities(Problem.of(q, k, k, None, *options), lse, q.shape[1], k.shape[1])


@torch.no_grad()
def varlen_probabilities(q: Tensor, k: Tensor, lse: Tensor, packing: tuple[Any, ...], *options: Any) -> Tensor:
    """flash_attn's S_dmask of a packed call with dropout: (B, H, max_seqlen_q, max_seqlen_k), 0 outside sequences.

    Not of pages: arguments.wants_probabilities refuses them.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, _ = packing

    def padded(rows: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        places = cu_seqlens[:-1, None] + _indices(longest, rows.device)
        return rows[places.clamp(max=max(rows.shape[0] - 1, 0))]

    queries, keys = padded(q, cu_seqlens_q, max_seqlen_q), padded(k, cu_seqlens_k, max_seqlen_k)
    problem = Problem.of(queries, keys, keys, None, *options)
    lse = padded(lse.mT, cu_seqlens_q, max_seqlen_q).mT
    return _probabilities(problem, lse, cu_seqlens_q.diff(), cu_seqlens_k.diff())
