"""The types of arrays that the interpreter is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of any element type: which one an instruction reads and writes is known when it is decoded.
Array = NDArray[Any]
DType = np.dtype[Any]
Bools = NDArray[np.bool_]
Mask = Bools | None  # of a block's threads; None: all of them
