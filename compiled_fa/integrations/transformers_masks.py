"""What transformers' masks say, in a form that our functions take: running sums of lengths, or a bias.

B batch, H query heads, Sq and Sk lengths.

Private API: transformers.masking_utils.sdpa_mask, and the names of mask functions there, tried with transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scores import Window
from ..scores.masks import within

INSTEAD = 'use attn_implementation="eager"'
HOLES = "attention_mask has holes: a token is missing between others of its row, which is no padding"

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


def foreign(function: Any) -> Iterator[str]:
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
                yield from foreign(part)


def assert_causal(
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


def whole_mask(*arguments: Any, **options: Any) -> Tensor:
    """transformers' own mask, bool (B, 1, Sq, Sk)."""
    from transformers.masking_utils import sdpa_mask

    given = {name: value for name, value in options.items() if value is not None}
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    found: Tensor = sdpa_mask(*arguments, **{**given, **skips})
    return found


def is_whole(attention_mask: Tensor) -> bool:
    """Is it a mask of four dimensions, and not lengths?"""
    return attention_mask.dim() == 4 and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point())


def bias_of(
    position_bias: Tensor | None,
    attention_mask: Tensor | None,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window: tuple[int, int],
) -> Tensor | None:
    """Both in one, broadcastable to (B, H, Sq, Sk)."""
    if position_bias is not None:
        position_bias = position_bias[..., :seqlen_k]
    if attention_mask is None:
        return position_bias
    if is_whole(attention_mask):
        seen = attention_mask[..., :seqlen_k]
    else:
        seen = _seen(_lengths(attention_mask, batch, seqlen_q, seqlen_k), batch, seqlen_q, seqlen_k, causal, window)
    if position_bias is None:
        return seen
    if seen.dtype == torch.bool:
        return torch.where(seen, position_bias, -torch.inf)
    return position_bias + seen


def _seen(lengths: Tensor, batch: int, seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """What `lengths_of` made of a mask -> bool (B, 1, 1 or Sq, Sk): the keys that queries see."""
    of_queries, _, of_keys = lengths.flatten(1).diff().unflatten(1, (batch, -1)).unbind(0)
    start, stop = of_keys[:, 1, None, None, None], of_keys[:, 1:3].sum(-1)[:, None, None, None]
    key = torch.arange(seqlen_k, device=lengths.device)
    seen: Tensor = within(key, start, stop)
    sides = Window.of(causal, *window)
    if sides == Window():
        return seen
    # The last token is the last key; queries behind it are padding.
    first_query = stop - of_queries[:, :3].sum(-1)[:, None, None, None]
    position = first_query + torch.arange(seqlen_q, device=lengths.device)[:, None]
    return seen & sides.contains(position, key)


def is_padding(kept: Tensor) -> bool:
    """Is no token missing between others of its row? In compiled code a hole is an error when that runs."""
    places = torch.arange(kept.shape[1], device=kept.device)
    start, end = torch.where(kept, places, kept.shape[1]).amin(-1), torch.where(kept, places + 1, 0).amax(-1)
    length = kept.sum(-1)
    whole = ((length == 0) | (end - start == length)).all()
    if not torch.compiler.is_compiling():
        return bool(whole)
    torch._assert_async(whole, HOLES)
    return True


def lengths_of(kept: Tensor, first_query: int | Tensor, q_length: int) -> Tensor:
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


def packing_of(
    attention_mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int, together: bool
) -> tuple[Tensor, Tensor, int, int]:
    """flash_attn_varlen_func's arguments. together: queries stand at places among the keys."""
    own, all_of_them, keys = _lengths(attention_mask, batch, seqlen_q, seqlen_k).flatten(1).unbind(0)
    return own if together else all_of_them, keys, seqlen_q, seqlen_k


def _lengths(attention_mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """`lengths_of` of a mask of padding, (B, tokens), or that itself."""
    if attention_mask.dim() == 2:
        kept = F.pad(attention_mask != 0, (0, max(0, seqlen_k - attention_mask.shape[1])))
        if not is_padding(kept[:, :seqlen_k]):
            raise ValueError(f"{HOLES}; {INSTEAD}")
        attention_mask = lengths_of(kept[:, :seqlen_k], attention_mask.shape[1] - seqlen_q, seqlen_q)
    if attention_mask.dtype != torch.int32 or attention_mask.shape != (3, 1, 1, 5 * batch + 1):
        shape = tuple(attention_mask.shape)
        refuse(
            "attention_mask",
            f"a mask of shape {shape} and {attention_mask.dtype} is not one of padding, (batch, seqlen)",
        )
    return attention_mask


def packed_by_positions(position_ids: Tensor | None, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
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


def refuse(argument: str, why: str) -> NoReturn:
    """Raises ValueError, with what to do instead."""
    raise ValueError(f"{argument}: {why} by compiled_fa; {INSTEAD}")
