"""Runs in a process of its own, on a GPU newer than Turing: the code that a T4 would be given, executed by this GPU.

Triton compiles for sm_75 with the Turing stage, and the PTX is handed to the driver in place of machine code: it
translates PTX of an older architecture for the GPU that it has. Prints one line a case, and fails out of budget.
"""

import sys
import unittest.mock
from pathlib import Path

import torch
from triton import knobs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.test_engines import FEATURES, run_on
from support import Case, check_against_float64, make

from compiled_fa import turing
from compiled_fa.engines import fused, nvidia, triton


def use_ptx_as_binary() -> None:
    """After the Turing stage: PTX in place of a cubin for sm_75, which only Turing could load."""
    turing.enable()
    ours = knobs.runtime.add_stages_inspection_hook

    def hook(backend=None, stages=None, options=None, language=None, capability=None):
        if backend is None:
            key, digest = ours()
            return f"{key} ptx", f"{digest} ptx"
        ours(backend, stages, options, language, capability)
        stages["cubin"] = lambda ptx, metadata: ptx.encode() + b"\0"
        return None

    knobs.runtime.add_stages_inspection_hook = hook
    knobs.runtime.override_arch = "sm75"
    unittest.mock.patch.object(nvidia, "capability_of", return_value=(7, 5)).start()


def main() -> None:
    use_ptx_as_binary()
    for name, options in FEATURES.items():
        for head_dim in (64, 128):
            for lengths in (((300, 300),) * 2, ((67, 90), (0, 3), (500, 500), (33, 20))):
                dense = len(set(lengths)) == 1
                shape = {"heads_per_key": 2, "head_dim": head_dim, "head_dim_v": head_dim}
                data = make(Case(lengths, dense, dtype=torch.float16, **{**shape, **options}))
                for engine in (fused, triton):
                    check_against_float64(data, run_on(torch.device("cuda"), engine, data))
                print(f"{name}, head_dim {head_dim}, {'dense' if dense else 'varlen'}: within budget", flush=True)


if __name__ == "__main__":
    main()
