"""The op `torch.ops.compiled_fa.attention_with_kvcache`: appends to a KV cache in place, and attends to it.

    out, lse = torch.ops.compiled_fa.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens)

out is (B, Sq, H, Dv), lse a natural logarithm (B, H, Sq) in fp32 (fp64 for fp64 inputs). Forward only.

shares_tables: what a GPU makes of cache_seqlens and tables is kept for calls with the same tensors, as long as these
live and PyTorch knows of no write to them. Compiled code writes to its buffers without a word: there, never.

On a CPU everything that can be wrong is found before anything is written. Elsewhere the host waits for no value, but
with COMPILED_FA_CHECK=1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cache_validation, engines, registration, signatures, straight
from .cache_call import CacheCall, Layout
from .caches import Cache
from .problem import Options, Problem, lse_dtype

NAME = "attention_with_kvcache"
SCHEMA = (
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k=None, Tensor? v=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? cache_seqlens=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, "
    "Tensor? block_table=None, float? softmax_scale=None, bool causal=False, SymInt window_left=-1, "
    "SymInt window_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool rotary_interleaved=True, "
    "SymInt num_splits=0, str engine='auto', bool shares_tables=False) -> (Tensor out, Tensor lse)"
)
TENSORS, SCORES = 11, 6  # how many of these are CacheCall's, and how many of the next are Options'
SLOPES = TENSORS + SCORES - 1


class _How(NamedTuple):
    """The last arguments of the op. Defaults: the schema's."""

    rotary_interleaved: bool = True
    num_splits: int = 0
    engine: str = "auto"
    shares_tables: bool = False


@dataclass(frozen=True, eq=False)
class RightCall:
    """A call that was checked without reading a tensor. By identity, what all calls like it have in common.

    options: without slopes. consecutive: as CacheCall.rotated's.
    """

    options: Options
    how: _How
    consecutive: bool


_right_calls: Cache[Hashable, RightCall] = Cache("checked calls of caches", entries=1024)
_layouts: Cache[Hashable, Layout] = Cache("layouts of caches", entries=1024)


def _check(arguments: tuple[Any, ...]) -> RightCall:
    options, how = Options(*arguments[TENSORS : TENSORS + SCORES]), _How(*arguments[TENSORS + SCORES :])
    call = _call(arguments, how)
    cache_validation.kvcache(call, options, how.num_splits)
    consecutive = options.causal or options.window_left >= 0 or options.window_right >= 0
    return RightCall(options.changed(alibi_slopes=None), how, consecutive)


def _call(arguments: tuple[Any, ...], how: _How) -> CacheCall:
    make: Callable[..., CacheCall] = CacheCall
    return make(*arguments[:TENSORS], shares_tables=how.shares_tables)


def _checked(arguments: tuple[Any, ...]) -> tuple[CacheCall, Options, RightCall, bool]:
    """What can be told without reading a tensor; of a call like one before it, it was told then. And, last: may there
    be others like it?"""
    key = signatures.of_call(arguments)
    right = _check(arguments) if key is None else _right_calls.get(key, lambda: _check(arguments))
    options, slopes = right.options, arguments[SLOPES] if len(arguments) > SLOPES else None
    if slopes is not None:
        options = options.changed(alibi_slopes=slopes)
    return _call(arguments, right.how), options, right, key is not None


class _LastTable:
    """Of calls with one layout: the block table that the last one had, and the layout of calls with this very table."""

    def __init__(self, call: CacheCall, table: Tensor, layout: Layout) -> None:
        with torch.inference_mode(False):
            self.table, self.layout = table.clone(), replace(layout, fixed=True, places=call.places())


_last_tables: Cache[Layout, list[_LastTable]] = Cache("block tables", 64, 16 << 20, lambda last: last[0].table.nbytes)


def _layout(call: CacheCall, right: RightCall) -> Layout:
    """Of a call on a CPU, checked. What the host reads is compared: NumPy writes to tensors without a word."""

    def checked() -> Layout:
        cache_validation.kvcache_lengths(call, right.consecutive)
        return call.layout()

    def first(table: Tensor) -> list[_LastTable]:
        cache_validation.kvcache_pages(call)
        return [_LastTable(call, table, layout)]

    layout, table = _layouts.get((right, call.host_values), checked), call.block_table
    if table is None:
        return layout
    last = _last_tables.get(layout, lambda: first(table))
    (known,) = last
    if torch.equal(known.table, table):
        return known.layout
    cache_validation.kvcache_pages(call)
    last[0] = _LastTable(call, table, layout)
    return layout


