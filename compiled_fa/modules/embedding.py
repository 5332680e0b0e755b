"""Embeddings of tokens and positions. Source: flash_attn 2.8's modules.embedding, whose state dicts these have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GPT2Embeddings(nn.Module):
    """word_embeddings(token) + position_embeddings(position).

    Args:
        embed_dim, vocab_size: of word_embeddings.
        max_position_embeddings: 0 or less: there are none.
        padding_idx: as nn.Embedding's.
        word_embed_proj_dim: tokens are embedded in so many elements, and projected by project_in; None: not.

    Source: flash_attn.modules.embedding.GPT2Embeddings.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        word_dim = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = nn.Embedding(vocab_size, word_dim, padding_idx=padding_idx, **factory)
        self.project_in = None
        if word_embed_proj_dim is not None:
            self.project_in = nn.Linear(word_embed_proj_dim, embed_dim, bias=False, **factory)
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = nn.Embedding(max_position_embeddings, embed_dim, **factory)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """input_ids, position_ids (B, S); None: 0 to S - 1 -> (B, S, embed_dim)."""
        embeddings: Tensor = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
            embeddings = embeddings + self.position_embeddings(position_ids)
        return embeddings
