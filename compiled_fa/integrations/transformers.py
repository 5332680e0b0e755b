"""transformers' models on our ops: attn_implementation="compiled_fa".

    from compiled_fa.integrations import transformers as integration

    integration.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="compiled_fa")

transformers asks for a mask once a forward and for attention once a layer. Our mask says where each row of a
padded batch has its keys, as running sums of lengths, so that layers have nothing left to work out, nothing is copied,
and no shape depends on a value. Padding is skipped by lengths, as sequences of their own that have no keys.

B batch, H and Hk query and key heads, Sq and Sk lengths, D and Dv head_dims of q, k and of v.

Private API: the names of masking_utils' mask functions, tried with transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import flash_attn_func, flash_attn_varlen_func

NAME = "compiled_fa"
INSTEAD = 'use attn_implementation="eager"'

# Functions of transformers.masking_utils whose masks are a causal flag, a window, or rows packed behind one another.
PATTERNS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}


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
            are the queries'; one shorter than Sk leaves the last keys out. None: all keys.
        dropout, scaling, softcap: flash_attn_func's dropout_p, softmax_scale, softcap.
        sliding_window: w: a query sees w keys to the left, itself included, and as many to the right where not causal.
        position_ids: (1 or B, Sq): where they do not go up by 1, a new sequence begins. Without a mask only.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: B is 1, and these are its sequences, as
            flash_attn_varlen_func has them.

    Returns:
        (out (B, Sq, H, Dv), None).

    Raises:
        ValueError: something is asked for that no such call can give: attention probabilities, a bias, a mask of four
            dimensions, attention sinks, pages; only one of cu_seq_lens_q and cu_seq_lens_k.
    """
    if output_attentions:
        _refuse("output_attentions", "probabilities are never made")
    if position_bias is not None:
        _refuse("position_bias", "a bias of every pair of tokens is not served")
    if s_aux is not None:
        _refuse("s_aux", "attention sinks are not served")
    if block_table is not None:
        _refuse("block_table", "transformers' paged cache is not served here")
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        missing = "cu_seq_lens_q" if cu_seq_lens_q is None else "cu_seq_lens_k"
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k are wanted together, got no {missing}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    options: tuple[Any, ...] = (dropout, scaling, causal, window, softcap)
    if attention_mask is not None:
        packing = _packing(attention_mask, batch, seqlen_q, seqlen_k, together=causal or sliding_window is not None)
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        lengths = max_length_q or batch * seqlen_q, max_length_k or batch * seqlen_k
        packing = (cu_seq_lens_q.int(), cu_seq_lens_k.int(), *lengths)
    else:
        cu_seqlens = _packed_by_positions(position_ids, batch, seqlen_q, seqlen_k)
        if cu_seqlens is None:
            return flash_attn_func(q, k, v, *options), None
        packing = (cu_seqlens, cu_seqlens, seqlen_q, seqlen_k)
    out = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *packing, *options)
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
        None where every query's keys follow from their number alone, else a tensor for `attention`.

    Raises:
        ValueError: a mask that is no padding with causal, window or packed rows; holes in a row's tokens. Under
            torch.compile holes, and blocks of tokens that see each other, are a RuntimeError of the compiled code.
    """
    foreign = None if torch.compiler.is_compiling() else next(_foreign(mask_function), None)
    if use_vmap or foreign or getattr(config, "attention_chunk_size", None) is not None:
        _refuse("mask_function", f"a mask is wanted that is no padding, causal or window: {foreign or 'a custom one'}")
    if attention_mask is not None and attention_mask.dim() != 2:
        _refuse(
            "attention_mask", f"a mask of shape {tuple(attention_mask.shape)} is not one of padding, (batch, tokens)"
        )
    if torch.compiler.is_compiling() and mask_function is not None and "allow_is_bidirectional_skip" not in kwargs:
        _assert_causal(mask_function, batch_size, q_length, q_offset, device)
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
    if not torch.compiler.is_compiling() and ends_together and bool(kept.all()):
        return None
    if is_bidirectional:
        first_query = kv_length - q_length
    return _rows(kept, first_query, q_length)


def _foreign(function: Any) -> Iterator[str]:
    """Names of the functions that a mask function is made of, and that are not in PATTERNS."""
    if function is None:
        return
    name = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    if name not in PATTERNS:
        yield name
    for cell in getattr(function, "__closure__", None) or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, (list, tuple)) else (inner,):
            if callable(part) and not isinstance(part, Tensor):
                yield from _foreign(part)


def _assert_causal(
    mask_function: Callable[..., Any], batch: int, q_length: int, q_offset: int | Tensor, device: Any
) -> None:
    """For compiled code, which cannot see what a mask function is made of: no query sees the key after its own, as it
    would in a block of tokens that see each other."""
    if q_length == 1:
        return
    queries = torch.arange(q_length - 1, device=device)[None] + q_offset
    rows = torch.arange(batch, device=device)[:, None]
    sees = mask_function(rows, torch.zeros_like(rows), queries, queries + 1)
    words = "mask_function: a mask is wanted that is no padding, causal or window: a query sees the key after its own"
    torch._assert_async(~sees.any(), words)


def _rows(kept: Tensor, first_query: int | Tensor, q_length: int) -> Tensor:
    """kept (B, Sk) bool, where there are keys -> int32 (3, 1, 1, 5 B + 1), running sums of lengths: of queries where
    those of padding see nothing, of queries where each sees its row's keys, and of keys.

    Four dimensions are what transformers passes on as it is. Each row is five sequences: queries of padding on the
    left, keys of it, the tokens, queries of padding on the right, keys of it.

    first_query: its place among the keys.
    """
    kv_length = kept.shape[1]
    places = torch.arange(kv_length, device=kept.device)
    length = kept.sum(-1)
    start = torch.where(kept, places, kv_length).amin(-1)
    end = torch.where(kept, places + 1, 0).amax(-1)
    whole = ((length == 0) | (end - start == length)).all()
    words = "attention_mask has holes: a token is missing between others of its row, which is no padding"
    if torch.compiler.is_compiling():
        torch._assert_async(whole, words)
    elif not bool(whole):
        raise ValueError(f"{words}; {INSTEAD}")
    start = torch.where(length == 0, 0, start)
    none, right = torch.zeros_like(start), kv_length - end
    left_q = (start - first_query).clamp(0, q_length)
    tokens_q = (end - first_query).clamp(0, q_length) - left_q
    right_q = q_length - left_q - tokens_q
    lengths = torch.stack(
        [
            torch.stack([left_q, none, tokens_q, right_q, none], -1),
            torch.stack([none, none, none + q_length, none, none], -1),
            torch.stack([none, start, end - start, none, right], -1),
        ]
    )
    sums = F.pad(lengths.flatten(1).cumsum(-1), (1, 0))
    return sums.to(torch.int32)[:, None, None]


def _packing(
    attention_mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int, together: bool
) -> tuple[Tensor, Tensor, int, int]:
    """flash_attn_varlen_func's arguments. together: queries stand at places among the keys."""
    if attention_mask.dim() == 2:
        kept = F.pad(attention_mask != 0, (0, max(0, seqlen_k - attention_mask.shape[1])))
        attention_mask = _rows(kept[:, :seqlen_k], attention_mask.shape[1] - seqlen_q, seqlen_q)
    if attention_mask.dtype != torch.int32 or attention_mask.shape != (3, 1, 1, 5 * batch + 1):
        shape = tuple(attention_mask.shape)
        _refuse(
            "attention_mask",
            f"a mask of shape {shape} and {attention_mask.dtype} is not one of padding, (batch, seqlen)",
        )
    own, all_of_them, keys = attention_mask.flatten(1).unbind(0)
    return own if together else all_of_them, keys, seqlen_q, seqlen_k


def _packed_by_positions(position_ids: Tensor | None, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """cu_seqlens of the rows' sequences, where a row has more than one."""
    if position_ids is None or position_ids.dim() != 2 or seqlen_q == 1 or seqlen_q != seqlen_k:
        return None
    if position_ids.shape[1] != seqlen_q or position_ids.shape[0] not in (1, batch):
        return None
    follows = position_ids.diff(dim=-1) == 1
    if torch.compiler.is_compiling():
        torch._assert_async(
            follows.all(),
            "position_ids begin anew within a row: under torch.compile packed rows come as cu_seq_lens_q, "
            "cu_seq_lens_k, max_length_q and max_length_k (DataCollatorWithFlattening(return_flash_attn_kwargs=True))",
        )
        return None
    if bool(follows.all()):
        return None
    starts = F.pad(~follows, (1, 0), value=True).expand(batch, -1).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=batch * seqlen_q).to(torch.int32)


def _refuse(argument: str, why: str) -> None:
    raise ValueError(f"{argument}: {why} by compiled_fa; {INSTEAD}")
