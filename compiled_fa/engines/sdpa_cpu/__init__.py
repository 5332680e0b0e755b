"""The sdpa_cpu engine: on a CPU, rectangles and triangles of plain scores go to PyTorch's own flash kernel.

The kernel knows a scale, "every query sees every key", and causal in a square; nothing of it is compiled at first use.
What it gives for parts of the keys is merged by lse. Everything else of a score program is for the other engines.

calls.py    forward and backward of a call, dense or packed
groups.py   packed sequences of one length as a batch
kernel.py   the kernel, and the parts of a score matrix that it can do
"""

from __future__ import annotations

import torch

from ... import inductor, untiled
from ...hardware import fast_bfloat16
from ...inductor import say_once
from ...problem import Direction, Problem
from ...scores import Window
from . import kernel
from .calls import backward, forward, is_one_call

__all__ = ["backward", "defers", "forward", "is_one_call", "unsupported_reason"]

FEW = 256  # tokens up to which nothing beats a single call
FEW_QUERIES, MANY = 4, 4096  # queries up to which, and keys from which, tiles read keys faster

EVERYTHING, CAUSAL = Window(), Window(right=0)


def unsupported_reason(device: torch.device, problem: Problem | None = None) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if device.type != "cpu":
        return f"its kernel is for CPUs, and this is {device.type}"
    if reason := kernel.missing():
        say_once(f"not the sdpa_cpu engine on a CPU: {reason}")
        return reason
    if problem is None:
        return None
    if problem.softcap or problem.alibi_slopes is not None or problem.dropout_p:
        return "its kernel has no softcap, ALiBi or dropout of ours"
    if problem.window_in_force not in (EVERYTHING, CAUSAL):
        return "its kernel has no window but causal"
    if not problem.softmax_scale > 0.0:
        return "its kernel multiplies the -inf of masked scores by softmax_scale, which must be positive"
    if problem.packed is not None and problem.packed.block_table is not None:
        return "its kernel does not read pages"
    if problem.q.shape[-1] != problem.v.shape[-1]:
        return "its kernel wants one head_dim for q, k and v"
    return None


def defers(problem: Problem, direction: Direction) -> bool:
    """Is another engine faster at a call that this one could serve? As measured: bench/NOTES.md."""
    q, k, packed = problem.q, problem.k, problem.packed
    half = q.dtype == torch.bfloat16 and fast_bfloat16()
    sequences = 1 if packed is None else max(1, problem.batch)
    seqlen_q, seqlen_k = q.shape[-3] // sequences, k.shape[-3] // sequences  # on average
    if direction == "backward":
        return half or (seqlen_q > FEW and problem.window_in_force != EVERYTHING)
    if _needs_no_tiles(problem, seqlen_q, seqlen_k) and inductor.eager_reason() is None:
        return True
    return seqlen_k >= FEW if half else seqlen_k >= MANY and seqlen_q <= FEW_QUERIES


def _needs_no_tiles(problem: Problem, seqlen_q: int, seqlen_k: int) -> bool:
    """Is it faster without tiles (untiled.py) than by this engine's kernel? Lengths are averages."""
    q, k, packed = problem.q, problem.k, problem.packed
    if untiled.rows(problem, seqlen_q) <= untiled.ROWS and seqlen_k >= untiled.DECODING_KEYS:
        enough = untiled.DECODING_ELEMENTS
        if q.dtype.itemsize >= 4:
            enough = untiled.DECODING_ELEMENTS_FP32 // (2 if seqlen_k >= untiled.DECODING_LONG else 1)
        if k.numel() >= enough:
            return True
    if packed is None or packed.max_seqlen_k > untiled.SHORT_KEYS or untiled.rows(problem, 1) > untiled.ROWS:
        return False
    return q.numel() >= untiled.SHORT_ELEMENTS
