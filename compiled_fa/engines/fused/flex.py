"""The flex_attention template: one Triton kernel forward, one backward, with the score program inlined.

torch's public flex_attention recomputes its forward to differentiate, and derives the gradient of a score itself. An op
with a backward of its own needs the two higher-order operators beneath it: forward, and backward given out's and lse's
gradients, with our `product_gradient` (which dropout needs) in place of a derived one.

Private API: torch._higher_order_ops.flex_attention's operators and BlockMask.as_tuple. Tried with torch 2.11.0, 2.13.0
and 2.15.0. On a CPU the operators run as plain PyTorch ops over the whole score matrix; that is for tests of everything
around the kernel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._higher_order_ops
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ...caches import Cache
from ...inductor import graphs
from ...inductor.graphs import Compiled
from ...problem import Direction
from .blocks import BLOCK
from .mods import Features, Mods

LOG2E = math.log2(math.e)  # the template's lse is in base 2

TEMPLATE = {
    "BACKEND": "TRITON",
    "BLOCKS_ARE_CONTIGUOUS": False,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,  # a row without a key gives 0
    "WRITE_DQ": True,
}


KERNELS: Cache[object, Compiled] = Cache("compiled kernels", entries=512)


@dataclass(frozen=True)
class Spec:
    """All that is fixed in a kernel; lengths and batch are not.

    strides: of q, k, v (and dout), each (row, head) in elements: see `rows`. divisible: lengths are multiples of BLOCK.
    options: tile sizes, warps and stages by the template's names; empty: Inductor's own choice.
    """

    direction: Direction
    features: Features
    dtype: torch.dtype
    nheads: int
    nheads_k: int
    head_dim: int
    head_dim_v: int
    strides: tuple[tuple[int, int], ...]
    divisible: bool
    options: tuple[tuple[str, int], ...] = ()

    def graph(self) -> Callable[..., tuple[Tensor, ...]]:
        """The function that is compiled, of (q, k, v, [dout, lse, delta], 8 BlockTables, buffers)."""
        return _forward(self) if self.direction == "forward" else _backward(self)

    def example_inputs(self, device: str, size: Callable[[str, int], Any]) -> list[Tensor]:
        """Inputs to trace with. size: (name, typical value) -> a size, the same one for the same name."""
        batch = 1 if self.features.packed else size("batch", 4)
        seqlen_q, seqlen_k = size("seqlen_q", 8 * BLOCK), size("seqlen_k", 9 * BLOCK)
        sides = [(seqlen_q, self.nheads, self.head_dim), (seqlen_k, self.nheads_k, self.head_dim)]
        sides += [(seqlen_k, self.nheads_k, self.head_dim_v), (seqlen_q, self.nheads, self.head_dim_v)]

        def empty(*shape: Any, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        inputs = [
            torch.empty_strided(
                (batch, heads, seqlen, head_dim), (seqlen * row, head, row, 1), dtype=self.dtype, device=device
            )
            for (seqlen, heads, head_dim), (row, head) in zip(sides, self.strides, strict=False)
        ]
        if self.direction == "backward":
            inputs += [empty(batch, self.nheads, seqlen_q, dtype=torch.float32) for _ in range(2)]
        for side, other in (("q", "k"), ("k", "q")):
            blocks, width = size(f"{side}_blocks", 8 if side == "q" else 9), size(f"width_{other}", 7)
            inputs += [empty(1, 1, blocks, dtype=torch.int32), empty(1, 1, blocks, width, dtype=torch.int32)] * 2
        sequences = size("batch", 4)
        shapes = {
            "alibi_slopes": (sequences, self.nheads),
            "dropout_low": (batch, self.nheads, seqlen_q),
            "dropout_high": (batch, self.nheads, seqlen_q),
            "seqlens_q": (sequences,),
            "seqlens_k": (sequences,),
            "q_batch": (seqlen_q,),
            "q_index": (seqlen_q,),
            "k_batch": (seqlen_k,),
            "k_index": (seqlen_k,),
            "shift": (),
        }
        for name in self.features.buffer_names():
            inputs.append(empty(*shapes[name], dtype=torch.float32 if name == "alibi_slopes" else torch.int32))
        return [x.clone() if any(x is y for y in inputs[:at]) else x for at, x in enumerate(inputs)]


def run(spec: Spec, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Forward: (out, lse in base e); backward: (dq, dk, dv). Compiled at the first call with a spec."""
    if inputs[0].device.type == "cpu":
        return spec.graph()(*inputs)
    device = inputs[0].device.type
    what = f"the fused {spec.direction} kernel for head_dim {spec.head_dim}"

    def compile_it() -> Compiled:
        return graphs.compiled_graph(spec.graph(), lambda size: spec.example_inputs(device, size), what)

    return tuple(KERNELS.get((spec, device), compile_it)(list(inputs)))


def _operators() -> Any:
    # torch._higher_order_ops has a function of the module's name, which an import statement would find.
    return sys.modules["torch._higher_order_ops.flex_attention"]


def _block_mask(mods: Mods, q: Tensor, k: Tensor, blocks: Sequence[Tensor]) -> tuple[Any, ...]:
    make: Any = BlockMask  # whose __init__ takes the eight in the order of BlockTables
    mask = make((q.shape[2], k.shape[2]), *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mods.mask)
    return (*mask.as_tuple()[:-1], mods.mask)


def _template_options(spec: Spec) -> dict[str, Any]:
    return {**TEMPLATE, "IS_DIVISIBLE": spec.divisible, **dict(spec.options)}


def _forward(spec: Spec) -> Callable[..., tuple[Tensor, ...]]:
    mods = Mods(spec.features)

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        blocks, buffers = rest[:8], rest[8:]
        mask = _block_mask(mods, q, k, blocks)
        score = mods.kept_score if spec.features.threshold is not None else mods.score
        # softmax_scale is part of the score program, so the template's own is 1.
        out, lse, *_ = _operators().flex_attention(
            q, k, v, score, mask, 1.0, _template_options(spec), tuple(buffers), tuple(buffers)
        )
        return out, lse / LOG2E

    return forward


def _backward(spec: Spec) -> Callable[..., tuple[Tensor, ...]]:
    mods = Mods(spec.features)

    def backward(
        q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        blocks, buffers = rest[:8], rest[8:]
        mask = _block_mask(mods, q, k, blocks)
        dropping = spec.features.threshold is not None
        score_buffers = (*buffers, lse, delta) if dropping else tuple(buffers)
        # The template computes rowsum(out * dout) - dlse / ln 2 and subtracts it. Ours is delta, made in fp32: with
        # out = 0, dlse = -delta * ln 2.
        dq, dk, dv, *_ = _operators().flex_attention_backward(
            q,
            k,
            v,
            torch.zeros_like(dout),
            lse * LOG2E,
            dout,
            delta / -LOG2E,
            mods.kept_score if dropping else mods.score,
            mods.product_gradient,
            mask,
            1.0,
            _template_options(spec),
            score_buffers,
            tuple(buffers),
        )
        return dq, dk, dv

    return backward
