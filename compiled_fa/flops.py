"""What torch.utils.flop_counter counts for our ops.

Its convention for attention: matrix products only, two for a multiply and an add; all Sq · Sk scores of a head and
sequence, whatever causal, window and dropout leave out; two products forward, and five backward, which recomputes the
scores. Forward mode has five, too. Of packed sequences and caches the lengths are read, for which a GPU's host waits;
where they have no values (fake tensors, DTensors) it is their bounds.

Source: sdpa_flop_count and sdpa_backward_flop_count of torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from compiled_fa_turing.late import when_imported

from . import cache_ops, ops
from .cache_call import CacheCall

Given = dict[str, Any]  # an op's arguments by name


def _formula(op: Any, of_head_dim: int, of_head_dim_v: int, scores: Callable[[Given], int]) -> Callable[..., int]:
    """of_head_dim, of_head_dim_v: products of scores with rows of q or k, and with rows of v or out."""
    names = [argument.name for argument in op._schema.arguments]

    def count(*arguments: Any, out_val: Any = None, **named: Any) -> int:
        given = dict(zip(names, arguments, strict=False), **named)
        *_, nheads, head_dim = given["q"].shape
        head_dim_v = given["v_cache" if "v_cache" in given else "v"].shape[-1]
        a_score: int = 2 * nheads * (of_head_dim * head_dim + of_head_dim_v * head_dim_v)
        return scores(given) * a_score

    return count


# Scores of one head, in all sequences


def _dense(given: Given) -> int:
    q, k = given["q"], given["k"]
    scores: int = q.shape[0] * q.shape[1] * k.shape[1]
    return scores


def _packed(given: Given) -> int:
    cu_seqlens_q, cu_seqlens_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
    if _has_values(cu_seqlens_q) and _has_values(cu_seqlens_k):
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
        return sum(length_q * length_k for length_q, length_k in lengths)
    bound: int = (cu_seqlens_q.shape[0] - 1) * given["max_seqlen_q"] * given["max_seqlen_k"]
    return bound


def _cached(given: Given) -> int:
    call = CacheCall(**{name: given[name] for name in CacheCall._fields if name in given})
    known = all(given.get(name) is None or _has_values(given[name]) for name in ("cache_seqlens", "cache_leftpad"))
    keys = sum(call.host_lengths) if known else call.batch * call.capacity
    return call.q.shape[1] * keys


def _has_values(x: Tensor) -> bool:
    return type(x) is Tensor and not x.is_meta


def _register(flop_counter: ModuleType) -> None:
    for op, of_head_dim, of_head_dim_v, scores in (
        (ops.attention, 1, 1, _dense),
        (ops.attention_backward, 3, 2, _dense),
        (ops.attention_jvp, 3, 2, _dense),
        (ops.biased_attention, 1, 1, _dense),
        (ops.biased_attention_backward, 3, 2, _dense),
        (ops.biased_attention_jvp, 3, 2, _dense),
        (ops.varlen_attention, 1, 1, _packed),
        (ops.varlen_attention_backward, 3, 2, _packed),
        (ops.varlen_attention_jvp, 3, 2, _packed),
        (cache_ops.attention_with_kvcache, 1, 1, _cached),
    ):
        formula = _formula(op, of_head_dim, of_head_dim_v, scores)
        flop_counter.register_flop_formula(op.overloadpacket, get_raw=True)(formula)


when_imported("torch.utils.flop_counter", _register)  # which imports Triton
