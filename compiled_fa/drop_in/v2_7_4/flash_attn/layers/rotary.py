"""Rotary embedding: functions and a module."""

import torch
from torch import Tensor

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from compiled_fa.rotation import rotated as _rotated

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]

__getattr__ = _names_of(__name__)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (B, S, H, D), rotated by each token's own angles: cos and sin (S, R / 2) or (B, S, R / 2)."""
    return _rotated(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair (a, b) of x's last dimension as (-b, a)."""
    if interleaved:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-second, first], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
