"""Tensor cores on Turing GPUs (T4, RTX 20xx, Quadro RTX) for every Triton kernel of a process.

Triton since 3.3 compiles dots below sm_80 to scalar arithmetic. This package gives them their instructions back, and
loops their software pipeline, through the hook that Triton has for replacing a compiler stage:

    compiled_fa_turing.enable()

It imports neither torch nor compiled_fa, so that a pure Triton program can have it; compiled_fa.turing is the same.

    hook.py            enable() and disable(): the hook, which loads the stage when a kernel for Turing is compiled
    stage.py           the stage; dots.py: what becomes of each dot and loop; pipeline.py rewrites the pipeline;
                       ir_text.py reads and writes Triton's text; target.py: what a Turing GPU is
    triton_private.py  every use of an interface of Triton that nobody promises, inductor.py: of PyTorch's
    startup.py         for processes that are to have it from their start; late.py: waiting for an import
    site_hook.py       the file that tells every Python of an environment; program.py: a program and its children
    __main__.py        the command; config.py: the environment variable
"""

from compiled_fa_turing.hook import disable, enable, is_enabled, missing

__all__ = ["disable", "enable", "is_enabled", "missing"]
