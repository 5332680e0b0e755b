"""Tensor cores on Turing GPUs (T4, RTX 20xx, Quadro RTX) for every Triton kernel of a process.

Triton since 3.3 compiles dots below sm_80 to scalar arithmetic. This package gives them their instructions back, and
loops their software pipeline, through the hook that Triton has for replacing a compiler stage:

    compiled_fa.turing.enable()

hook.py installs it; stage.py is the stage; dots.py says what becomes of each dot and loop; pipeline.py rewrites the
pipeline; ir_text.py reads and writes Triton's text; private.py holds every use of an interface nobody promises.
"""

from compiled_fa.turing.hook import disable, enable, is_enabled
from compiled_fa.turing.private import missing

__all__ = ["disable", "enable", "is_enabled", "missing"]
