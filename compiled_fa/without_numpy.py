"""Import torch quietly where there is no NumPy, which neither it nor this package needs.

torch says so while it is imported, in the first lines that a new installation prints. Who asks it for an array is told
then. What else it has to say about NumPy, such as that a version does not fit, is said as ever.
"""

from __future__ import annotations

import sys
import warnings

if "torch" not in sys.modules:
    warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", module=r"torch\.")
    _quiet = warnings.filters[0]
    try:
        import torch  # noqa: F401
    finally:
        warnings.filters.remove(_quiet)  # type: ignore[attr-defined]
