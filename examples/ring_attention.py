"""One sequence on four ranks: a layer whose attention passes keys around a ring, forward and backward.

    python examples/ring_attention.py

Each rank has two chunks of the sequence, an early and a late one, so that under causal all have as much to do. Rotary
positions are those of the rows that a rank has. out and the gradient are those of PyTorch's attention in one process.
Ranks are processes of this CPU, by gloo; on GPUs they are started by torchrun, with "nccl".
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from compiled_fa import context_parallel

RANKS, BATCH, LENGTH, NHEADS, NHEADS_K, HEAD_DIM = 4, 2, 64, 4, 2, 16
WIDTH = NHEADS * HEAD_DIM
TOLERANCE = 1e-5  # of the greatest element: roundings of fp32


def weights_and_rows() -> tuple[Tensor, Tensor]:
    """The same on every rank: of q, k and v, and one sequence a batch."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, (NHEADS + 2 * NHEADS_K) * HEAD_DIM, generator=generator) / WIDTH**0.5
    return weight.requires_grad_(), torch.randn(BATCH, LENGTH, WIDTH, generator=generator)


def qkv(weight: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x @ weight).unflatten(-1, (-1, HEAD_DIM)).split([NHEADS, NHEADS_K, NHEADS_K], dim=2)
    angles = positions[:, None, None] / 100 ** (torch.arange(HEAD_DIM // 2) / HEAD_DIM)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    return rotated(q), rotated(k), v


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    weight, x = weights_and_rows()
    own = context_parallel.shard(x)
    q, k, v = qkv(weight, own, context_parallel.positions(LENGTH))
    out = context_parallel.attention(q, k, v, causal=True)
    out.square().sum().backward()
    gradient = weight.grad
    dist.all_reduce(gradient)  # of a weight that all ranks have, and that each used for its rows
    whole = context_parallel.unshard(out)
    if rank == 0:
        torch.save((whole, gradient), Path(folder, "found"))
    dist.destroy_process_group()


def in_one_process() -> tuple[Tensor, Tensor]:
    weight, x = weights_and_rows()
    q, k, v = (y.transpose(1, 2) for y in qkv(weight, x, torch.arange(LENGTH)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return out.detach(), torch.autograd.grad(out.square().sum(), weight)[0]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=on_rank, args=(rank, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            print("a rank failed: WRONG")
            return 1
        found = torch.load(Path(folder, "found"))
    pairs = zip(found, in_one_process(), strict=True)
    apart = max(((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs)
    print(f"out and the gradient differ by at most {apart:.1e} of the greatest, allowed {TOLERANCE:.0e}")
    right = apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
