"""What this machine's processor does well.

Private API: torch.cpu._is_avx512_bf16_supported and _is_amx_tile_supported, tried with torch 2.13.0; where they are
missing, the answer is no.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def fast_bfloat16() -> bool:
    """Does the CPU multiply matrices of bf16 faster than those of fp32?"""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, lambda: False)() for question in questions)
