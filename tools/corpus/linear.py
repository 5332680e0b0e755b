"""Linear attention with a decay, chunk by chunk: within a chunk by its matrix of scores, across chunks by a state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tools.corpus.case import Case, Inputs, halves


@triton.jit
def linear_attention(q, k, v, log_decay, out, seqlen, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """A program a head: state = decay * state + k^T v, out = q state, for CHUNK tokens at once."""
    i, channel = tl.arange(0, CHUNK), tl.arange(0, HEAD_DIM)
    head = tl.program_id(0)
    log2_decay = tl.load(log_decay + head)
    within = tl.exp2((i[:, None] - i[None, :]).to(tl.float32) * log2_decay)
    within = tl.where(i[:, None] >= i[None, :], within, 0.0)
    from_start, to_end = tl.exp2((i + 1) * log2_decay), tl.exp2((CHUNK - 1 - i) * log2_decay)
    state = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    for start in range(0, seqlen, CHUNK):
        at = (head * seqlen + start + i[:, None]) * HEAD_DIM + channel[None, :]
        inside = start + i[:, None] < seqlen
        queries, keys = tl.load(q + at, mask=inside, other=0), tl.load(k + at, mask=inside, other=0)
        values = tl.load(v + at, mask=inside, other=0)
        score = (tl.dot(queries, tl.trans(keys)) * within).to(tl.float16)
        result = tl.dot(queries, state.to(tl.float16)) * from_start[:, None]
        result = tl.dot(score, values, result)
        tl.store(out + at, result.to(tl.float16), mask=inside)
        decayed = (keys * to_end[:, None]).to(tl.float16)
        state = tl.dot(tl.trans(decayed), values, state * tl.exp2(CHUNK * log2_decay))


def attend_linearly(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int, num_warps: int, num_stages: int
) -> Tensor:
    """(H, S, D) each, and log2 of each head's decay -> (H, S, D)."""
    nheads, seqlen, head_dim = q.shape
    out = torch.empty_like(q)
    linear_attention[(nheads,)](
        q, k, v, log_decay, out, seqlen, head_dim, chunk, num_warps=num_warps, num_stages=num_stages
    )
    return out


def _inputs(nheads: int, seqlen: int, head_dim: int) -> Inputs:
    operands = {name: halves(nheads, seqlen, head_dim) / head_dim**0.5 for name in "qkv"}
    return {**operands, "log_decay": -torch.rand(nheads) / 16}


def _token_by_token(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    q, k, v = (x.to(dtype) for x in (q, k, v))
    decay = log_decay.double().exp2().to(dtype)[:, None, None]
    state = torch.zeros(q.shape[0], q.shape[2], v.shape[2], dtype=dtype)
    found = []
    for token in range(q.shape[1]):
        state = decay * state + k[:, token, :, None] * v[:, token, None, :]
        found.append((q[:, token, None, :] @ state)[:, 0])
    return torch.stack(found, 1)


CASES = (
    Case("linear attention", attend_linearly, _inputs, _token_by_token, {"nheads": 1, "seqlen": 80, "head_dim": 32},
         {"chunk": 32, "num_warps": 4, "num_stages": 1}, {"nheads": 4, "seqlen": 512, "head_dim": 64},
         {"chunk": 64, "num_warps": 4, "num_stages": 1}),
)  # fmt: skip
