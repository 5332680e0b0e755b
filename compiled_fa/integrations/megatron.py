"""Megatron-Core's core attention on our ops: what a layer's spec names in the place of TEDotProductAttention.

    from compiled_fa.integrations.megatron import CoreAttention

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = CoreAttention

Megatron-Core has two of its own: DotProductAttention, which holds all scores in memory, and TransformerEngine's, which
leaves cards below 8.0 to an attention of that kind. It calls flash_attn itself in inference only, which the drop-in
serves.

Names and layouts are Megatron's: sq and sk lengths, b batch, np heads and ng key heads of this rank, hn head_dim, t
tokens of packed sequences. Tensor parallelism is its own, by heads. It imports nothing of Megatron.

Private API: the arguments of core attention's constructor and forward, and fields of TransformerConfig, tried with
megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..with_bias import attention, varlen_attention

MASKS = {"causal": True, "padding_causal": True, "no_mask": False, "padding": False}


class CoreAttention(torch.nn.Module):
    """softmax(q kᵀ) v of the heads of a rank.

    Args:
        config: Megatron's TransformerConfig. attention_dropout, window_size, window_attn_skip_freq, softmax_scale and
            softmax_type (vanilla; off-by-one, a sink of 0) hold; apply_query_key_layer_scaling, which scales scores
            down and up again, changes nothing.
        layer_number: the layer's, from 1 on.
        attn_mask_type: AttnMaskType; causal or padding_causal: from the bottom right, as flash_attn's.
        attention_type: "self" or "cross"; nothing depends on it.
        attention_dropout, softmax_scale: None: config's.
        cp_comm_type, pg_collection: accepted: heads are computed apart.

    Raises:
        ValueError: context_parallel_size is not 1; softmax_type is learnable; the mask is an arbitrary one.

    Source: megatron.core.transformer.dot_product_attention.DotProductAttention.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size must be 1, got {config.context_parallel_size}")
        softmax_type = getattr(config, "softmax_type", "vanilla")
        if softmax_type not in ("vanilla", "off-by-one"):  # learnable sinks would be a part of sharded checkpoints
            raise ValueError(f"softmax_type must be 'vanilla' or 'off-by-one', got {softmax_type!r}")
        self.off_by_one = softmax_type == "off-by-one"
        self.config = config
        self.causal = _causal(attn_mask_type)
        self.dropout_p: float = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.window_size = _window_size(config, max(1, layer_number))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query (sq, b, np, hn), key and value (sk, b, ng, hn) -> (sq, b, np · hn); or of packed sequences
        (packed_seq_params of qkv_format "thd"), query (t, np, hn), key and value (t, ng, hn) -> (t, np · hn).

        attention_mask: with a causal attn_mask_type it is not read, as in TransformerEngine: causal is what it says.
        attn_mask_type: None: the constructor's.
        attention_bias: what broadcasts to (b, np, sq, sk), added to the scaled scores; not of packed sequences.

        Raises:
            ValueError: attention_mask where the mask is not causal; packed sequences that are padded in between, in
                another format than thd, or with a bias.
        """
        causal = self.causal if attn_mask_type is None else _causal(attn_mask_type)
        if attention_mask is not None and not causal and packed_seq_params is None:
            raise ValueError("attention_mask must be None where attn_mask_type is not causal: pack sequences instead")
        options: dict[str, Any] = {
            "sinks": query.new_zeros(query.shape[-2]) if self.off_by_one else None,
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": causal,
            "window_size": self.window_size,
        }
        out: Tensor
        if packed_seq_params is None:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            out = attention(q, k, v, attention_bias, **options)
            return out.transpose(0, 1).flatten(2)
        if attention_bias is not None:
            raise ValueError("attention_bias must be None with packed_seq_params")
        packing = _packing(packed_seq_params)
        out = varlen_attention(query, key, value, *packing, **options)
        return out.flatten(1)


def _causal(attn_mask_type: Any) -> bool:
    """attn_mask_type: AttnMaskType, or a member's name."""
    name = getattr(attn_mask_type, "name", attn_mask_type)
    if name not in MASKS:
        raise ValueError(f"attn_mask_type must be one of {', '.join(MASKS)}, got {name!r}")
    return MASKS[name]


def _window_size(config: Any, layer_number: int) -> tuple[int, int]:
    """window_attn_skip_freq: n: every n-th layer has none; a list: which layers have one."""
    window, skipped = getattr(config, "window_size", None), getattr(config, "window_attn_skip_freq", None)
    if isinstance(skipped, int):
        here = layer_number % skipped != 0
    else:
        here = skipped is None or bool(skipped[layer_number - 1])
    if not window or not here:
        return -1, -1
    left, right = window
    return left, right


def _packing(packed: Any) -> tuple[Tensor, Tensor, int, int]:
    """flash_attn_varlen_func's lengths."""
    if packed.qkv_format != "thd":
        raise ValueError(f"packed_seq_params.qkv_format must be 'thd', got {packed.qkv_format!r}")
    for side in ("q", "kv"):
        padded = getattr(packed, f"cu_seqlens_{side}_padded", None)
        if padded is not None and not torch.equal(padded, getattr(packed, f"cu_seqlens_{side}")):
            raise ValueError(f"packed_seq_params.cu_seqlens_{side}_padded must be None: sequences follow one another")
    return packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv
