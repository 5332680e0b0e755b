"""Attention as modules."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)

__all__ = ["MHA", "CrossAttention", "FlashCrossAttention", "FlashSelfAttention", "SelfAttention", "get_alibi_slopes"]

__getattr__ = _names_of(__name__)
