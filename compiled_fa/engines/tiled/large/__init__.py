"""Tiles of a GPU's size: few launches, each on as many scores as a share of the device's memory holds.

forward.py, backward.py   the two algorithms of the package above, in steps of as few launches as there are
call.py                   one call: its chunks, its program, its buffers
sizes.py                  tile sizes from bytes
budget.py                 the bytes that a call may take
groups.py                 which packed sequences run side by side
operands.py               rows of dense, packed and paged tensors as operands of products, and results back in place
rims.py                   what the mask hides, where a tile has something to hide
products.py               matrix products in fp32 of operands in half precision

What a tile is, and which of them exist, is the package's above. Nothing here waits for the device, but that a packed
call reads its lengths.
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
