"""Arguments of flash_attn's names that are served with a limit, or refused unless they have a certain value.

docs/flash_attn.md and compiled_fa.compat say what stands here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Limit:
    """words: what is so. refused: other values raise. harmless: the value at which nothing is to be said."""

    words: str
    refused: bool = False
    harmless: Any = None


_GROUP = Limit("must be None: tensor parallelism is left to torch.distributed.tensor.parallel", True)
_PAGES = Limit("forward only: pages have no gradient")
_DETERMINISTIC = Limit("accepted: results always are", harmless=False)
_FUSION = Limit("accepted: torch.compile fuses", harmless=False)
_HINT = Limit("a hint; on a CPU 1 keeps a row's bits from depending on the rows beside it", harmless=0)
_OUT = Limit("must be None: results are new tensors", True)
_SAVED = Limit("accepted: what is saved for backward is autograd's choice", harmless=0)
_UNWRITTEN = Limit("accepted: logits are never written to", harmless=False)
_NO_GROUP = Limit("accepted: there is no process group", harmless=True)
_NO_MATTER = Limit("accepted: nothing depends on it", harmless=0)

_FUNCTIONS = ("func", "kvpacked_func", "qkvpacked_func", "varlen_func", "varlen_kvpacked_func", "varlen_qkvpacked_func")


def _private(name: str) -> list[str]:
    """Both names of one private function."""
    return [f"flash_attn.flash_attn_interface.{prefix}_flash_attn_{name}" for prefix in ("", "_wrapped")]


def _of(names: Iterable[str], **limits: Limit) -> dict[str, dict[str, Limit]]:
    """The same of several names of one thing."""
    return dict.fromkeys(names, limits)


ARGUMENTS: dict[str, dict[str, Limit]] = {
    **{f"flash_attn.flash_attn_{name}": {"deterministic": _DETERMINISTIC} for name in _FUNCTIONS},
    "flash_attn.flash_attn_varlen_func": {"deterministic": _DETERMINISTIC, "block_table": _PAGES},
    "flash_attn.flash_attn_with_kvcache": {"num_splits": _HINT},
    **_of(_private("backward"), deterministic=_DETERMINISTIC),
    **_of(
        _private("varlen_forward"),
        zero_tensors=_NO_MATTER,
        num_splits=_NO_MATTER,
        leftpad_k=Limit("not with block_table"),
    ),
    **_of(_private("varlen_backward"), deterministic=_DETERMINISTIC, zero_tensors=_NO_MATTER),
    "flash_attn.losses.cross_entropy.CrossEntropyLoss": {"process_group": _GROUP, "inplace_backward": _UNWRITTEN},
    **_of(
        (
            "flash_attn.losses.cross_entropy.cross_entropy_loss",
            "flash_attn.ops.triton.cross_entropy.cross_entropy_loss",
        ),
        process_group=_GROUP,
        inplace_backward=_UNWRITTEN,
        precomputed_lse=Limit("accepted: lse is computed from the logits all the same"),
    ),
    "flash_attn.ops.triton.layer_norm.layer_norm_fn": {"out": _OUT, "residual_out": _OUT},
    "flash_attn.ops.triton.layer_norm.rms_norm_fn": {"out": _OUT, "residual_out": _OUT},
    "flash_attn.ops.fused_dense.fused_dense_func": {"process_group": _GROUP, "sequence_parallel": _NO_GROUP},
    "flash_attn.ops.fused_dense.fused_mlp_func": {
        "process_group": _GROUP,
        "sequence_parallel": _NO_GROUP,
        "save_pre_act": replace(_SAVED, harmless=True),
        "checkpoint_lvl": _SAVED,
        "heuristic": _NO_MATTER,
    },
    **_of(
        ("flash_attn.ops.fused_dense.FusedMLP", "flash_attn.modules.mlp.FusedMLP"),
        checkpoint_lvl=_SAVED,
        heuristic=replace(_NO_MATTER, harmless="auto"),
    ),
    "flash_attn.modules.mha.FlashSelfAttention": {"deterministic": _DETERMINISTIC},
    "flash_attn.modules.mha.FlashCrossAttention": {"deterministic": _DETERMINISTIC},
    "flash_attn.modules.mha.MHA": {
        "dwconv": Limit("must be False: a convolution after the projection is not served", True, False),
        "fused_bias_fc": _FUSION,
    },
    "flash_attn.modules.block.Block": {
        "fused_dropout_add_ln": _FUSION,
        "sequence_parallel": Limit("must be False: layers over a process group are not served", True, False),
        "mark_shared_params": Limit("must be False: layers over a process group are not served", True, False),
    },
    "flash_attn.models.gpt.GPTModel": {"process_group": _GROUP},
    "flash_attn.models.gpt.GPTLMHeadModel": {"process_group": _GROUP},
    "flash_attn.models.gpt.create_block": {"process_group": _GROUP},
    "flash_attn.models.gpt.create_mixer_cls": {"process_group": _GROUP},
    "flash_attn.models.gpt.create_mlp_cls": {
        "process_group": _GROUP,
        "layer_idx": Limit("accepted: the MLPs of all layers are alike"),
    },
}

# What is so of a name whatever its arguments are.
NAMES = {
    "flash_attn.models.gpt.GPTModel": "a configuration's parallel_block, attn_dwconv, norm_head and mup_* are refused",
    "flash_attn.models.gpt.GPTLMHeadModel": "the same; it does not generate, and does not load checkpoints of others",
    "flash_attn.modules.mha.CrossAttention": "with a mask of keys, rows of scores are in memory",
    "flash_attn.modules.mha.SelfAttention": "with a mask of keys, rows of scores are in memory",
    "flash_attn.flash_attn_interface._get_block_size_n": "2^30: here a row of S_dmask is one block",
    "flash_attn.flash_attn_interface.flash_attn_gpu": "generator must be None",
    "flash_attn.flash_attn_interface.flash_attn_cuda": "generator must be None",
    "flash_attn.bert_padding.unpad_input": "five results; four with profile 2.6.3",
    "flash_attn.bert_padding.rearrange": "einops' own; where it is not installed, one that splits, merges and permutes",
}
