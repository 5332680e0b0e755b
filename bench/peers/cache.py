"""flash_attn_with_kvcache on a decoding case's keys: as they are, and with the last one still to be written.

The cache has room for as many keys again, in one piece, or pages of others in the pool: what a step must not pay for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_fa import flash_attn_with_kvcache

from ..cases import Case, Direction, Inputs
from .base import Peer, Prepared


def _refusal(case: Case, direction: Direction, device_type: str) -> str | None:
    if direction != "forward":
        return "forward only"
    if len({q for q, _ in case.lengths}) != 1 or case.dropout_p:
        return "for decoding"
    return None


def _refusal_but_for_pages(case: Case, direction: Direction, device_type: str) -> str | None:
    return _refusal(case, direction, device_type) if case.page_size else "for paged cases"


def _prepared(inputs: Inputs, append: bool = False, one_piece: bool = False) -> Prepared:
    case = inputs.case
    q = inputs.batched(inputs.q)
    lengths = torch.tensor([k for _, k in case.lengths], dtype=torch.int32, device=inputs.device)
    options: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "softmax_scale": case.softmax_scale,
    }
    if case.page_size and not one_piece:
        k_cache, v_cache, table = inputs.pages()
        options["block_table"] = table[:, :-1].contiguous()
    else:
        k_cache, v_cache = (_with_room(inputs, x) for x in (inputs.k, inputs.v))
    if append:
        last = (inputs.cu_seqlens_k[1:] - 1).long()
        options |= {"k": inputs.k[last][:, None], "v": inputs.v[last][:, None]}
        lengths = lengths - 1

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out: Tensor = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, **options)
        return out

    return Prepared((q, k_cache, v_cache), attend, inputs.batched(inputs.dout))


def _with_room(inputs: Inputs, rows: Tensor) -> Tensor:
    case = inputs.case
    cache = rows.new_zeros(case.batch, 2 * case.max_seqlen_k, *rows.shape[1:])
    for b in range(case.batch):
        keys = inputs.sequence(rows, b, 1)
        cache[b, : len(keys)] = keys
    return cache


CACHE = Peer(_refusal, _prepared)
ONE_PIECE = Peer(_refusal_but_for_pages, lambda inputs: _prepared(inputs, one_piece=True))
APPEND = Peer(_refusal, lambda inputs: _prepared(inputs, append=True))
