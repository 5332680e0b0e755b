"""GPT models."""

from compiled_fa.drop_in.refused import names_of as _names_of
from compiled_fa.modules.gpt import (
    GPTLMHeadModel,
    GPTModel,
    create_block,
    create_mixer_cls,
    create_mlp_cls,
)

__all__ = ["GPTLMHeadModel", "GPTModel", "create_block", "create_mixer_cls", "create_mlp_cls"]

__getattr__ = _names_of(__name__)
