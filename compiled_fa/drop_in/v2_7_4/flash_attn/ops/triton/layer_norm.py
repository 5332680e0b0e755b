"""Layer norm and RMS norm of a sum."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.norms import (
    RMSNorm,
    layer_norm_fn,
    rms_norm_fn,
)

__all__ = ["RMSNorm", "layer_norm_fn", "rms_norm_fn"]

__getattr__ = _names_of(__name__)
