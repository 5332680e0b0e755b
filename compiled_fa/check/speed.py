"""How fast this machine's attention is: ours, SDPA, xformers where it is there, and what stock Triton makes of flex.

A peer that cannot do a shape says why, in place of its time: a report is of use though something in it fails.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import int8
from ..interface import flash_attn_func
from ..timing import interleaved_medians

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Peer = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # of q, k, v and causal
TURING = (7, 5)
LONGEST_REASON = 300  # characters
SECONDS = 300  # for a process of its own, compilation and all


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen: int
    nheads: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"{self.batch} x {self.seqlen} x {self.nheads} x {self.head_dim}{' causal' if self.causal else ''}"

    def operations(self, gradients: bool) -> float:
        """Floating-point operations, as FlashAttention's papers count them."""
        forward = 4.0 * self.batch * self.nheads * self.seqlen**2 * self.head_dim / (2 if self.causal else 1)
        return 3.5 * forward if gradients else forward

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, self.seqlen, self.nheads, self.head_dim)
        return [torch.randn(size, generator=generator).to(device, dtype) for _ in range(3)]


ON_CUDA = tuple(
    Shape(batch, seqlen, 16, head_dim, causal)
    for head_dim in (64, 128)
    for batch, seqlen in ((8, 512), (2, 2048), (1, 8192))
    for causal in (False, True)
)
ON_CPU = (Shape(1, 256, 2, 32, False), Shape(1, 256, 2, 64, True))


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out: Tensor = flash_attn_func(q, k, v, causal=causal)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else None)
    return out


def ours_int8(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return int8.attention(q.detach(), k.detach(), v.detach(), causal)


def peers(gradients: bool) -> dict[str, Peer]:
    """Those that are measured in this process, by name."""
    found: dict[str, Peer] = {"ours": ours, "SDPA": sdpa}
    if importlib.util.find_spec("xformers") is not None:
        found["xformers"] = xformers
    if not gradients:
        found["ours, int8"] = ours_int8
    return found


def call(attention: Attention, inputs: list[Tensor], gradients: bool) -> None:
    """Once: forward, or forward and the gradients of all inputs."""
    if not gradients:
        with torch.no_grad():
            attention(*inputs)
        return
    differentiated = [x.detach().requires_grad_() for x in inputs]
    out = attention(*differentiated)
    torch.autograd.grad(out, differentiated, torch.ones_like(out))


def _with(peer: Peer, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return peer(q, k, v, causal)


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:LONGEST_REASON]


def flex_variants(device: torch.device) -> dict[str, bool]:
    """Those of flex_attention, by name: with our stage, or as stock Triton has it?"""
    if device.type != "cuda":
        return {}
    turing = torch.cuda.get_device_capability(device) == TURING
    return {"flex, stock Triton": False, **({"flex, our stage": True} if turing else {})}


def in_own_process(shape: Shape, gradients: bool, device: torch.device, stage: bool) -> float | str:
    """Seconds of flex_attention in a fresh process (flex.py), which a failure or a compilation without end stays in."""
    words = [str(device), str(stage), str(gradients), *(str(value) for value in asdict(shape).values())]
    command = [sys.executable, "-m", "compiled_fa.check.flex", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return float(lines[-1]) if done.returncode == 0 else (lines[-1] if lines else "failed")[:LONGEST_REASON]


def measure(shape: Shape, gradients: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One row: the median seconds of each peer, or why it has none."""
    inputs = shape.inputs(device, dtype)
    calls: dict[str, Callable[[], None]] = {}
    results: dict[str, float | str] = {}
    for name, peer in peers(gradients).items():
        run = partial(call, partial(_with, peer, shape.causal), inputs, gradients)
        try:
            run()  # compiles, and shows what cannot be done
        except Exception as error:  # a peer's, of any type
            results[name] = told(error)
        else:
            calls[name] = run
    results.update(interleaved_medians(calls, device))
    for name, stage in flex_variants(device).items():
        results[name] = in_own_process(shape, gradients, device, stage)
    return {"shape": asdict(shape), "direction": "forward+backward" if gradients else "forward", "seconds": results}


def tflops(row: Mapping[str, Any]) -> dict[str, float]:
    """Of the peers of a row that have a time."""
    operations = Shape(**row["shape"]).operations(row["direction"] != "forward")
    return {name: operations / value / 1e12 for name, value in row["seconds"].items() if isinstance(value, float)}
