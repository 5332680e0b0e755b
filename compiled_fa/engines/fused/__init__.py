"""The fused engine: one Triton kernel forward, one backward, from Inductor's flex_attention template.

attention.py  forward and backward of a call
blocks.py     which tiles exist and which are full, computed on the device from lengths
layouts.py    tensors as the template takes them: views of dense ones
aligned.py    packed sequences laid out so that a tile belongs to one of them
mods.py       the score program in the form the template inlines
flex.py       the template's operators, and their compilation
options.py    tile sizes, warps and stages
"""

from .attention import backward, defers, forward, inlines, unsupported_reason

__all__ = ["backward", "defers", "forward", "inlines", "name", "unsupported_reason"]

name = "fused"
