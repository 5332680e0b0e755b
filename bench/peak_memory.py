"""Peak memory of one forward and backward beside its inputs, outputs and gradients, on a CPU.

    python bench/peak_memory.py --seqlen 32768

A short call first compiles the steps, so that the compiler's own memory is not counted; then Linux's high-water mark of
the resident set (VmHWM) is reset, and read after one forward and backward.
"""

import argparse
import json
from pathlib import Path

import torch

from compiled_fa import flash_attn_func

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since the last reset)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(batch: int, seqlen: int, nheads: int, head_dim: int, causal: bool) -> dict[str, float]:
    def attend(length: int) -> list[torch.Tensor]:
        q, k, v = (torch.randn(batch, length, nheads, head_dim, requires_grad=True) for _ in range(3))
        dout = torch.ones(batch, length, nheads, head_dim)
        CLEAR.write_text("5")
        before = resident("VmRSS")
        out = flash_attn_func(q, k, v, causal=causal)
        out.backward(dout)
        peak = resident("VmHWM") - before
        kept = [out, *(x.grad for x in (q, k, v) if x.grad is not None)]
        return [torch.tensor(peak), torch.tensor(sum(x.numel() * x.itemsize for x in kept))]

    attend(600)
    peak, results = (int(x) for x in attend(seqlen))
    return {"peak_mb": peak / 2**20, "results_mb": results / 2**20, "extra_mb": (peak - results) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seqlen", type=int, default=32768)
    parser.add_argument("--nheads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--full", action="store_true", help="not causal")
    options = parser.parse_args()
    shape = options.batch, options.seqlen, options.nheads, options.head_dim
    found = measure(*shape, causal=not options.full)
    score_matrix = options.batch * options.nheads * options.seqlen**2 * 4 / 2**20
    print(json.dumps({"shape": shape, "torch": torch.__version__, **found, "naive_score_matrix_mb": score_matrix}))


if __name__ == "__main__":
    main()
