"""Tile sizes of Triton kernels: FUSED of the fused engine's, OWN of the triton engine's.

No card was there to measure them on: they were found by compiling for sm_75 and reading the machine code.
"""

from __future__ import annotations

from .form import FlexOptions, Fused, OwnKernels, TileOptions


def _forward(block_m: int, block_n: int, num_warps: int, num_stages: int) -> FlexOptions:
    return (("BLOCK_M", block_m), ("BLOCK_N", block_n), ("num_warps", num_warps), ("num_stages", num_stages))


def _backward(m1: int, n1: int, m2: int, n2: int, num_warps: int, num_stages: int) -> FlexOptions:
    blocks = (("BLOCK_M1", m1), ("BLOCK_N1", n1), ("BLOCK_M2", m2), ("BLOCK_N2", n2))
    return (*blocks, ("num_warps", num_warps), ("num_stages", num_stages))


# The best that `python -m tools.turing_report --search` found for fp16, in the order of `ranked` there: in Turing's
# shared memory, without spills (or with the fewest), then with warps and a pipeline to hide latency, then by the cycles
# that the loops' instructions take. Behind each: registers; blocks an SM; the share of the tensor cores' peak that
# those cycles allow, "dense" causal, "many" with all. The tool's report compiles each with and without GQA; where the
# first in order spills then, or takes all 64 KB though an equal one does not, this is the next. "packed" was not
# searched: it is the dense entry, or where that spills the next of dense ones that does not. Forward 128 "dense" and
# backward 64, 128 and 256 "dense" were searched with shared memory at its rate, 64 bytes a cycle; for the shares of the
# others it was counted at twice that.
_TURING_FP16: dict[tuple[str, int, str], FlexOptions] = {
    ("forward", 32, "dense"): _forward(128, 64, 4, 2),  # 238, 2, 91 %
    ("forward", 32, "packed"): _forward(128, 64, 4, 2),  # 244, 2, 84 %
    ("forward", 32, "many"): _forward(64, 64, 4, 2),  # 163, 3, 26 %
    ("forward", 64, "dense"): _forward(128, 32, 4, 2),  # 236, 2, 100 %
    ("forward", 64, "packed"): _forward(128, 32, 4, 2),  # 232, 2, 100 %
    ("forward", 64, "many"): _forward(64, 64, 4, 2),  # 255, 2, 48 %
    ("forward", 128, "dense"): _forward(128, 32, 8, 2),  # 240, 1, 72 %
    ("forward", 128, "packed"): _forward(128, 32, 8, 2),  # 230, 1, 100 %
    ("forward", 128, "many"): _forward(128, 32, 8, 1),  # 216, 1, 73 %
    ("forward", 256, "dense"): _forward(64, 32, 4, 2),  # 255, 1, 100 %; 10 spills with GQA
    ("forward", 256, "packed"): _forward(64, 16, 4, 1),  # 255, 1, 65 %
    ("forward", 256, "many"): _forward(64, 16, 4, 1),  # 255, 1, 64 %; spills
    ("backward", 32, "dense"): _backward(16, 128, 128, 16, 4, 2),  # 222, 2, 100 %
    ("backward", 32, "packed"): _backward(16, 128, 128, 16, 4, 2),  # 254, 2, 92 %
    ("backward", 32, "many"): _backward(32, 64, 64, 32, 4, 2),  # 218, 2, 34 %
    ("backward", 64, "dense"): _backward(32, 64, 64, 32, 4, 2),  # 254, 2, 64 %
    ("backward", 64, "packed"): _backward(16, 64, 64, 16, 4, 2),  # 254, 2, 96 %
    ("backward", 64, "many"): _backward(16, 64, 64, 16, 4, 2),  # 168, 2, 61 %
    ("backward", 128, "dense"): _backward(32, 32, 32, 32, 4, 1),  # 255, 2, 46 %
    ("backward", 128, "packed"): _backward(32, 32, 32, 32, 4, 1),  # 248, 2, 83 %
    ("backward", 128, "many"): _backward(32, 32, 32, 32, 4, 1),  # 246, 2, 83 %
    ("backward", 256, "dense"): _backward(32, 32, 32, 32, 8, 2),  # 255, 1, 28 %
    ("backward", 256, "packed"): _backward(32, 32, 32, 32, 8, 2),  # 255, 1, 52 %
    ("backward", 256, "many"): _backward(16, 32, 32, 16, 8, 2),  # 234, 1, 28 %
}


