"""The class of this machine's CPU: which table fits it.

Private API: torch.cpu's questions, tried with torch 2.11.0, 2.13.0 and 2.15.0; where one is missing, its answer is no:
a lower class, whose table does no harm.
"""

from __future__ import annotations

import functools
import platform

import torch

from .cpu import AMX, ARM, AVX2, AVX512, AVX512_BF16, PLAIN


def _has(question: str) -> bool:
    ask = getattr(torch.cpu, question, None)
    return bool(ask is not None and ask())


@functools.cache
def cpu_class() -> str:
    """The name of a table. ATEN_CPU_CAPABILITY, which keeps PyTorch's own kernels to less than the CPU has, counts."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ARM.name
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        if _has("_is_amx_tile_supported") and _has("_is_avx512_bf16_supported"):
            return AMX.name
        return AVX512_BF16.name if _has("_is_avx512_bf16_supported") else AVX512.name
    return AVX2.name if capability == "AVX2" else PLAIN.name
