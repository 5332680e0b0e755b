"""Decode a batch of sequences whose keys and values lie in pages of one pool, as serving does it.

    python examples/paged_decoding.py

A sequence owns pages of 16 tokens, wherever they lie; block_table says which, in order, and flash_attn_varlen_func
reads them where they are. A sequence that grows takes a free page when its last one is full. Every step is held
against PyTorch's scaled_dot_product_attention on the same keys in one piece.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_fa import flash_attn_varlen_func

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

    def append(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """k and v (tokens, heads, head_dim), behind what the sequence has."""
        for row in range(k.shape[0]):
            page, place = divmod(self.lengths[sequence], PAGE)
            if page == len(self.pages[sequence]):
                self.pages[sequence].append(self.free.pop())
            at = self.pages[sequence][page]
            self.k[at, place], self.v[at, place] = k[row], v[row]
            self.lengths[sequence] += 1

    def block_table(self) -> Tensor:
        """int32 (sequences, pages of the longest); what lies behind a sequence's last page is never read."""
        widest = max(len(pages) for pages in self.pages)
        return torch.tensor([pages + [0] * (widest - len(pages)) for pages in self.pages], dtype=torch.int32)

    def attend(self, q: Tensor) -> Tensor:
        """One query of each sequence, (sequences, heads, head_dim), on all its keys."""
        queries = torch.arange(len(self.lengths) + 1, dtype=torch.int32)
        keys = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return flash_attn_varlen_func(
            q, self.k, self.v, queries, keys, 1, max(self.lengths), block_table=self.block_table()
        )


def in_one_piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (heads, head_dim), k and v (tokens, heads, head_dim)."""
    q, k, v = q[:, None], k.transpose(0, 1), v.transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, 0]


def main() -> int:
    torch.manual_seed(0)
    cache = PagedCache(len(PROMPTS))
    history = [torch.randn(2, tokens, NHEADS_K, HEAD_DIM) for tokens in PROMPTS]  # the same k and v, in one piece
    for sequence, (k, v) in enumerate(history):
        cache.append(sequence, k, v)
    apart = 0.0
    for _ in range(STEPS):
        for sequence in range(len(PROMPTS)):
            new = torch.randn(2, 1, NHEADS_K, HEAD_DIM)
            cache.append(sequence, *new)
            history[sequence] = torch.cat([history[sequence], new], 1)
        q = torch.randn(len(PROMPTS), NHEADS, HEAD_DIM)
        expected = torch.stack([in_one_piece(query, *kv) for query, kv in zip(q, history, strict=True)])
        apart = max(apart, (cache.attend(q) - expected).abs().max().item())
    right = apart <= TOLERANCE
    print(f"{STEPS} steps of {len(PROMPTS)} sequences, now of {cache.lengths} tokens, page by page {cache.pages}")
    print(f"greatest difference from SDPA: {apart:.1e}, allowed {TOLERANCE:.0e}: {'right' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
