"""xformers' FlashAttention-2 operator, which calls flash_attn's compiled extension: ours through the drop-in.

    python -m compiled_fa.run tests/clients/xformers_operator.py

xformers registers it for CUDA; here the same functions are registered for the CPU. Results and gradients under each of
its masks are those of its masks written out, and compiled_fa.xformers_api's are, too. And the line that
docs/integrations.md gives for a Turing card takes away xformers' objection to it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import xformers.ops as xops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from xformers.ops import fmha
from xformers.ops.fmha import attn_bias, flash

import compiled_fa.xformers_api as ours

TOLERANCE = 4e-3  # of the greatest element: roundings of fp16
FLASH = (flash.FwOp, flash.BwOp)


def objects_to_turing() -> bool:
    """Does either operator ask for another card, where the card is a T4?"""
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 16, dtype=torch.float16, device="cuda")
        reasons = [reason for kind in FLASH for reason in kind.not_supported_reasons(fmha.Inputs(q, q, q))]
    return any("capability" in reason for reason in reasons)


def on_cpu() -> None:
    for operator in (flash._flash_fwd, flash._flash_bwd):
        operator.register_kernel("cpu", operator._init_fn)
    for kind in FLASH:
        kind.SUPPORTED_DEVICES = {"cpu"}


def masks(module: Any) -> dict[str, Any]:
    """Of xformers, or of ours: the names are the same."""
    blocks = module.BlockDiagonalMask.from_seqlens
    apart = blocks([5, 9, 2], [7, 9, 6])
    return {
        "none": None,
        "LowerTriangularMask": module.LowerTriangularMask(),
        "LowerTriangularFromBottomRightMask": module.LowerTriangularFromBottomRightMask(),
        "its local kind": module.LowerTriangularFromBottomRightMask().make_local_attention(3),
        "LocalAttentionFromBottomRightMask": module.LocalAttentionFromBottomRightMask(2, 1),
        "BlockDiagonalMask": apart,
        "BlockDiagonalCausalMask": blocks([5, 9, 2]).make_causal(),
        "BlockDiagonalCausalFromBottomRightMask": apart.make_causal_from_bottomright(),
        "BlockDiagonalCausalLocalAttentionMask": blocks([5, 9, 2]).make_local_attention(3),
        "BlockDiagonalCausalLocalAttentionFromBottomRightMask": apart.make_local_attention_from_bottomright(3),
    }


def inputs_of(mask: Any) -> tuple[Tensor, ...]:
    """Leaves in fp16: of one row where the mask is of blocks."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(mask, ours.BlockDiagonalMask):
        lengths = (1, mask.q_seqinfo.total), (1, mask.k_seqinfo.total)
    else:
        lengths = (2, 12), (2, 12 if isinstance(mask, ours.LowerTriangularMask) else 16)
    shapes = [(*lengths[0], 4, 16), (*lengths[1], 4, 16), (*lengths[1], 4, 16)]
    return tuple(torch.randn(shape, generator=generator).half().requires_grad_() for shape in shapes)


def results(function: Any, inputs: tuple[Tensor, ...], mask: Any, **options: Any) -> list[Tensor]:
    out = function(*inputs, attn_bias=mask, scale=0.3, **options)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, towards)]


def written_out(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if attn_bias is not None:
        scores = scores + attn_bias.materialize(tuple(scores.shape), scores.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def main() -> int:
    before = objects_to_turing()
    flash.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY = flash.BwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY = (7, 5)
    after = objects_to_turing()
    print(f"xformers refuses a card of 7.5: {before}, then {after}")
    on_cpu()
    wrong = int((before, after) != (True, False))
    theirs = masks(attn_bias)
    for name, mask in masks(ours).items():
        inputs = inputs_of(mask)
        exact = results(written_out, tuple(x.detach().double().requires_grad_() for x in inputs), theirs[name])
        by_xformers = results(xops.memory_efficient_attention, inputs, theirs[name], op=FLASH)
        by_ours = results(ours.memory_efficient_attention, inputs, mask)
        for way, found in (("xformers", by_xformers), ("xformers_api", by_ours)):
            apart = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
            print(f"{name}, {way}: {apart:.1e}")
            wrong += not apart <= TOLERANCE
    groups = torch.randn(1, 9, 2, 1, 16).half().expand(-1, -1, -1, 3, -1)
    query = torch.randn(1, 9, 2, 3, 16).half()
    through_xformers = fmha.memory_efficient_attention_forward(query, groups, groups, op=flash.FwOp)
    without_it = ours.memory_efficient_attention(query, groups, groups)
    wrong += not torch.allclose(through_xformers, without_it, atol=TOLERANCE)
    print("right" if not wrong else "WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
