"""Attention's derivative along tangents of q, k and v, in tiles: memory is linear in the lengths.

With Z = q kᵀ, its scores S, P = exp(S - lse), and ' for a tangent:

    S'   = dS/dZ (q' kᵀ + q k'ᵀ)           softmax_scale and softcap; ALiBi, a bias and masks add nothing
    lse' = rowsum(P S')
    out' = P v' + (P S') v - lse' out      dropout drops from P in both products, and not in lse'

Plain PyTorch ops, the same on every device: it does not matter which engine made out and lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .problem import Problem, bias_part
from .scores import ScoreProgram

QUERIES, KEYS = 128, 512  # of a tile
SCORES = 1 << 21  # of a tile of several sequences, at most; one sequence's may have more


@dataclass(frozen=True)
class _Sequences:
    """Sequences of one length: rows of q and out (b, m, H, .), of k and v (b, n, Hk, .), of lse (b, H, m).

    first: the number of the first of them. out_tangent, lse_tangent: to be filled.
    """

    first: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_tangent: Tensor
    k_tangent: Tensor
    v_tangent: Tensor
    out: Tensor
    lse: Tensor
    out_tangent: Tensor
    lse_tangent: Tensor


def tangents(
    problem: Problem, q_tangent: Tensor, k_tangent: Tensor, v_tangent: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """-> those of out and of lse, which the call has given."""
    out_tangent, lse_tangent = out.new_zeros(out.shape), lse.new_zeros(lse.shape)
    tensors = problem.q, problem.k, problem.v, q_tangent, k_tangent, v_tangent, out, lse, out_tangent, lse_tangent
    device = out.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        for sequences in _sequences(problem, *tensors):
            _fill(problem, sequences)
    return out_tangent, lse_tangent


def _sequences(problem: Problem, *tensors: Tensor) -> Iterator[_Sequences]:
    packed = problem.packed
    if packed is None:
        batch, seqlen_q, nheads, _ = problem.q.shape
        scores = nheads * min(seqlen_q, QUERIES) * min(problem.k.shape[1], KEYS)
        at_once = max(1, SCORES // max(1, scores))
        for first in range(0, batch, at_once):
            yield _Sequences(first, *(x[first : first + at_once] for x in tensors))
        return
    for sequence in range(problem.batch):
        rows_q, rows_k = ((sums[sequence], sums[sequence + 1]) for sums in packed.host_sums)
        rows = rows_q, rows_k, rows_k, rows_q, rows_k, rows_k, rows_q, rows_q, rows_q, rows_q
        dims = 0, 0, 0, 0, 0, 0, 0, 1, 0, 1
        parts = zip(tensors, dims, rows, strict=True)
        yield _Sequences(sequence, *(x.narrow(dim, start, stop - start)[None] for x, dim, (start, stop) in parts))


def _fill(problem: Problem, given: _Sequences) -> None:
    """One tile of queries after another, with all keys that they see."""
    seqlen_q, seqlen_k = given.q.shape[1], given.k.shape[1]
    program = problem.program(seqlen_q, seqlen_k)
    for first in range(0, seqlen_q, QUERIES):
        queries = slice(first, min(first + QUERIES, seqlen_q))
        positions = first + seqlen_k - seqlen_q, queries.stop - 1 + seqlen_k - seqlen_q
        start, stop = program.window.keys_seen_by_any(*positions, seqlen_k)
        tiles = [slice(key, min(key + KEYS, stop)) for key in range(start, stop, KEYS)]
        if tiles:
            out_tangent, lse_tangent = _tile_of_queries(problem, program, given, queries, tiles)
            given.out_tangent[:, queries] = out_tangent.transpose(1, 2)
            given.lse_tangent[:, :, queries] = lse_tangent


def _tile_of_queries(
    problem: Problem, program: ScoreProgram, given: _Sequences, queries: slice, tiles: list[slice]
) -> tuple[Tensor, Tensor]:
    """-> tangents of their out, (b, H, m, Dv), and lse, (b, H, m)."""
    dtype, device = given.lse.dtype, given.q.device
    batch, _, nheads, _ = given.q.shape
    nheads_k = given.k.shape[2]

    def of_queries(rows: Tensor) -> Tensor:
        """(b, m, H, D) -> (b, Hk, H / Hk * m, D): the query heads of a key head behind one another."""
        return rows[:, queries].transpose(1, 2).to(dtype).reshape(batch, nheads_k, -1, rows.shape[-1])

    def by_head(x: Tensor) -> Tensor:
        """(b, Hk, H / Hk * m, .) -> (b, H, m, .)."""
        return x.reshape(batch, nheads, -1, x.shape[-1])

    def by_key_head(x: Tensor) -> Tensor:
        return x.reshape(batch, nheads_k, -1, x.shape[-1])

    sequence = _indices(slice(given.first, given.first + batch), device)[:, None, None, None]
    head, query = _indices(slice(0, nheads), device)[:, None, None], _indices(queries, device)[:, None]
    q, q_tangent, lse = of_queries(given.q), of_queries(given.q_tangent), given.lse[:, :, queries, None]
    lse = lse.masked_fill(lse == -inf, inf)  # of rows without a key, whose probabilities are 0
    out_tangent, lse_tangent = torch.zeros_like(of_queries(given.out)), torch.zeros_like(lse)
    for keys in tiles:
        k, k_tangent, v, v_tangent = (
            rows[:, keys].transpose(1, 2).to(dtype) for rows in (given.k, given.k_tangent, given.v, given.v_tangent)
        )
        at = sequence, head, query, _indices(keys, device)
        product, product_tangent = by_head(q @ k.mT), by_head(q_tangent @ k.mT + q @ k_tangent.mT)
        of_scores = slice(given.first, given.first + batch), slice(0, nheads), queries, keys
        bias = None if problem.bias is None else bias_part(problem.bias, *of_scores)
        probs = torch.where(program.in_window(*at), torch.exp(program.score(product, *at, bias) - lse), 0.0)
        # dS/dZ is diagonal: what turns a gradient of S into one of Z turns a tangent of Z into one of S.
        probs_scores = probs * program.product_gradient(product_tangent, product)
        lse_tangent += probs_scores.sum(-1, keepdim=True)
        if program.dropout is not None:
            keep = program.keep(*at)
            probs, probs_scores = (torch.where(keep, x, 0.0) / (1.0 - problem.dropout_p) for x in (probs, probs_scores))
        out_tangent += by_key_head(probs) @ v_tangent + by_key_head(probs_scores) @ v
    out = given.out[:, queries].transpose(1, 2)
    return by_head(out_tangent) - lse_tangent * out, lse_tangent[..., 0]


def _indices(some: slice, device: torch.device) -> Tensor:
    return torch.arange(some.start, some.stop, dtype=torch.int32, device=device)