def _row_by_row(call: CacheCall, num_splits: int) -> bool:
    """Is each row a problem of its own? With num_splits=1, where an engine may do otherwise with a row beside others.

    (On a GPU the kernels do not: a tile belongs to one row, and takes that row's keys in their order.)
    """
    return num_splits == 1 and call.batch > 1 and call.q.device.type == "cpu"


def _prepared(call: CacheCall, options: Options, how: _How, layout: Layout) -> engines.Prepared | None:
    """What is left of a call with this layout, if it is one problem."""
    if _row_by_row(call, how.num_splits):
        return None
    return engines.prepared(layout, how.engine, lambda: call.problem(options, how.num_splits, layout))


def _problems(call: CacheCall, options: Options, num_splits: int, layout: Layout | None) -> list[Problem]:
    """One for all rows, or one a row."""
    if not _row_by_row(call, num_splits):
        return [call.problem(options, num_splits, layout)]
    problems, slopes = [], options.alibi_slopes
    for n in range(call.batch):
        own = options if slopes is None or slopes.dim() == 1 else options.changed(alibi_slopes=slopes[n : n + 1])
        problems.append(call.row(n).problem(own))
    return problems


def _laid_out(problem: Problem, batch: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """An engine's results as (batch, Sq, H, Dv) and (batch, H, Sq)."""
    if problem.packed is None:
        return out, lse
    return out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


def _attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        call, options, right, has_likes = _checked(arguments)
        layout = None
        if cache_validation.reads_values(call):
            if has_likes and call.q.device.type == "cpu":
                layout = _layout(call, right)
            else:
                cache_validation.kvcache_lengths(call, right.consecutive)
                cache_validation.kvcache_pages(call)
        return _attend_checked(call, options, right, layout)


def like(*arguments: Any) -> RightCall | None:
    """What a call of the op on a CPU shares with those alike, checked but for what tensors hold; None: nothing."""
    call, _, right, has_likes = _checked(arguments)
    return right if has_likes and call.batch else None


def _attend_like(right: RightCall, slopes: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor]:
    """A call on a CPU that is like one of which `like` gave `right`. tensors: CacheCall's."""
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        call, options = _call(tensors, right.how), right.options
        if slopes is not None:
            options = options.changed(alibi_slopes=slopes)
        return _attend_checked(call, options, right, _layout(call, right))


attend_like = straight.not_looked_at(_attend_like)


def _attend_checked(
    call: CacheCall, options: Options, right: RightCall, layout: Layout | None
) -> tuple[Tensor, Tensor]:
    """layout: where it is known. Without gradients."""
    call = call.rotated(right.how.rotary_interleaved, right.consecutive)
    if not call.batch or not call.q.shape[1]:
        call.append()
        return _empty(call)
    # An engine asked for by name that cannot serve says so before the cache is written.
    if layout is not None and (prepared := _prepared(call, options, right.how, layout)) is not None:
        call.append(layout.places)
        return prepared.run(call.q, *call.keys_and_values(layout))
    problems = _problems(call, options, right.how.num_splits, layout)
    routes = [engines.select(problem, "forward", right.how.engine) for problem in problems]
    call.append(None if layout is None else layout.places)
    batch = call.batch // len(routes)
    found = [_laid_out(route.problem, batch, *route.forward()) for route in routes]
    out, lse = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    return out, lse


def _empty(call: CacheCall) -> tuple[Tensor, Tensor]:
    q = call.q
    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, nheads, call.v_cache.shape[-1]))
    return out, q.new_empty((batch, nheads, seqlen_q), dtype=lse_dtype(q.dtype))


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    # Shapes depend on no number; one that tracing knows as a symbol is checked when the op is called.
    known = [0 if isinstance(argument, torch.SymInt) else argument for argument in arguments]
    call, *_ = _checked(tuple(known))
    return _empty(call)


attention_with_kvcache = registration.define(NAME, SCHEMA, _attend, _fake)
registration.LIBRARY.impl(NAME, torch.library.fallthrough_kernel, "Autograd")  # forward only
