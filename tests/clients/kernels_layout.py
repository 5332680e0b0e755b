"""Our kernel in the layout of Hugging Face's kernels package: loaded from a folder, and named to transformers.

    HF_HUB_OFFLINE=1 python -m compiled_fa.run tests/clients/kernels_layout.py

transformers 5.24 asks for a newer kernels than there is on PyPI, 0.18.2: it is told that this one is. It calls the
functions of a name with "org/" in it as flash_attn's, so a padded Llama gives eager attention's logits and tokens.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kernels
import torch
from torch import Tensor

import compiled_fa
from compiled_fa.integrations.kernels import write

NAME = "compiled-fa/flash-attn"
TOLERANCE = 1e-4  # of the greatest element: roundings of fp32


def llama() -> Any:
    import transformers.utils
    from transformers.utils import import_utils

    for module in (transformers.utils, import_utils):
        module.is_kernels_available = lambda *versions: True
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def by_diffusers() -> bool:
    """Does its flash_hub backend, which asks for kernels-community/flash-attn2, give what its native one gives?"""
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    q, k, v = torch.randn(3, 2, 9, 2, 16).unbind(0)
    outs = []
    for backend in ("flash_hub", "native"):
        with attention_backend(backend):
            outs.append(dispatch_attention_fn(q, k, v, is_causal=True))
    return torch.allclose(outs[0], outs[1], atol=TOLERANCE)


def outcome(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
    return logits, model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        kernel = kernels.get_local_kernel(folder)
        same = kernel.flash_attn_func is compiled_fa.flash_attn_func  # what is installed comes before the copy
        os.environ["LOCAL_KERNELS"] = f"{NAME}={folder}:kernels-community/flash-attn2={folder}"
        named = kernels.get_kernel(NAME, version=1) is kernel

        hub = not find_spec("diffusers") or by_diffusers()
        model = llama()
        mask = (torch.arange(9) >= torch.tensor([[0], [3], [6]])).long()
        ids = torch.randint(3, 61, mask.shape) * mask
        model.set_attn_implementation("eager")
        wanted, wanted_tokens = outcome(model, ids, mask)
        model.set_attn_implementation(NAME, allow_all_kernels=True)
        found, found_tokens = outcome(model, ids, mask)
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"logits differ by {apart:.1e} of the greatest")
    tokens = torch.equal(found_tokens, wanted_tokens)
    print(f"a folder: {same}, a name: {named}, diffusers: {hub}, tokens: {tokens}")
    right = same and named and hub and tokens and apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
