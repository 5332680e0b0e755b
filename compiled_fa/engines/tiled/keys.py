"""The keys and values of a chunk, forward: held for many tiles of queries, or loaded as they pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .chunks import Chunk
from .tiles import thin


class Keys:
    """tile(start, stop) -> keys and values start to stop, each (batch_heads, rows, head_dim).

    Held: copied, heads first, before the first tile. Where one tile of queries is all, a view does as well for products
    in fp32; products in bf16 copy, slowly, what does not lie side by side. Few queries on many keys, as in decoding,
    take them tile by tile: to read them is what takes time, and a tile stays in the cache.
    """

    def __init__(self, call: Call, chunk: Chunk, dtype: torch.dtype) -> None:
        self._call, self._chunk, self._dtype = call, chunk, dtype
        alone = len(chunk.query_spans()) == 1
        self._view = alone and dtype != torch.bfloat16
        passing = alone and thin(chunk.lengths_q[1], chunk.lengths_k[1], chunk.heads_per_key)
        self._held = None if passing else self._load(0, chunk.lengths_k[1])

    def _load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        call, where = self._call, (self._chunk, start, stop, self._dtype, self._view)
        return call.load_keys("keys", call.problem.k, *where), call.load_keys("values", call.problem.v, *where)

    def tile(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if self._held is None:
            return self._load(start, stop)
        keys, values = self._held
        return keys[:, start:stop], values[:, start:stop]
