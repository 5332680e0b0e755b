"""The seed of a call's dropout, drawn from the generator of its device: torch.manual_seed governs it.

Backward needs the seed that forward drew. A compiled graph saves it, unless it is told to recompute what it could save:
at an activation memory budget of 0 it saves nothing but its inputs. What holds even there is activation checkpointing,
where the state of the generator is saved, and set again to recompute a random op; but with torch 2.11 not in another
checkpoint whose policy marks all that is in it (docs/parallel.md).

Private API: settings of torch._functorch.config, the key of a region's budget in torch.fx.traceback, Dynamo's mark of a
constant function, and torch._C._functorch.peek_interpreter_stack, tried with torch 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

SEEDS = 2**62


def drawn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """int64 (1,), for a call with these inputs."""
    if torch.compiler.is_dynamo_compiling():
        if _recomputes():
            return _recomputable(q.device, q.requires_grad or k.requires_grad or v.requires_grad)
    elif get_proxy_mode() is not None and _recomputes():
        raise NotImplementedError(
            "dropout_p must be 0 where AOTAutograd traces without torch.compile and recomputes activations: the seed "
            "would be drawn again, and backward would drop other probabilities"
        )
    return torch.randint(SEEDS, (1,), device=q.device, dtype=torch.int64)


def _recomputes() -> bool:
    """May random numbers be recomputed? The partitioner is told by settings, and by marks on what is traced."""
    if torch.compiler.is_exporting():
        return False
    marks = traceback.current_meta.get("custom") or {}
    return bool(
        functorch_config.activation_memory_budget != 1.0
        or functorch_config.aggressive_recomputation
        or not functorch_config.ban_recompute_not_in_allowlist
        or marks.get("_region_activation_memory_budget", 1.0) != 1.0
    )


def _in_a_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo calls them when it traces, and right after it the partitioner looks at the same settings. This is what
# torch.compiler.assume_constant_result does, which would import Dynamo for it.
for function in (_recomputes, _in_a_transform):
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _recomputable(device: torch.device, requires_grad: bool) -> Tensor:
    """By an op that Inductor leaves alone: its own randint has a seed from outside of the checkpointed region.

    With or without gradients it draws the same, for checkpointing that runs forward without, and again with them. Where
    nothing requires any, PyTorch does not compile a random op in a checkpointed region.
    """
    if _in_a_transform():
        raise NotImplementedError(
            "dropout_p must be 0 in a torch.func transform in compiled code that recomputes activations "
            "(torch._functorch.config.activation_memory_budget)"
        )
    if not requires_grad:
        return _random(device)
    seed: Tensor = checkpoint(_random, device, use_reentrant=False)
    return seed


def _random(device: torch.device) -> Tensor:
    seed: Tensor = torch.ops.aten.random.to(torch.empty(1, device=device, dtype=torch.int64), SEEDS)
    return seed
