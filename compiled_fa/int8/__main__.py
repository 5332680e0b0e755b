"""`python -m compiled_fa.int8`: int8 attention beside fp16's, how wrong and how fast."""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..timing import interleaved_medians
from .interface import attention

KEYS = ("normal", "a common offset", "outliers in a channel")
COLUMNS = ("keys", "head_dim", "fp16 SDPA", "int8", "int8, keys not smoothed", "time / SDPA's")


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    out: Tensor = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def drawn(keys: str, seqlen: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (1, seqlen, 8, head_dim), fp16, normal but for the keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 8, head_dim, generator=generator) for _ in range(3))
    if keys == KEYS[1]:
        k += 8 * torch.randn(1, 1, 8, head_dim, generator=generator)
    elif keys == KEYS[2]:
        k[..., 0] *= 8
    q, k, v = (x.to(device, torch.float16) for x in (q, k, v))
    return q, k, v


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, over that of what is wanted."""
    return float((found.double() - wanted).norm() / wanted.norm())


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compiled_fa.int8", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where it is")
    parser.add_argument("--seqlen", type=int, default=1024)
    asked = parser.parse_args(given)
    device = torch.device(asked.device)
    print(f"Relative error (root mean square) against float64; 1 x {asked.seqlen} x 8 heads, on {device}")
    print("| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|", sep="\n")
    with torch.inference_mode():
        for head_dim in (64, 128):
            for keys in KEYS:
                q, k, v = drawn(keys, asked.seqlen, head_dim, device)
                wanted = exact(q, k, v)
                found = [sdpa(q, k, v), attention(q, k, v), attention(q, k, v, smooth_k=False)]
                errors = [f"{100 * distance(x, wanted):.2f} %" for x in found]
                calls = {"int8": partial(attention, q, k, v), "SDPA": partial(sdpa, q, k, v)}
                times = interleaved_medians(calls, device)
                cells = [keys, str(head_dim), *errors, f"{times['int8'] / times['SDPA']:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
