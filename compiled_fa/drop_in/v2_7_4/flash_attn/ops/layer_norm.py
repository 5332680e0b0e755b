"""Layer norm of a sum with dropout."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.norms import (
    DropoutAddLayerNorm,
    dropout_add_layer_norm,
    layer_norm,
)

__all__ = ["DropoutAddLayerNorm", "dropout_add_layer_norm", "layer_norm"]

__getattr__ = _names_of(__name__)
