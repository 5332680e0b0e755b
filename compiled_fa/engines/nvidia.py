"""What the engines of Triton kernels ask about an NVIDIA GPU: what it can do, how much memory a block has there, and
whether this process can compile for it."""

from __future__ import annotations

import functools
import importlib.util

import torch

from .. import turing
from ..messages import say_once

TURING = (7, 5)
KB = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
LEAST_KB = 99  # of capabilities that KB does not name: 8.6, 8.9, 12.0 and 12.1, and those to come


def shared_memory(capability: tuple[int, int]) -> int:
    """KB that a block may have."""
    return KB.get(capability, LEAST_KB)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is no CUDA device."""
    if device.type != "cuda":
        return 0, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # a device keeps its own, and to ask takes a tenth of a call
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def processors(device: torch.device) -> int:
    """SMs; of what is no CUDA device, as many as a T4 has."""
    if device.type != "cuda":
        return 40
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def unsupported_reason(device: torch.device) -> str | None:
    """Why no Triton kernel of ours runs on a device; None: they do."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type}"
    if torch.version.hip is not None:
        # PyTorch calls these devices cuda, too, and gives them capabilities of another meaning.
        return "its tiles are for NVIDIA's GPUs, and this is AMD's"
    return _missing(capability_of(device))


@functools.cache
def _missing(capability: tuple[int, int]) -> str | None:
    """What this process or a device of this capability has not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if capability == TURING and (missing := turing.missing()):
        return missing
    if capability < TURING:
        return f"it needs compute capability 7.5, and this device has {'.'.join(map(str, capability))}"
    return None


def prepare(capability: tuple[int, int], dtype: torch.dtype) -> None:
    """Before a kernel is compiled: Turing's tensor cores, for ours and every other Triton kernel of the process."""
    if capability != TURING:
        return
    turing.enable()
    if dtype == torch.bfloat16:
        say_once("Turing has no tensor cores for bfloat16: it works, slowly; float16 is fast")
