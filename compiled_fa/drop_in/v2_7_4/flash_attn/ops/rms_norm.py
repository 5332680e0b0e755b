"""RMS norm, and of a sum with dropout."""

import torch

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.norms import DropoutAddRMSNorm, dropout_add_rms_norm, rms_norm
from compiled_fa.modules.norms import RMSNorm as _RMSNorm

__all__ = ["DropoutAddRMSNorm", "RMSNorm", "dropout_add_rms_norm", "rms_norm"]

__getattr__ = _names_of(__name__)


class RMSNorm(_RMSNorm):
    """compiled_fa.modules.norms.RMSNorm with fewer arguments."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, device=device, dtype=dtype)
