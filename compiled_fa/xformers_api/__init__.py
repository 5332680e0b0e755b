"""xformers.ops.memory_efficient_attention and its masks, on our ops: for code that must leave xformers.

    from compiled_fa.xformers_api import BlockDiagonalMask, LowerTriangularMask, memory_efficient_attention

    attention.py  the function
    attn_bias.py  the masks, under xformers' names
    lengths.py    where the sequences of packed rows lie
    calls.py      a mask as calls of flash_attn_varlen_func

B batch, M and N lengths of query and key, H heads, G groups of heads, K and Kv head_dims of query and of value.

Source: xformers 0.0.35, whose signatures and meaning these keep.
"""

from . import attn_bias
from .attention import memory_efficient_attention
from .attn_bias import *  # noqa: F403  # its __all__ is the list of masks
from .attn_bias import __all__ as _masks

__all__ = ["attn_bias", "memory_efficient_attention", *_masks]
