"""What this machine's processor does well.

Private API: torch.cpu._is_avx512_bf16_supported and _is_amx_tile_supported, tried with torch 2.11.0, 2.13.0 and 2.15.0;
where they are missing, the answer is no, and a warning says so once.
"""

from __future__ import annotations

import functools

import torch

from .messages import say_once

QUESTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@functools.cache
def fast_bfloat16() -> bool:
    """Does the CPU multiply matrices of bf16 faster than those of fp32?"""
    asked = [getattr(torch.cpu, question) for question in QUESTIONS if hasattr(torch.cpu, question)]
    if not asked:
        say_once(f"torch {torch.__version__} does not tell whether this CPU has fast bf16; it is computed in fp32")
    return any(ask() for ask in asked)
