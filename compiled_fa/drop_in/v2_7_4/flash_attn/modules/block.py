"""A transformer's block."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.block import (
    Block,
)

__all__ = ["Block"]

__getattr__ = _names_of(__name__)
