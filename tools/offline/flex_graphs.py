"""Graphs of PyTorch's flex_attention, forward and backward, causal, for capture() and compile_graph()."""

import sys
from typing import Any

import torch
import torch._higher_order_ops
from torch.nn.attention.flex_attention import BlockMask

from tools.offline.graphs import Graph

BATCH, HEADS, LENGTH, BLOCK = 1, 8, 2048, 128
_OPTIONS = {
    "BACKEND": "TRITON",
    "BLOCKS_ARE_CONTIGUOUS": False,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "WRITE_DQ": True,
}


def forward(head_dim: int, block_m: int, block_n: int, num_warps: int, num_stages: int) -> Graph:
    options = {**_OPTIONS, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}
    mask = _causal_blocks()
    q, k, v = (_fake(BATCH, HEADS, LENGTH, head_dim) for _ in range(3))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return _flex().flex_attention(q, k, v, _score, mask, head_dim**-0.5, options)[:2]

    return run, [q, k, v]


def backward(
    head_dim: int, block_m1: int, block_n1: int, block_m2: int, block_n2: int, num_warps: int, num_stages: int
) -> Graph:
    blocks = {"BLOCK_M1": block_m1, "BLOCK_N1": block_n1, "BLOCK_M2": block_m2, "BLOCK_N2": block_n2}
    options = {**_OPTIONS, **blocks, "num_warps": num_warps, "num_stages": num_stages}
    mask = _causal_blocks()
    q, k, v, out, dout = (_fake(BATCH, HEADS, LENGTH, head_dim) for _ in range(5))
    lse = _fake(BATCH, HEADS, LENGTH, dtype=torch.float32)

    def run(*tensors: torch.Tensor) -> Any:
        scale = head_dim**-0.5
        return _flex().flex_attention_backward(*tensors, None, _score, _score_gradient, mask, scale, options)[:3]

    return run, [q, k, v, out, lse, dout]


def _flex() -> Any:
    # The package has a function of the same name, so that an import statement would find that.
    return sys.modules["torch._higher_order_ops.flex_attention"]


def _fake(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype)


def _causal_blocks() -> Any:
    blocks = LENGTH // BLOCK
    counts = [_fake(1, 1, blocks, dtype=torch.int32) for _ in range(4)]
    indices = [_fake(1, 1, blocks, blocks, dtype=torch.int32) for _ in range(4)]
    return BlockMask(
        seq_lengths=(LENGTH, LENGTH),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=counts[2],
        q_indices=indices[2],
        full_q_num_blocks=counts[3],
        full_q_indices=indices[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda b, h, q_index, k_index: q_index >= k_index,
    ).as_tuple()


def _score(score: Any, b: Any, h: Any, q_index: Any, k_index: Any) -> Any:
    return score


def _score_gradient(score: Any, b: Any, h: Any, q_index: Any, k_index: Any, gradient: Any) -> list[Any]:
    return [gradient * 1, None, None, None, None]
