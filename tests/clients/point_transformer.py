"""PointTransformerV3's call of flash_attn: patches of a serialized cloud, packed, after .half(), and back.

    python -m compiled_fa.run tests/clients/point_transformer.py

As its SerializedAttention makes it: `import flash_attn`, qkv (tokens, 3, nheads, head_dim) in fp16 of a layer in fp32,
cu_seqlens of unequal patches as int32, max_seqlen the patch size, and the result cast to the layer's dtype.
"""

from __future__ import annotations

import sys

import flash_attn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, NHEADS, PATCH = 32, 4, 48
LENGTHS = [PATCH, PATCH, 17, 1]
TOLERANCE = 4e-3  # of the greatest element: roundings of fp16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cu_seqlens: Tensor, by_flash: bool) -> Tensor:
        qkv = self.qkv(x).reshape(-1, 3, NHEADS, WIDTH // NHEADS)
        scale = (WIDTH // NHEADS) ** -0.5
        if by_flash:
            out = flash_attn.flash_attn_varlen_qkvpacked_func(
                qkv.half(), cu_seqlens, max_seqlen=PATCH, dropout_p=0.0, softmax_scale=scale
            ).reshape(-1, WIDTH)
            out = out.to(qkv.dtype)
        else:
            outs = []
            for part in qkv.split(LENGTHS):
                q, k, v = part.transpose(0, 2).transpose(0, 1).unbind(0)
                outs.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(0, 1).flatten(1))
            out = torch.cat(outs)
        result: Tensor = self.projection(out)
        return result


def main() -> int:
    torch.manual_seed(0)
    layer = Attention()
    x = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    towards = torch.randn(sum(LENGTHS), WIDTH)
    outcomes = []
    for by_flash in (True, False):
        out = layer(x, cu_seqlens, by_flash)
        outcomes.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], towards)])
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*outcomes, strict=True))
    print(f"{flash_attn.__file__}: output and gradients differ by {apart:.1e} of the greatest")
    right = apart <= TOLERANCE and all(x.dtype == torch.float32 for x in outcomes[0])
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
