"""Tensor cores on Turing GPUs for every Triton kernel of a process: the package compiled_fa_turing by another name.

compiled_fa_turing is a package of its own since importing anything in compiled_fa imports torch, which a pure Triton
program, and every Python that starts in an environment that has it enabled, must not pay for.
"""

from compiled_fa_turing import disable, enable, is_enabled, missing

__all__ = ["disable", "enable", "is_enabled", "missing"]
