"""RMS norm, and of a sum with dropout."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.fused import (
    DropoutAddRMSNorm,
    RMSNorm,
    dropout_add_rms_norm,
    rms_norm,
)

__all__ = ["DropoutAddRMSNorm", "RMSNorm", "dropout_add_rms_norm", "rms_norm"]

__getattr__ = _names_of(__name__)
