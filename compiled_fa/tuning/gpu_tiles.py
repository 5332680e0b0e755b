"""The table of every device that is no CPU, where no fused kernel serves: tiles of a GPU's size.

No card was there to measure on. Larger tiles mean fewer launches, and what is here keeps those few; each number's
reason stands beside it.
"""

from __future__ import annotations

from dataclasses import replace

from .cpu import PLAIN
from .form import NEVER, Tuning

GPU = Tuning(
    name="gpu",
    sdpa_cpu=PLAIN.sdpa_cpu,
    split_kv=PLAIN.split_kv,
    tiled=replace(
        PLAIN.tiled,
        tile=512,
        # A rim costs half a tile of scores, a tile a dozen launches: 512 queries of 16 heads on 4,096 keys are 128 MB.
        banded_tile=512,
        uncut=NEVER,
        # Copied they are read twice and written once: at some 300 GB/s as long as the launches of a sequence by itself.
        chunk_bytes=16 << 20,
        kept_buffer_bytes=0,
        kept_bytes=0,
        # 1 GB of a card's 16: 4,096 tokens of 16 heads are then 2 tiles forward.
        memory_parts=16,
        whole_rows=128,  # a matrix product's own tile has as many rows
        # What is padded costs scores, and a group 20 launches and more: 2,000 sequences of 1 to 64 become two groups.
        group_scores=16 << 20,
    ),
)
