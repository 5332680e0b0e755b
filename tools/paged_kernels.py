"""Compiles the kernels that read keys in pages for a Tesla T4 (sm_75), without one, and reads their machine code.

    python -m tools.paged_kernels [--head-dim 64 128 256] [--page-size 16 64 256]

For one query of fp16, whose heads share key heads by four. It needs triton.
"""

import argparse
import itertools
from collections.abc import Sequence

from tools.offline import compile_spec, in_own_process
from tools.offline.engine_kernels import paged
from tools.offline.figures import blocks_per_sm


def rows(head_dims: Sequence[int], page_sizes: Sequence[int]) -> list[str]:
    """Of a table. Call it in a process of its own."""
    found = []
    for head_dim, page_size in itertools.product(head_dims, page_sizes):
        spec = paged(head_dim, page_size)
        code = compile_spec(spec, turing=True)
        queries, keys, warps, stages = dict(spec.options).values()
        cells = (
            f"{head_dim}, {page_size}",
            f"{queries}x{keys}, {warps}, {stages}",
            f"{code.hmma} / {code.ffma} / {code.spills}",
            f"{code.registers}, {code.shared / 1024:.3g} KB",
            str(blocks_per_sm(code.registers, code.shared, code.num_warps)),
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.paged_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, nargs="+", default=(64, 128, 256), metavar="D")
    parser.add_argument("--page-size", type=int, nargs="+", default=(16, 64, 256), metavar="ROWS")
    asked = parser.parse_args(arguments)
    print("| head_dim, page | tiles, warps, stages | HMMA / FFMA / spills | registers, shared | blocks an SM |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(in_own_process(rows, asked.head_dim, asked.page_size)))


if __name__ == "__main__":
    main()