# bf16 and fp32, which Turing's tensor cores do not take: scalar arithmetic on operands in shared memory, of which a
# block has 64 KB. The largest tiles of a few tried that fit there; behind each, KB of shared memory with all features
# in fp32. At head_dim 256 the smallest tiles do not fit backward, so that class is not here.
_TURING_WIDE: dict[tuple[str, int], FlexOptions] = {
    ("forward", 32): _forward(32, 32, 4, 1),
    ("forward", 64): _forward(32, 32, 4, 1),  # 20
    ("forward", 128): _forward(32, 32, 4, 1),  # 36
    ("backward", 32): _backward(32, 32, 32, 32, 8, 1),
    ("backward", 64): _backward(32, 32, 32, 32, 8, 1),  # 36
    ("backward", 128): _backward(16, 16, 16, 16, 8, 1),  # 33
}

# Newer GPUs: by the KB of shared memory that a block may have there, the bytes of an element, and head_dim, for which
# the template rounds up to a power of two. What a kernel takes of it (bytes, in the template): forward a tile of q,
# `num_stages - 1` (at least 1) of k and v and one of probabilities, backward tiles of q, dout, k, v and of dS. In 16
# bits they are tiles of PyTorch's own tables for flex_attention, measured by its people on A100, H100 and RTX 50, where
# those fit; the others are the largest of a few that do, with few spills (behind some: how many, packed with softcap).
# No card was there to measure these on.
_AMPERE: dict[tuple[int, int, str, int], FlexOptions] = {
    (99, 2, "forward", 64): _forward(128, 64, 4, 2),
    (99, 2, "forward", 128): _forward(128, 64, 8, 2),
    (99, 2, "forward", 256): _forward(32, 64, 4, 2),
    (99, 2, "backward", 64): _backward(32, 64, 64, 32, 4, 2),
    (99, 2, "backward", 128): _backward(32, 64, 64, 32, 4, 2),  # 60
    (99, 2, "backward", 256): _backward(32, 32, 32, 32, 8, 1),
    (99, 4, "forward", 64): _forward(64, 32, 4, 2),
    (99, 4, "forward", 128): _forward(32, 32, 4, 2),
    (99, 4, "forward", 256): _forward(32, 16, 4, 2),
    (99, 4, "backward", 64): _backward(32, 32, 32, 32, 8, 1),
    (99, 4, "backward", 128): _backward(32, 32, 32, 32, 8, 1),
    (99, 4, "backward", 256): _backward(16, 16, 16, 16, 8, 1),  # 143
    (163, 2, "forward", 64): _forward(128, 64, 4, 3),
    (163, 2, "forward", 128): _forward(128, 64, 8, 3),
    (163, 2, "forward", 256): _forward(32, 64, 4, 3),
    (163, 2, "forward", 512): _forward(32, 32, 4, 2),  # 39
    (163, 2, "backward", 64): _backward(64, 64, 64, 64, 4, 2),
    (163, 2, "backward", 128): _backward(64, 64, 64, 64, 4, 2),
    (163, 2, "backward", 256): _backward(32, 32, 32, 32, 8, 1),
    (163, 2, "backward", 512): _backward(16, 16, 16, 16, 8, 1),
    (163, 4, "forward", 64): _forward(64, 32, 4, 2),
    (163, 4, "forward", 128): _forward(32, 32, 4, 2),
    (163, 4, "forward", 256): _forward(32, 32, 8, 2),  # 23
    (163, 4, "backward", 64): _backward(32, 32, 32, 32, 8, 1),
    (163, 4, "backward", 128): _backward(32, 32, 32, 32, 8, 1),
    (163, 4, "backward", 256): _backward(32, 32, 32, 32, 8, 1),
    (227, 2, "forward", 64): _forward(128, 128, 4, 3),
    (227, 2, "forward", 128): _forward(128, 64, 8, 3),
    (227, 2, "forward", 256): _forward(64, 32, 4, 3),
    (227, 2, "forward", 512): _forward(64, 32, 8, 2),  # 67
    (227, 2, "backward", 64): _backward(64, 128, 128, 64, 8, 3),
    (227, 2, "backward", 128): _backward(64, 128, 128, 64, 8, 3),
    (227, 2, "backward", 256): _backward(64, 64, 64, 64, 4, 2),  # 1,154 with 8 warps
    (227, 2, "backward", 512): _backward(16, 16, 16, 16, 8, 1),
    (227, 4, "forward", 64): _forward(64, 32, 4, 2),
    (227, 4, "forward", 128): _forward(32, 32, 4, 2),
    (227, 4, "forward", 256): _forward(32, 32, 8, 2),
    (227, 4, "backward", 64): _backward(32, 32, 32, 32, 8, 1),
    (227, 4, "backward", 128): _backward(32, 32, 32, 32, 8, 1),
    (227, 4, "backward", 256): _backward(32, 32, 32, 32, 8, 1),
}

