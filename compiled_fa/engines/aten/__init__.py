"""The aten engine: on a CPU, rectangles and triangles of plain scores go to PyTorch's own flash kernel.

The kernel knows a scale, "every query sees every key", and causal in a square; nothing of it is compiled at first use.
What it gives for parts of the keys is merged by lse. Everything else of a score program is for the other engines.

calls.py    forward and backward of a call, dense or packed
groups.py   packed sequences of one length as a batch
decoding.py few queries on a long cache, in one piece or in pages
kernel.py   the kernel, and the parts of a score matrix that it can do
"""

from __future__ import annotations

import torch

from ...hardware import fast_bfloat16
from ...inductor import say_once
from ...problem import Direction, Problem
from ...scores import Window
from . import decoding, kernel
from .calls import backward, forward

__all__ = ["backward", "forward", "slower", "why_not"]

FEW = 256  # tokens up to which nothing beats a single call
MANY = 4096  # keys from which tiles read them faster for a few queries
MANY_IN_PIECES = 16384  # the same where the kernel takes them in pieces

EVERYTHING, CAUSAL = Window(), Window(right=0)


def why_not(device: torch.device, problem: Problem | None = None) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if device.type != "cpu":
        return f"its kernel is for CPUs, and this is {device.type}"
    if reason := kernel.missing():
        say_once(f"not the aten engine on a CPU: {reason}")
        return reason
    if problem is None:
        return None
    if problem.softcap or problem.alibi_slopes is not None or problem.dropout_p:
        return "its kernel has no softcap, ALiBi or dropout of ours"
    if problem.window_in_force not in (EVERYTHING, CAUSAL):
        return "its kernel has no window but causal"
    if not problem.softmax_scale > 0.0:
        return "its kernel multiplies the -inf of masked scores by softmax_scale, which must be positive"
    if problem.packed is not None and problem.packed.block_table is not None and not decoding.reads_pages(problem):
        return f"it reads pages of {decoding.PAGE} keys or more for one query a sequence, in fp32 or fp64"
    if problem.q.shape[-1] != problem.v.shape[-1]:
        return "its kernel wants one head_dim for q, k and v"
    return None


def slower(problem: Problem, direction: Direction) -> bool:
    """Is another engine faster at a call that this one could serve? As measured: bench/NOTES.md."""
    q, k, packed = problem.q, problem.k, problem.packed
    half = q.dtype == torch.bfloat16 and fast_bfloat16()
    if packed is not None and packed.block_table is not None:
        return False
    if packed is None and decoding.pays(problem):
        return k.shape[1] >= MANY_IN_PIECES
    sequences = 1 if packed is None else max(1, problem.batch)
    seqlen_q, seqlen_k = q.shape[-3] // sequences, k.shape[-3] // sequences  # on average
    if direction == "backward":
        return half or (seqlen_q > FEW and problem.window_in_force != EVERYTHING)
    return seqlen_k >= (FEW if half else MANY) and (half or seqlen_q <= decoding.FEW)
