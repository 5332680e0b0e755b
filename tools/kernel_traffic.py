"""Main memory traffic of the fused engine's kernels: as its tiles say, and as their PTX is seen to move it.

    python -m tools.kernel_traffic [--seqlen 256] [--json FILE]

The model counts every load of a tile: what leaves the first-level cache if that holds nothing. Blocks of the block
structure, 128 rows, that are needed at all are loaded whole. Measured are 32-byte sectors of executed loads and stores
(tools/ptx), and the distinct ones among them, below which no cache can bring it. One causal fp16 head.
"""

import argparse
import json
import pathlib
import sys

import torch

from compiled_fa.engines.fused.blocks import BLOCK
from compiled_fa.engines.fused.options import options_for
from compiled_fa.engines.nvidia import TURING
from compiled_fa.problem import Direction
from tools.offline.engine_kernels import CLASSES, DIRECTIONS, PLAIN

HALF, FP32 = 2, 4


def modelled(direction: Direction, head_dim: int, seqlen: int) -> dict[str, int]:
    """Bytes of each kind that a kernel moves, with the tiles of the engine's table."""
    tiles = dict(options_for(direction, head_dim, torch.float16, CLASSES[PLAIN].features, TURING))
    row, statistics = head_dim * HALF, seqlen * FP32

    def keys_seen(tile: int) -> int:
        stops = [min(start + tile, seqlen) for start in range(0, seqlen, tile)]
        return sum(min(-(-stop // BLOCK) * BLOCK, seqlen) for stop in stops)

    def queries_that_see(tile: int) -> int:
        return sum(seqlen - start // BLOCK * BLOCK for start in range(0, seqlen, tile))

    if direction == "forward":
        return {
            "q, out, lse": 2 * seqlen * row + statistics,
            "k, v for each tile of queries": keys_seen(tiles["BLOCK_M"]) * 2 * row,
        }
    return {
        "k, v, dk, dv": 4 * seqlen * row,
        "q, dout, lse, delta for each tile of keys": queries_that_see(tiles["BLOCK_N1"]) * (2 * row + 2 * FP32),
        "q, dout, dq, lse, delta": 3 * seqlen * row + 2 * statistics,
        "k, v for each tile of queries": keys_seen(tiles["BLOCK_M2"]) * 2 * row,
    }


def measured(direction: Direction, head_dim: int, seqlen: int) -> dict[str, float]:
    """Counted while the kernel's PTX runs."""
    from tools.ptx.engine import measure

    counters = measure(head_dim, seqlen)[direction]
    return {
        "sector_bytes": counters.sector_bytes,
        "distinct_bytes": counters.global_bytes,
        "flop_per_distinct_byte": counters.arithmetic_intensity,
        "shared_transactions": counters.shared_transactions,
        "bank_conflicts": counters.bank_conflicts,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = []
    print("kernel          modelled   measured  distinct   FLOP/byte   shared transactions (conflicts)")
    for direction in DIRECTIONS:
        for head_dim in options.head_dim:
            model = modelled(direction, head_dim, options.seqlen)
            found = measured(direction, head_dim, options.seqlen)
            rows.append({"direction": direction, "head_dim": head_dim, "model": model, "measured": found})
            print(
                f"{direction:<8} {head_dim:>4}{sum(model.values()):>12}{found['sector_bytes']:>11.0f}"
                f"{found['distinct_bytes']:>10.0f}{found['flop_per_distinct_byte']:>12.0f}"
                f"{found['shared_transactions']:>12.0f} ({found['bank_conflicts']:.0f})",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"seqlen": options.seqlen, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
