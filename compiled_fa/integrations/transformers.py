"""transformers' models on our ops: attn_implementation="compiled_fa".

    from compiled_fa.integrations import transformers as integration

    integration.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="compiled_fa")

transformers asks for a mask once a forward and for attention once a layer. Our mask says where each row of a
padded batch has its keys, as running sums of lengths, so that layers have nothing left to work out, nothing is copied,
and no shape depends on a value. Padding is skipped by lengths, as sequences of their own that have no keys. What
lengths cannot say is a bias. transformers_masks.py has both.

B batch, H and Hk query and key heads, Sq and Sk lengths, D and Dv head_dims of q, k and of v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..with_bias import attention as dense_attention
from ..with_bias import varlen_attention
from . import transformers_masks as masks

NAME = "compiled_fa"


def register() -> None:
    """Let transformers know attn_implementation="compiled_fa", for all models of the process.

    Raises:
        ImportError: there is no transformers, or it is older than 5.

    Example:
        register()
        model = LlamaForCausalLM.from_pretrained(path, attn_implementation="compiled_fa")

    Source: transformers' AttentionInterface and AttentionMaskInterface.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("compiled_fa.integrations.transformers wants transformers 5 or newer") from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    block_table: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, as transformers calls it.

    Args:
        module: the layer; its is_causal counts where is_causal is None.
        query, key, value: (B, H, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv).
        attention_mask: what `mask` made, or a padding mask (B, Sk), not 0 where there is a key, whose last Sq columns
            are the queries'; one shorter than Sk leaves the last keys out. None: all keys. Of four dimensions,
            broadcastable to (B, H, Sq, Sk or more): bool, True where a key is seen, or added to scores; it says all
            there is to say, and is_causal and sliding_window nothing.
        dropout, scaling, softcap: flash_attn_func's dropout_p, softmax_scale, softcap.
        sliding_window: w: a query sees w keys to the left, itself included, and as many to the right where not causal.
        s_aux: (H,), attention sinks.
        position_bias: broadcastable to (B, H, Sq, Sk), added to scores.
        position_ids: (1 or B, Sq): where they do not go up by 1, a new sequence begins. Without a mask only.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: B is 1, and these are its sequences, as
            flash_attn_varlen_func has them.

    Returns:
        (out (B, Sq, H, Dv), None).

    Raises:
        ValueError: something is asked for that no such call can give: attention probabilities, pages, a bias of packed
            sequences; only one of cu_seq_lens_q and cu_seq_lens_k.
    """
    if output_attentions:
        masks.refuse("output_attentions", "probabilities are never made")
    if position_bias is not None and cu_seq_lens_q is not None:
        masks.refuse("position_bias", "a bias is of rows that are not packed")
    if block_table is not None:
        masks.refuse("block_table", "transformers' paged cache is not served here")
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k are wanted together, got no {missing}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": scaling, "softcap": softcap, "sinks": s_aux}
    if position_bias is not None or (attention_mask is not None and masks.is_whole(attention_mask)):
        bias = masks.bias_of(position_bias, attention_mask, batch, seqlen_q, seqlen_k, causal, window)
        if attention_mask is None:
            options |= {"causal": causal, "window_size": window}
        return dense_attention(q, k, v, bias, **options), None
    options |= {"causal": causal, "window_size": window}
    if attention_mask is not None:
        packing = masks.packing_of(
            attention_mask, batch, seqlen_q, seqlen_k, together=causal or sliding_window is not None
        )
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        lengths = max_length_q or batch * seqlen_q, max_length_k or batch * seqlen_k
        packing = (cu_seq_lens_q.int(), cu_seq_lens_k.int(), *lengths)
    else:
        cu_seqlens = masks.packed_by_positions(position_ids, batch, seqlen_q, seqlen_k)
        if cu_seqlens is None:
            return dense_attention(q, k, v, **options), None
        packing = (cu_seqlens, cu_seqlens, seqlen_q, seqlen_k)
    out = varlen_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *packing, **options)
    return out.unflatten(0, (batch, seqlen_q)), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What layers are told about padding, and about keys that a static cache does not have yet.

    Args:
        q_offset, kv_offset: the positions of the first query and of the first key.
        mask_function: transformers' causal, sliding or bidirectional one, perhaps with packed rows.
        attention_mask: (B, tokens so far), True where there is one.
        use_vmap: a mask function of somebody's own is part of mask_function.

    Returns:
        None where every query's keys follow from their number alone, else a tensor for `attention`: of lengths, or
        bool (B, 1, Sq, Sk) where the mask is no padding with causal, window or packed rows.

    Raises:
        ValueError: attention_mask has other than two dimensions. Under torch.compile holes in a row's tokens, and
            blocks of tokens that see each other, are a RuntimeError of the compiled code.
    """
    compiling = torch.compiler.is_compiling()
    if attention_mask is not None and attention_mask.dim() != 2:
        masks.refuse(
            "attention_mask", f"a mask of shape {tuple(attention_mask.shape)} is not one of padding, (batch, tokens)"
        )

    places = {"q_offset": q_offset, "kv_offset": kv_offset, "device": device}
    given = {"mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap, **kwargs}
    foreign = not compiling and any(masks.foreign(mask_function))
    if use_vmap or foreign or getattr(config, "attention_chunk_size", None) is not None:
        return masks.whole_mask(batch_size, q_length, kv_length, **places, **given)
    if compiling and mask_function is not None and "allow_is_bidirectional_skip" not in kwargs:
        masks.assert_causal(mask_function, batch_size, q_length, q_offset, device)
    first_query = q_offset - kv_offset
    is_bidirectional = getattr(mask_function, "__name__", "") == "bidirectional_mask_function"
    ends_together = is_bidirectional or (not isinstance(q_offset, Tensor) and first_query + q_length == kv_length)
    if attention_mask is None:
        if ends_together:
            return None
        kept = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        kept = F.pad(attention_mask != 0, (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))
        kept = kept[:, kv_offset : kv_offset + kv_length]
    if not ends_together:
        kept = kept & (torch.arange(kv_length, device=kept.device) < first_query + q_length)
    if not compiling and ends_together and bool(kept.all()):
        return None
    if not masks.is_padding(kept):
        return masks.whole_mask(batch_size, q_length, kv_length, **places, **given)
    if is_bidirectional:
        first_query = kv_length - q_length
    return masks.lengths_of(kept, first_query, q_length)