# Few queries on keys in pages: as few rows as tl.dot takes; what counts is how many bytes an SM has asked memory for.
# On Turing, behind each: registers, KB of shared memory, blocks an SM. None of those tried there spills: tiles of 16 to
# 64 keys, 4 warps, 1 or 2 stages. Newer GPUs: the largest that fit in 99 KB.
_FEW_ROWS: dict[tuple[str, int], FlexOptions] = {
    ("Turing, fp16", 64): _forward(16, 64, 4, 2),  # 128, 20, 3
    ("Turing, fp16", 128): _forward(16, 32, 4, 2),  # 128, 21, 3; with 64 keys 196, 38, 1
    ("Turing, fp16", 256): _forward(16, 32, 4, 2),  # 196, 41, 1
    ("Turing", 64): _forward(16, 32, 4, 1),
    ("Turing", 128): _forward(16, 32, 4, 1),
    ("16 bits", 128): _forward(16, 64, 4, 3),
    ("16 bits", 256): _forward(16, 32, 4, 3),
    ("16 bits", 512): _forward(16, 16, 4, 3),
    ("32 bits", 64): _forward(16, 32, 4, 3),
    ("32 bits", 128): _forward(16, 32, 4, 2),
    ("32 bits", 256): _forward(16, 16, 4, 2),
}

# The triton engine's on Turing, by (kernel, head_dim, kind of terms). Of the tiles that `tools.own_kernels --search`
# tries, and that neither spill nor take more than 64 KB, the first in its order (head_dim 64 with causal, dropout and
# all; 128 and 256 with dropout alone, and up to 64 rows); or another of the first few where `tools.turing_cycles`
# simulates it as faster: forward 64 with terms, queries and keys 128. Keys 64 are the best of six simulated, keys 256
# what fits; 32 was not searched. Forward 256 with dropout spills with all of them: 15 instructions with these.
_OWN_FP16: dict[tuple[str, int, str], TileOptions] = {
    ("forward", 32, "plain"): (128, 64, 4, 2),
    ("forward", 32, "many"): (128, 64, 4, 2),
    ("forward", 64, "plain"): (128, 32, 4, 2),
    ("forward", 64, "many"): (64, 64, 4, 2),
    ("forward", 128, "plain"): (128, 32, 8, 2),
    ("forward", 128, "many"): (128, 32, 8, 2),
    ("forward", 256, "plain"): (64, 16, 4, 1),
    ("forward", 256, "many"): (64, 16, 4, 1),
    ("queries", 32, "plain"): (64, 32, 4, 2),
    ("queries", 32, "many"): (64, 32, 4, 2),
    ("queries", 64, "plain"): (64, 32, 4, 2),
    ("queries", 64, "many"): (64, 32, 4, 2),
    ("queries", 128, "plain"): (32, 32, 4, 1),
    ("queries", 128, "many"): (32, 32, 4, 1),
    ("queries", 256, "plain"): (32, 16, 4, 1),
    ("queries", 256, "many"): (32, 16, 4, 1),
    ("keys", 32, "plain"): (32, 64, 4, 2),
    ("keys", 32, "many"): (32, 64, 4, 2),
    ("keys", 64, "plain"): (32, 64, 4, 2),
    ("keys", 64, "many"): (32, 64, 4, 2),
    ("keys", 128, "plain"): (32, 32, 4, 2),
    ("keys", 128, "many"): (32, 32, 4, 1),
    ("keys", 256, "plain"): (16, 32, 8, 1),
    ("keys", 256, "many"): (16, 32, 8, 1),
}


def _of_flex(options: FlexOptions) -> dict[str, TileOptions]:
    """The template's options as those of kernels of our own, whose tiles are of the same shapes."""
    found, warps = dict(options), dict(options[-2:])
    of = {"forward": ("BLOCK_M", "BLOCK_N"), "queries": ("BLOCK_M2", "BLOCK_N2"), "keys": ("BLOCK_M1", "BLOCK_N1")}
    return {
        kernel: (found[m], found[n], warps["num_warps"], warps["num_stages"])
        for kernel, (m, n) in of.items()
        if m in found
    }


# Elsewhere those of the template, whose tiles take as much shared memory.
_OWN_WIDE = {
    (kernel, head_dim): own
    for (_, head_dim), options in _TURING_WIDE.items()
    for kernel, own in _of_flex(options).items()
}
_OWN_NEWER = {
    (kilobytes, itemsize, kernel, head_dim): own
    for (kilobytes, itemsize, _, head_dim), options in _AMPERE.items()
    if head_dim <= 256
    for kernel, own in _of_flex(options).items()
}

OWN = OwnKernels(measured_on=None, fp16=_OWN_FP16, wide=_OWN_WIDE, newer=_OWN_NEWER)

FUSED = Fused(measured_on=None, fp16=_TURING_FP16, wide=_TURING_WIDE, newer=_AMPERE, few_rows=_FEW_ROWS)
