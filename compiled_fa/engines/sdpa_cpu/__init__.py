"""The sdpa_cpu engine: on a CPU, rectangles and triangles of plain scores go to PyTorch's own flash kernel.

The kernel knows a scale, "every query sees every key", and causal in a square; nothing of it is compiled at first use.
What it gives for parts of the keys is merged by lse. Everything else of a score program is for the other engines.

calls.py    forward and backward of a call, dense or packed
groups.py   packed sequences that share a call of the kernel
parts.py    the parts of a score matrix that the kernel can do
kernel.py   the kernel itself
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...messages import say_once
from ...problem import Direction, Problem
from ...scores import Window
from ...tuning import Rule, current
from . import kernel, parts
from .calls import backward, forward, is_one_call, prepared

__all__ = ["backward", "defers", "forward", "inlines", "name", "prepared", "unsupported_reason"]

name = "sdpa_cpu"

EVERYTHING, CAUSAL = Window(), Window(right=0)

inlines = is_one_call


def unsupported_reason(
    device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> str | None:
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
    if problem.bias is not None and (reason := _no_bias(problem, problem.bias, direction)) is not None:
        return reason
    if problem.window_in_force not in (EVERYTHING, CAUSAL):
        return "its kernel has no window but causal"
    if not problem.softmax_scale > 0.0:
        return "its kernel multiplies the -inf of masked scores by softmax_scale, which must be positive"
    if problem.packed is not None and problem.packed.block_table is not None:
        return "its kernel does not read pages"
    if problem.q.shape[-1] != problem.v.shape[-1]:
        return "its kernel wants one head_dim for q, k and v"
    return None


def _no_bias(problem: Problem, bias: Tensor, direction: Direction) -> str | None:
    """Why it does not serve a call with this bias."""
    if direction == "backward" and problem.bias_gradient:
        return "its kernel has no gradient of a bias"
    if problem.window_in_force != EVERYTHING:
        return "its kernel has no bias beside causal"
    widened = parts.widens(problem.q) if direction == "forward" else parts.widens_backward(problem.q)
    small = bias.dtype == torch.bool and bias.shape[2] == 1  # of keys, not of pairs
    if widened or not (small or bias.dtype == problem.q.dtype):
        return "its kernel adds a bias of its own dtype, and a copy of this one would be too large"
    return None


def rule(problem: Problem, direction: Direction) -> str | None:
    """The name of the tuned rule by which tiles are faster; None: they are not."""
    if problem.mean_seqlens[0] <= current().sdpa_cpu.few_queries:
        return None
    if problem.q.dtype != torch.bfloat16:
        return f"tiles_{direction}"
    gqa = "_gqa" if problem.heads_per_key > 1 else ""
    causal = "_causal" if direction == "forward" and problem.window_in_force == CAUSAL else ""
    return f"tiles_{direction}_bf16{gqa}{causal}"


def defers(problem: Problem, direction: Direction, to: str) -> bool:
    """Are tiles faster at a call that this engine could serve? By the rules of tuning/cpu.py."""
    if problem.q.device.type != "cpu":  # where lengths of keys in pages cannot be read without waiting
        return True
    if (name := rule(problem, direction)) is None:
        return False
    tiles: Rule = getattr(current().sdpa_cpu, name)
    return tiles.favours(problem.features)
