"""Cross entropy as a module."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.losses import (
    CrossEntropyLoss,
    cross_entropy_loss,
)

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]

__getattr__ = _names_of(__name__)
