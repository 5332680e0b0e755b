"""x-transformers' two flash roads: attn_flash, and packed sequences by flash_attn_varlen_func.

    python -O -m compiled_fa.run tests/clients/x_transformers_flash.py

attn_flash calls F.scaled_dot_product_attention, which compiled_fa.sdpa() serves. attn_flash_pack_seq calls flash_attn,
and asserts before that the card is an Ampere or newer: python -O leaves assertions out. Here the CPU answers for a T4.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from x_transformers import Decoder, TransformerWrapper

import compiled_fa

LENGTHS = [5, 9, 2]
TOLERANCE = 1e-4  # of the greatest element: roundings of fp32


def model(**options: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, **options)
    return TransformerWrapper(num_tokens=61, max_seq_len=32, attn_layers=layers)


def results(network: TransformerWrapper, ids: Tensor, **options: Any) -> list[Tensor]:
    out = network(ids, **options)
    gradients = torch.autograd.grad(out.square().sum(), list(network.parameters()), allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / largest


def main() -> int:
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
    wanted = results(model(), ids)
    with compiled_fa.sdpa(everywhere=True) as calls:
        flash = apart(results(model(attn_flash=True), ids), wanted)
    print(f"attn_flash: {flash:.1e}, {calls}")

    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    packed = ids[:1, : sum(LENGTHS)]
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    lengths = {f"cu_seqlens_{side}": starts for side in "qk"} | {f"max_seqlen_{side}": max(LENGTHS) for side in "qk"}
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    out = model(attn_flash=True, attn_flash_pack_seq=True)(packed, pos=positions, flash_pack_seq_kwargs=lengths)
    each = [model()(row) for row in packed.split(LENGTHS, dim=1)]
    pack = apart([out.detach()], [torch.cat(each, dim=1).detach()])
    print(f"attn_flash_pack_seq: {pack:.1e}")

    right = flash <= TOLERANCE and calls.served > 0 and not calls.left and pack <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
