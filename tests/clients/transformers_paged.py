"""transformers' continuous batching on our kernel: its paged cache, by flash_attn's two functions that it calls.

    HF_HUB_OFFLINE=1 python -m compiled_fa.run tests/clients/transformers_paged.py

Requests of unequal lengths give the tokens of "paged|eager". Prefill and mixed batches come as packed rows, by
flash_attn_varlen_func; batches that decode come with a block table, by flash_attn_with_kvcache, where there is CUDA or
XPU: the CPU answers for the latter. As in kernels_layout.py transformers is told that kernels is new enough.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers.utils
from transformers.utils import import_utils

for module in (transformers.utils, import_utils):
    module.is_kernels_available = lambda *versions: True

from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.generation.continuous_batching import initialization  # noqa: E402

import compiled_fa  # noqa: E402
from compiled_fa.integrations.kernels import write  # noqa: E402

NAME = "compiled-fa/flash-attn2"
LENGTHS, NEW_TOKENS = [21, 5, 34, 1], 12


def llama() -> Any:
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


def counted(name: str, calls: Counter[str]) -> None:
    """Count calls of one of our functions, which the kernel imports when it is loaded."""
    function = getattr(compiled_fa, name)

    @functools.wraps(function)
    def counting(*arguments: Any, **options: Any) -> Any:
        calls[name + (" with pages" if options.get("block_table") is not None else "")] += 1
        return function(*arguments, **options)

    setattr(compiled_fa, name, counting)


def generated(model: Any, implementation: str, fast_decode: bool) -> list[list[int]]:
    model.set_attn_implementation(implementation, allow_all_kernels=True)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 61, (length,), generator=generator).tolist() for length in LENGTHS]
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=32,
            page_size=32,
            max_batch_tokens=64,
            max_blocks_per_request=4 if fast_decode else 0,
            auto_switch_to_flash=False,
        ),
    )
    return [output.generated_tokens for _, output in sorted(outputs.items())]


def main() -> int:
    model, calls = llama(), Counter[str]()
    counted("flash_attn_varlen_func", calls)
    counted("flash_attn_with_kvcache", calls)
    initialization.is_torch_xpu_available = lambda *arguments: True
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        os.environ["LOCAL_KERNELS"] = f"{NAME}={folder}"
        wanted = generated(model, "paged|eager", False)
        packed = generated(model, NAME, False)
        before = calls.copy()
        paged = generated(model, NAME, True)
    print(
        f"{len(wanted)} requests of {[len(tokens) for tokens in wanted]} tokens: {packed == wanted}, {paged == wanted}"
    )
    print(f"calls: {dict(before)}, then {dict(calls - before)}")
    right = [len(tokens) for tokens in wanted] == [NEW_TOKENS] * len(LENGTHS) and packed == paged == wanted
    right &= set(before) == {"flash_attn_varlen_func"} and calls["flash_attn_with_kvcache with pages"] > 0
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
