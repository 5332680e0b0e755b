"""Compiling ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from .interface import Result, flash_attn_func, flash_attn_varlen_func


def warmup(
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seqlen: int = 1024,
    nheads: int = 2,
    nheads_k: int | None = None,
    head_dim: int = 64,
    varlen: bool = False,
    backward: bool = True,
    dropout_p: float = 0.0,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi: bool = False,
) -> float:
    """Compile what calls like this one need, so that none of them waits for it. Results are kept on disk, too.

    On a CPU one piece of machine code serves every shape, scale, window and head_dim; which of softcap, ALiBi and
    dropout there are, whether anything is masked, the dtype, and the direction tell pieces apart. On a GPU also the
    heads and head_dim. Plain and causal forward calls on a CPU need nothing.

    Args:
        dtype, device: of q, k and v.
        seqlen: tokens of the example; long calls may be served by other code than short ones.
        nheads, nheads_k, head_dim: heads of q, of k and v (None: as many), and their dimension.
        varlen: compile flash_attn_varlen_func's code in place of flash_attn_func's.
        backward: gradients, too.
        The rest: as flash_attn_func's; alibi: with alibi_slopes.

    Returns: seconds it took.

    Raises: as flash_attn_func.

    Example:
        compiled_fa.warmup(dtype=torch.bfloat16, causal=True, softcap=30.0)
    """
    start = time.perf_counter()
    nheads_k = nheads if nheads_k is None else nheads_k
    device = torch.device(device)
    shapes = ((seqlen, heads, head_dim) for heads in (nheads, nheads_k, nheads_k))
    q, k, v = (torch.zeros(1, *shape, dtype=dtype, device=device, requires_grad=backward) for shape in shapes)
    slopes = torch.full((nheads,), 0.1, device=device) if alibi else None

    def call() -> Result:
        options = (dropout_p, None, causal, window_size, softcap, slopes)
        if not varlen:
            return flash_attn_func(q, k, v, *options)
        cu_seqlens = torch.tensor([0, seqlen], dtype=torch.int32, device=device)
        return flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, seqlen, seqlen, *options)

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.set_grad_enabled(backward):  # dropout draws
        out = call()
        if backward and isinstance(out, torch.Tensor):
            torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return time.perf_counter() - start
