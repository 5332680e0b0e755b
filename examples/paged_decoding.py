"""Decode a batch of sequences whose keys and values lie in pages of one pool, as serving does it.

    python examples/paged_decoding.py

A sequence owns pages of 16 tokens, wherever they lie; block_table says which, in order. flash_attn_with_kvcache writes
a step's keys and values there, and attends to them where they are. A sequence that grows takes a free page when its
last one is full. Every step is held against PyTorch's scaled_dot_product_attention on the same keys in one piece.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_fa import flash_attn_with_kvcache

PAGE, NUM_PAGES = 16, 64
NHEADS, NHEADS_K, HEAD_DIM = 8, 2, 32
PROMPTS = [37, 5, 120]  # tokens that each sequence has before it decodes
STEPS = 20
TOLERANCE = 1e-5  # of values near 1: roundings of fp32


class PagedCache:
    """k and v of (pages, PAGE, heads, head_dim) for all sequences, and which pages are whose."""

    def __init__(self, sequences: int) -> None:
        self.k, self.v = torch.zeros(2, NUM_PAGES, PAGE, NHEADS_K, HEAD_DIM).unbind(0)
        self.free = torch.randperm(NUM_PAGES).tolist()  # taken in any order: pages need not be neighbours
        self.pages: list[list[int]] = [[] for _ in range(sequences)]
        self.lengths = [0] * sequences

    def block_table(self, sequences: list[int]) -> Tensor:
        """int32 (sequences, pages of the longest); what lies behind a sequence's last page is never read."""
        widest = max(len(self.pages[sequence]) for sequence in sequences)
        rows = [self.pages[sequence] + [0] * (widest - len(self.pages[sequence])) for sequence in sequences]
        return torch.tensor(rows, dtype=torch.int32)

    def attend(self, sequences: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """New tokens of these sequences, (sequences, tokens, heads, head_dim), on themselves and all before them."""
        before = torch.tensor([self.lengths[sequence] for sequence in sequences], dtype=torch.int32)
        for sequence in sequences:
            self.lengths[sequence] += q.shape[1]
            while len(self.pages[sequence]) * PAGE < self.lengths[sequence]:
                self.pages[sequence].append(self.free.pop())
        table = self.block_table(sequences)
        return flash_attn_with_kvcache(q, self.k, self.v, k, v, cache_seqlens=before, block_table=table, causal=True)


def in_one_piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (heads, head_dim), k and v (tokens, heads, head_dim)."""
    q, k, v = q[:, None], k.transpose(0, 1), v.transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, 0]


def main() -> int:
    torch.manual_seed(0)
    cache, everyone = PagedCache(len(PROMPTS)), list(range(len(PROMPTS)))
    history = [torch.randn(2, tokens, NHEADS_K, HEAD_DIM) for tokens in PROMPTS]  # the same k and v, in one piece
    for sequence, (k, v) in enumerate(history):  # prefill
        cache.attend([sequence], torch.randn(1, len(k), NHEADS, HEAD_DIM), k[None], v[None])
    apart = 0.0
    for _ in range(STEPS):
        q = torch.randn(len(PROMPTS), 1, NHEADS, HEAD_DIM)
        k, v = torch.randn(2, len(PROMPTS), 1, NHEADS_K, HEAD_DIM)
        out = cache.attend(everyone, q, k, v)
        for sequence in everyone:
            history[sequence] = torch.cat([history[sequence], torch.stack([k[sequence], v[sequence]])], 1)
        expected = torch.stack([in_one_piece(query, *kv) for query, kv in zip(q[:, 0], history, strict=True)])
        apart = max(apart, (out[:, 0] - expected).abs().max().item())
    right = apart <= TOLERANCE
    print(f"{STEPS} steps of {len(PROMPTS)} sequences, now of {cache.lengths} tokens, page by page {cache.pages}")
    print(f"greatest difference from SDPA: {apart:.1e}, allowed {TOLERANCE:.0e}: {'right' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
