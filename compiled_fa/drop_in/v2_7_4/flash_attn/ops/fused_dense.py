"""Linear layers and MLPs."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.dense import (
    FusedDense,
    FusedMLP,
    fused_dense_func,
    fused_mlp_func,
)

__all__ = ["FusedDense", "FusedMLP", "fused_dense_func", "fused_mlp_func"]

__getattr__ = _names_of(__name__)
