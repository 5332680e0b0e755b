"""Attention over rows that lie on several ranks: sequences too long for one device.

    from compiled_fa import context_parallel

    x = context_parallel.shard(x, group)                        # this rank's rows of a sequence
    out = context_parallel.attention(q, k, v, group, causal=True)
    out = context_parallel.varlen_attention(q, k, v, packing)   # packing = context_parallel.pack(cu_seqlens, group)

    layout.py    which rows a rank has, and which blocks of scores that gives: shard, unshard, positions
    ring.py      attention: keys go around in a ring of sends and receives, beside the arithmetic
    merging.py   out and lse of the same queries over several sets of keys
    gathered.py  varlen_attention: keys of a few heads at a time are gathered, beside the arithmetic

A group is a torch.distributed process group, a DeviceMesh of one dimension, or None: all ranks. All of its ranks call
together. Source: Ring Attention (arXiv 2310.01889); the balanced layout, two chunks a rank, is that of zigzag in
ring-flash-attention and of head-tail in torch; gathered heads are Llama 3's (arXiv 2407.21783).
"""

from .gathered import Packing, pack, varlen_attention
from .layout import positions, shard, unshard
from .ring import attention

__all__ = ["Packing", "attention", "pack", "positions", "shard", "unshard", "varlen_attention"]
