"""Embeddings."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.embedding import (
    GPT2Embeddings,
)

__all__ = ["GPT2Embeddings"]

__getattr__ = _names_of(__name__)
