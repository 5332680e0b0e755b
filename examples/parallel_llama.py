"""A small Llama on 2 × 2 ranks: FSDP2 over the batch, tensor parallelism over heads, attention saved by a policy.

    python examples/parallel_llama.py

q, k and v reach flash_attn_func as DTensors whose heads are sharded, and leave it so. Losses, and weights after some
steps, are those of one process with PyTorch's attention. Ranks are processes of this CPU, by gloo; on GPUs a program
like this is started by torchrun, with "nccl" and a mesh of "cuda".
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import compiled_fa

VOCABULARY, WIDTH, HEAD_DIM, NHEADS, NHEADS_K, LAYERS, LENGTH, BATCH = 64, 32, 8, 4, 2, 1, 24, 4
RANKS, STEPS = (2, 2), 2  # data parallel, tensor parallel
TOLERANCE = 1e-9  # weights are float64

SAVED = functools.partial(create_selective_checkpoint_contexts, [torch.ops.compiled_fa.attention.default])


def pytorchs_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = compiled_fa.flash_attn_func(q, k, v, causal=True)
    return out


class Attention(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend
        self.wq = nn.Linear(WIDTH, NHEADS * HEAD_DIM, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, NHEADS_K * HEAD_DIM, bias=False) for _ in "kv")
        self.wo = nn.Linear(NHEADS * HEAD_DIM, WIDTH, bias=False)
        angles = torch.arange(LENGTH)[:, None] / 100 ** (torch.arange(HEAD_DIM // 2) / HEAD_DIM)
        self.register_buffer("cos", angles.cos()[:, None].double())
        self.register_buffer("sin", angles.sin()[:, None].double())

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, HEAD_DIM)) for w in (self.wq, self.wk, self.wv))
        out: Tensor = self.wo(self.attend(self.rotated(q), self.rotated(k), v).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention(attend)
        self.w1, self.w3 = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in "13")
        self.w2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def layer(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        y = self.after(x)
        out: Tensor = x + self.w2(F.silu(self.w1(y)) * self.w3(y))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.layer, x, use_reentrant=False, context_fn=SAVED)
        return out


class Llama(nn.Module):
    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(attend) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def made(attend: Any) -> Llama:
    torch.manual_seed(0)
    return Llama(attend).double()


def parallelized(model: Llama, mesh: DeviceMesh) -> None:
    """In place, as torchtitan does it: first tensor parallelism, then FSDP2 of each block and of the rest."""
    as_dtensor = ColwiseParallel(use_local_output=False)
    for block in model.blocks:
        plan: dict[str, ParallelStyle] = {f"attention.{name}": as_dtensor for name in ("wq", "wk", "wv")}
        plan.update({"w1": ColwiseParallel(), "w3": ColwiseParallel()})
        plan.update({"attention.wo": RowwiseParallel(), "w2": RowwiseParallel()})
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    for module in model.modules():
        if isinstance(module, Attention):
            module.cos, module.sin = (distribute_tensor(x, mesh["tp"], [Replicate()]) for x in (module.cos, module.sin))
    fully_shard(model, mesh=mesh["dp"])


def trained(model: Llama, first: int, stop: int) -> list[Tensor]:
    """On sequences first to stop of every batch. Returns the losses."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)[first:stop]
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS[0] * RANKS[1])
    mesh = init_device_mesh("cpu", RANKS, mesh_dim_names=("dp", "tp"))
    model = made(our_attention)
    parallelized(model, mesh)
    share = BATCH // RANKS[0]
    first = share * mesh["dp"].get_local_rank()
    losses = torch.stack(trained(model, first, first + share))
    dist.all_reduce(losses, group=mesh["dp"].get_group())
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it would say that two gathers are not one
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    if rank == 0:
        torch.save((losses / RANKS[0], weights), Path(folder, "found"))
    dist.destroy_process_group()


def main() -> int:
    model = made(pytorchs_attention)
    expected = torch.stack(trained(model, 0, BATCH))
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=on_rank, args=(rank, folder)) for rank in range(RANKS[0] * RANKS[1])]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            print("a rank failed: WRONG")
            return 1
        losses, weights = torch.load(Path(folder, "found"))
    print("losses", *(f"{loss:.4f}" for loss in losses), "on 4 ranks;", *(f"{loss:.4f}" for loss in expected), "on one")
    apart = max((weights[name] - x).abs().max().item() for name, x in model.state_dict().items())
    apart = max(apart, (losses - expected).abs().max().item())
    print(f"losses and weights differ by at most {apart:.1e}, allowed {TOLERANCE:.0e}")
    right = apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
