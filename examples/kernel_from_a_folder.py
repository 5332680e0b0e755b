"""flash_attn's functions as a kernel of Hugging Face's hub: written into a folder, loaded from it, and called.

    python examples/kernel_from_a_folder.py

With the kernels package (pip install kernels) it is that which loads the folder; without it, the import that it does.
Output and gradients are scaled_dot_product_attention's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from compiled_fa.integrations.kernels import write

TOLERANCE = 1e-5  # of the greatest element: roundings of fp32


def load(folder: Path, variant: Path) -> ModuleType:
    if importlib.util.find_spec("kernels"):
        from kernels import get_local_kernel

        kernel: ModuleType = get_local_kernel(folder)
        return kernel
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{variant} is no package")
    kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    return kernel


def main() -> int:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 128, heads, 32, requires_grad=True) for heads in (8, 2, 2))
    towards = torch.randn(2, 128, 8, 32)
    with tempfile.TemporaryDirectory() as folder:
        kernel = load(Path(folder), write(Path(folder)))
        ours = kernel.flash_attn_func(q, k, v, causal=True)
    transposed = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    theirs = F.scaled_dot_product_attention(*transposed, is_causal=True, enable_gqa=True).transpose(1, 2)
    found, wanted = ((out, *torch.autograd.grad(out, (q, k, v), towards)) for out in (ours, theirs))
    apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))
    print(f"{kernel.__name__}: output and gradients differ by at most {apart:.1e}, allowed {TOLERANCE:.0e}")
    right = apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
