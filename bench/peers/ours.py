"""compiled_fa, called as its users call it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compiled_fa import flash_attn_func, flash_attn_varlen_func, use_engine

from ..cases import Case, Direction, Inputs
from .base import Attend, Peer, Prepared, dense, packed


def _options(inputs: Inputs) -> dict[str, Any]:
    case = inputs.case
    return {
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
    }


def _refusal(case: Case, direction: Direction, device_type: str) -> str | None:
    if case.page_size and direction != "forward":
        return "no gradients of paged keys"
    if case.varlen and case.dropout_p:
        return "no suite has varlen with dropout"
    return None


def _prepare(inputs: Inputs) -> Prepared:
    if inputs.case.page_size:
        return _paged(inputs)
    return _varlen(inputs) if inputs.case.varlen else _dense(inputs)


def _dense(inputs: Inputs) -> Prepared:
    case, options = inputs.case, _options(inputs)
    if not case.dropout_p:
        return dense(inputs, lambda q, k, v: flash_attn_func(q, k, v, **options))
    seed = inputs.dropout_seed

    def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The op below flash_attn_func, which would draw a seed that nobody knows."""
        left, right = options["window_size"]
        others = {name: value for name, value in options.items() if name != "window_size"}
        out: Tensor
        out, _ = torch.ops.compiled_fa.attention(
            q, k, v, window_left=left, window_right=right, dropout_p=case.dropout_p, dropout_seed=seed, **others
        )
        return out

    return dense(inputs, lambda q, k, v: flash_attn_func(q, k, v, case.dropout_p, **options), checked, seed)


def _varlen(inputs: Inputs) -> Prepared:
    options, packing = _options(inputs), inputs.packing
    return packed(inputs, lambda q, k, v: flash_attn_varlen_func(q, k, v, *packing, **options))


def _paged(inputs: Inputs) -> Prepared:
    """Keys and values in pages that lie in random order, as in a cache that has been in use for a while."""
    options, packing = _options(inputs), inputs.packing
    k, v, block_table = inputs.pages()
    block_table = block_table[:, :-1].contiguous()  # lengths are alike: only the last column names no pages

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, *packing, **options, block_table=block_table)

    return Prepared((inputs.q, k, v), attend, inputs.dout, lambda out: out)


def _prepare_dense(inputs: Inputs) -> Prepared:
    """What pages cost: the same case with its keys and values in one piece.

    Its own piece: two peers that read the same tensors would find in the cache what the other has read.
    """
    prepared = _dense(inputs)
    q, k, v = prepared.leaves
    return replace(prepared, leaves=(q, k.clone(), v.clone()))


def by_engine(name: str) -> Peer:
    """Ours by this one of the engines of a GPU, whichever would be chosen."""

    def by_name(attend: Attend) -> Attend:
        def attend_by_name(*leaves: Tensor) -> Tensor:
            with use_engine(name):  # backward is by the engine that forward was asked to be by
                return attend(*leaves)

        return attend_by_name

    def refusal(case: Case, direction: Direction, device_type: str) -> str | None:
        return _refusal(case, direction, device_type) or (None if device_type == "cuda" else "needs a CUDA device")

    def prepare(inputs: Inputs) -> Prepared:
        prepared = _prepare(inputs)
        checked = None if prepared.checked is None else by_name(prepared.checked)
        return replace(prepared, attend=by_name(prepared.attend), checked=checked)

    return Peer(refusal, prepare)


OURS = Peer(_refusal, _prepare)
OURS_DENSE = Peer(lambda case, direction, device: None if case.page_size else "for paged cases", _prepare_dense)
