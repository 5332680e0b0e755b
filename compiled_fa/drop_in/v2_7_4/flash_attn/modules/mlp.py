"""MLPs."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.dense import FusedMLP
from compiled_fa.modules.mlp import GatedMlp, Mlp

__all__ = ["FusedMLP", "GatedMlp", "Mlp"]

__getattr__ = _names_of(__name__)
