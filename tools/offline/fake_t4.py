"""Makes this process believe that one Tesla T4 is there, well enough for Inductor to lower graphs of fake CUDA tensors.

For a process of its own (process.py): nothing here is undone. Tried with the CPU build of torch 2.13.0.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch._higher_order_ops
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._subclasses.fake_tensor as fake_tensor
import triton
from torch._dynamo import device_interface
from torch._inductor.runtime import triton_helpers

from tools.offline.driver import Driver

T = TypeVar("T")

PROPERTIES = types.SimpleNamespace(
    name="Tesla T4",
    major=7,
    minor=5,
    multi_processor_count=40,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=1024,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=15 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=64 << 10,
    shared_memory_per_multiprocessor=64 << 10,
    L2_cache_size=4 << 20,
    gcnArchName="",
)


class _Device:
    """In place of torch.cuda.device: there is none to change to."""

    def __init__(self, *args: object) -> None: ...
    def __enter__(self) -> "_Device":
        return self

    def __exit__(self, *error: object) -> None: ...


def _always(answer: T) -> Callable[..., T]:
    return lambda *args, **kwargs: answer


@functools.cache  # once a process
def install() -> None:
    cuda: Any = torch.cuda
    for name, answer in {
        "is_available": True,
        "is_initialized": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (7, 5),
        "get_device_name": PROPERTIES.name,
        "is_bf16_supported": False,
        "mem_get_info": (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "synchronize": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }.items():
        setattr(cuda, name, _always(answer))
    interface: Any = device_interface.CudaInterface
    for name, answer in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_device_properties": PROPERTIES,
        "get_compute_capability": 75,
        "get_raw_stream": 0,
        "is_bf16_supported": False,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "memory_allocated": 0,
        "synchronize": None,
    }.items():
        setattr(interface, name, staticmethod(_always(answer)))
    interface.device = _Device
    interface.Worker.get_device_properties = staticmethod(_always(PROPERTIES))
    interface.Worker.current_device = staticmethod(_always(0))
    private: Any = torch._C
    private._cuda_getDevice = _always(0)
    private._cuda_setDevice = _always(None)
    private._cuda_getCurrentRawStream = _always(0)
    torch.version.cuda = "12.8"
    fakes: Any = fake_tensor
    fakes.init_gpu_context = _always(None)  # torch 2.11 makes a tensor there
    fakes.FakeTensorMode.avoid_device_init = property(_always(True))
    # Inductor's patterns are traced on real tensors of the device.
    passes: Any
    for passes in (joint_graph, post_grad):
        passes.lazy_init = _always(None)
    flex: Any = sys.modules["torch._higher_order_ops.flex_attention"]
    flex._permute_strides = _permute_strides
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = _always(None)


def _permute_strides(out: torch.Tensor, query_strides: Sequence[int]) -> torch.Tensor:
    """flex_attention's own copies the data, which a fake tensor of a missing device cannot."""
    from torch._inductor.ir import get_fill_order

    flex: Any = sys.modules["torch._higher_order_ops.flex_attention"]
    return out.new_empty_strided(out.shape, flex._construct_strides(out.shape, get_fill_order(query_strides)))
