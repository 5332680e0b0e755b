"""Rotary embedding, by the name and arguments of flash_attn's kernel."""

from torch import Tensor

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.rotary import apply_rotary_emb as _apply_rotary_emb

__all__ = ["apply_rotary"]

__getattr__ = _names_of(__name__)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """compiled_fa.rotary.apply_rotary_emb; conjugate: by the opposite angles, which undoes it."""
    return _apply_rotary_emb(
        x, cos, -sin if conjugate else sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )
