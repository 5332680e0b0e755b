"""Cross entropy of rows."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.losses import (
    cross_entropy_loss,
)

__all__ = ["cross_entropy_loss"]

__getattr__ = _names_of(__name__)
