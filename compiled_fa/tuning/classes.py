"""The class of this machine's CPU: which table fits it.

Private API: torch.cpu's questions, tried with torch 2.11.0, 2.13.0 and 2.15.0; where one is missing, its answer is no:
a lower class, whose table does no harm. So it is with get_capabilities, which is public.
"""

from __future__ import annotations

import functools
import platform

import torch

from .cpu import AMX, ARM, AVX2, AVX512, AVX512_BF16, PLAIN, ZEN5


def _has(question: str) -> bool:
    ask = getattr(torch.cpu, question, None)
    return bool(ask is not None and ask())


def _capable_of(instructions: str) -> bool:
    ask = getattr(torch.cpu, "get_capabilities", None)
    return bool(ask is not None and ask().get(instructions))


@functools.cache
def cpu_class() -> str:
    """The name of a table. ATEN_CPU_CAPABILITY, which keeps PyTorch's own kernels to less than the CPU has, counts."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ARM.name
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        if _has("_is_amx_tile_supported") and _has("_is_avx512_bf16_supported"):
            return AMX.name
        if not _has("_is_avx512_bf16_supported"):
            return AVX512.name
        # A Zen 5 multiplies 512 bits at once, a Zen 4 half of them; this is an instruction that only the former has.
        return ZEN5.name if _capable_of("avx512_vp2intersect") else AVX512_BF16.name
    return AVX2.name if capability == "AVX2" else PLAIN.name
