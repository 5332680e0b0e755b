"""Seconds from the start of a new process to its first result: the process that bench/processes.py starts.

python -m bench.first_use ours
"""

import time

START = time.perf_counter()  # before anything that takes time is imported

import json  # noqa: E402
import sys  # noqa: E402


def main(peer: str) -> None:
    import torch

    after_torch = time.perf_counter()
    q = torch.randn(1, 1024, 8, 64)
    if peer == "ours":
        import compiled_fa

        after_import = time.perf_counter()
        compiled_fa.flash_attn_func(q, q, q, causal=True)
    elif peer == "SDPA":
        after_import = time.perf_counter()
        heads_first = q.transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(heads_first, heads_first, heads_first, is_causal=True)
    elif peer == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        after_import = time.perf_counter()
        heads_first = q.transpose(1, 2)
        mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 1024, 1024, device="cpu")
        torch.compile(flex_attention)(heads_first, heads_first, heads_first, block_mask=mask)
    else:
        raise SystemExit(f"peer must be ours, SDPA or flex, got {peer}")
    end = time.perf_counter()
    parts = {"import_torch_s": after_torch - START, "import_s": after_import - after_torch}
    print(json.dumps({"total_s": end - START, **parts, "first_call_s": end - after_import}))


if __name__ == "__main__":
    main(sys.argv[1])
