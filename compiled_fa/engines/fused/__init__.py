"""The fused engine: one Triton kernel forward, one backward, from Inductor's flex_attention template.

attention.py  forward and backward of a call
tables.py     a call's tables and numbers on its device, made once for all calls that share them
blocks.py     which keys a row sees, which tiles exist and which are full, from lengths
kernels.py    what compiled code is for, and the tensors that it takes
flex.py       a call as one graph: the template's operators and what is around them
pages.py      keys in pages and KV caches, read where they lie: which can be, in which tiles, and their tables
paged.py      a call on those as one graph
list_order.py the template's two lines that are others there
mods.py       the score program in the form the template inlines
options.py    tile sizes, warps and stages
"""

from ..engine import nothing_prepared
from .attention import backward, defers, forward, inlines, unsupported_reason

__all__ = ["backward", "defers", "forward", "inlines", "name", "prepared", "unsupported_reason"]

name = "fused"

prepared = nothing_prepared
