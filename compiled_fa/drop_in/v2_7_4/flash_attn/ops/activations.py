"""Activations."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.activations import (
    bias_gelu,
    gelu_fwd,
    sqrelu_fwd,
    swiglu,
)

__all__ = ["bias_gelu", "gelu_fwd", "sqrelu_fwd", "swiglu"]

__getattr__ = _names_of(__name__)
