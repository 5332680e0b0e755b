"""diffusers' flash backend, which calls flash_attn: ours through the drop-in.

    python -m compiled_fa.run tests/clients/diffusers_flash.py

A Flux transformer with random small weights gives the output and the gradients of diffusers' own math backend, and
attention under a padding mask of its varlen backend, too. A UNet's attention calls scaled_dot_product_attention.
"""

from __future__ import annotations

import sys

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

import compiled_fa

TOLERANCE = 1e-4  # of the greatest element: roundings of fp32


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    largest = max(float(x.abs().max()) for x in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) / largest


def flux(backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    model.set_attention_backend(backend)
    out = model(
        hidden_states=torch.randn(1, 16, 4),
        encoder_hidden_states=torch.randn(1, 7, 32),
        pooled_projections=torch.randn(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=torch.randn(16, 3),
        txt_ids=torch.randn(7, 3),
    ).sample
    gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def unet() -> Tensor:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    with torch.no_grad():
        out: Tensor = model(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 7, 16)).sample
    return out


def main() -> int:
    wrong = 0
    for name, value in (
        ("Flux by flash", apart(flux("flash"), flux("_native_math"))),
        ("attention by flash_varlen", apart([varlen("flash_varlen")], [varlen("native")])),
    ):
        print(f"{name}: {value:.1e}")
        wrong += not value <= TOLERANCE
    wanted = unet()
    with compiled_fa.sdpa(everywhere=True) as calls:
        found = unet()
    print(f"UNet: {apart([found], [wanted]):.1e}, {calls}")
    wrong += not (apart([found], [wanted]) <= TOLERANCE and calls.served and not calls.left)
    print("right" if not wrong else "WRONG")
    return 1 if wrong else 0


def varlen(backend: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 2, 16, generator=generator).unbind(0)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    if backend == "native":
        mask = mask[:, None, None]
    out: Tensor = dispatch_attention_fn(q, k, v, mask, backend=backend)
    return out


if __name__ == "__main__":
    sys.exit(main())
