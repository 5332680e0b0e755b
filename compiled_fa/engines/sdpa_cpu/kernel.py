"""PyTorch's flash kernel for CPUs, on (B, H, S, D), as it is, but for few queries on many keys.

There it reads a key head once for each query head, with as many rows as there are queries. Query heads that share a
key head are as good as more queries where no mask tells them apart: as rows of one head they read its keys once.

Private API: aten::_scaled_dot_product_flash_attention_for_cpu and its backward, the kernel below
F.scaled_dot_product_attention, which gives lse too. Tried with torch 2.11.0, 2.13.0 and 2.15.0; where it is missing,
the tiled engine serves in its place, and a warning says so once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...tuning import current

# torch's own function is quicker to call than torch.ops'; of the backward there is none.
_forward: Any = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def missing() -> str | None:
    """Why there is no kernel; None: there is."""
    return f"torch {torch.__version__} does not have its kernel" if _forward is None or _backward is None else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> out (B, H, Sq, D) and lse (B, H, Sq). bias: of q's dtype."""
    together = 1 if causal or bias is not None else _heads_together(q, k)
    if together == 1:
        out, lse = _forward(q, k, v, 0.0, causal, attn_mask=bias, scale=softmax_scale)
        return out, lse
    out, lse = _forward(_as_rows(q, together), k, v, 0.0, False, scale=softmax_scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def backward(
    of_queries: tuple[Tensor, Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    lse: Tensor,
    causal: bool,
    softmax_scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, as q, k and v; of_queries: q, dout and out; of_keys: k and v."""
    q, dout, out = of_queries
    together = 1 if causal or bias is not None else _heads_together(q, of_keys[0])
    if together == 1:
        dq, dk, dv = _backward(dout, q, *of_keys, out, lse, 0.0, causal, attn_mask=bias, scale=softmax_scale)
        return dq, dk, dv
    q_rows, dout_rows, out_rows = (_as_rows(x, together) for x in of_queries)
    lse_rows = lse.reshape(q_rows.shape[:-1])
    dq, dk, dv = _backward(dout_rows, q_rows, *of_keys, out_rows, lse_rows, 0.0, False, scale=softmax_scale)
    return dq.reshape(q.shape), dk, dv


def _as_rows(x: Tensor, together: int) -> Tensor:
    """(B, H, S, D) -> (B, H / together, together * S, D): of a single query a view."""
    batch, heads, seqlen, head_dim = x.shape
    return x.reshape(batch, heads // together, together * seqlen, head_dim)


def _heads_together(q: Tensor, k: Tensor) -> int:
    """How many query heads shall be rows of one: 1, or so many that there is a head for each thread."""
    batch, heads, seqlen_q, _ = q.shape
    heads_per_key, tuned = heads // k.shape[1], current().sdpa_cpu
    if heads_per_key == 1 or seqlen_q > tuned.few_queries:
        return 1
    bf16 = q.dtype == torch.bfloat16
    least = tuned.few_queries_from_elements_bf16 if bf16 else tuned.few_queries_from_elements
    if k.shape.numel() * (heads_per_key - 1) < least:
        return 1
    most = max(1, batch * heads // torch.get_num_threads())
    return max(n for n in range(1, heads_per_key + 1) if heads_per_key % n == 0 and n <= most)
