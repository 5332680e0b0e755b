"""flash_attn's arguments in the form that the ops take: numbers, lengths, windows, dtypes under autocast, a seed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import seed, sharding, validation
from .problem import Options

# Below half the resolution of a keep decision (2**-32) nothing is ever dropped. Some callers pass 1e-30.
NO_DROPOUT = 2.0**-33

_PLAIN = frozenset({type(None), bool, int, float})  # of which equal ones of one type mean the same


def check_tensors(**tensors: object) -> None:
    for argument, value in tensors.items():
        if not isinstance(value, Tensor):
            validation.tensor_given(argument, value)


def check_target(argument: str, target: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """A tensor that a result is written into: of the result's shape, which is of q's dtype and on its device."""
    validation.tensor_given(argument, target)
    if tuple(target.shape) != shape:
        validation.refuse(argument, f"of shape {shape}", tuple(target.shape))
    if target.dtype != q.dtype:
        validation.refuse(argument, f"of q's dtype, {q.dtype}", target.dtype, TypeError)
    if target.device != q.device:
        validation.refuse(argument, f"on q's device, {q.device}", target.device)


def unpacked(argument: str, packed: Tensor, dims: str, parts: int) -> tuple[Tensor, ...]:
    """Views of q, k, v out of the packed tensor's third-last dimension."""
    validation.tensor(argument, packed, dims)
    if packed.shape[-3] != parts:
        validation.refuse(argument, f"({dims})", f"shape {tuple(packed.shape)}")
    return packed.unbind(-3)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast all three take its dtype, as F.scaled_dot_product_attention's do; fp64 stays."""
    if not casts(q):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in (q, k, v))
    return q, k, v


def casts(x: Tensor) -> bool:
    """Is there autocast on its device?"""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which raises where there never is one


def length(argument: str, length: Any, total: int) -> int | torch.SymInt:
    """A length as an int. To read it off another device would wait for that device, and to read it in compiled code
    would make it a symbol; the total bounds it as well."""
    if isinstance(length, Tensor):
        if length.numel() != 1:
            validation.refuse(argument, "an int or a tensor of one element", f"shape {tuple(length.shape)}")
        if length.is_floating_point() or length.is_complex() or length.dtype == torch.bool:
            validation.refuse(argument, "an int or a tensor of one integer", length.dtype, TypeError)
        if length.device.type != "cpu":
            return total
    if torch.compiler.is_compiling() and not isinstance(length, (int, torch.SymInt)) and hasattr(length, "tolist"):
        return total  # NumPy's numbers, too, are tensors there
    return validation.length(argument, length)


def packing(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    block_table: Tensor | None,
) -> tuple[Any, ...]:
    """The ops' arguments about where packed sequences lie."""
    check_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if block_table is not None:
        check_tensors(block_table=block_table)
    rows_k = k.shape[0] if block_table is None else k.shape[0] * k.shape[1]
    longest_q = length("max_seqlen_q", max_seqlen_q, q.shape[0])
    return cu_seqlens_q, cu_seqlens_k, longest_q, length("max_seqlen_k", max_seqlen_k, rows_k), block_table


def wants_probabilities(argument: str, asked: bool, options: Options, block_table: Tensor | None = None) -> bool:
    """Is S_dmask to be computed? Only with dropout, and not of pages. argument: the one that asks for it."""
    wanted = asked and options.dropout_p > 0.0
    if wanted and block_table is not None:
        validation.refuse(argument, "False with block_table and dropout_p > 0", True)
    return wanted


def sides(window_size: Sequence[int] | Tensor) -> tuple[Any, ...]:
    """Both, as given, of a window that is a tuple; else the window."""
    return window_size if type(window_size) is tuple else (window_size,)


def options(
    dropout_p: float | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int] | Tensor,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Options:
    """The ops' options, but for dropout's seed."""
    numbers = dropout_p, softmax_scale, causal, softcap
    given = sides(window_size)
    if torch.compiler.is_compiling():
        found = _options(*numbers, window_size)
    elif len(given) != 2 or not _PLAIN.issuperset(map(type, (*numbers, *given))):
        found = _as_in_schemas(_options(*numbers, window_size))
    else:
        found = _plain_options(*numbers, *given)
    if alibi_slopes is None:
        return found
    check_tensors(alibi_slopes=alibi_slopes)
    return found.changed(alibi_slopes=alibi_slopes)


@functools.lru_cache(maxsize=1024, typed=True)
def _plain_options(
    dropout_p: float | None, softmax_scale: float | None, causal: bool, softcap: float | None, left: int, right: int
) -> Options:
    """Checked once for calls alike."""
    return _as_in_schemas(_options(dropout_p, softmax_scale, causal, softcap, (left, right)))


def _as_in_schemas(options: Options) -> Options:
    """Of the types that the ops' schemas name, which a call that goes past the schemas (straight.py) has, too."""
    scale = None if options.softmax_scale is None else float(options.softmax_scale)
    left, right = (validation.of_bits("window_size", int(side)) for side in (options.window_left, options.window_right))
    softcap, dropout_p = float(options.softcap), float(options.dropout_p)
    return options.changed(
        softmax_scale=scale, window_left=left, window_right=right, softcap=softcap, dropout_p=dropout_p
    )


def _options(
    dropout_p: float | None,
    softmax_scale: float | None,
    causal: bool,
    softcap: float | None,
    window_size: Sequence[int] | Tensor,
) -> Options:
    left, right = cast("tuple[int, int]", validation.window_size(window_size))  # or symbols of numbers
    scale = None if softmax_scale is None else validation.number("softmax_scale", softmax_scale)
    cap = 0.0 if softcap is None else validation.number("softcap", softcap)
    dropout_p = 0.0 if dropout_p is None else validation.number("dropout_p", dropout_p)
    validation.dropout_probability(dropout_p)
    if dropout_p < NO_DROPOUT:
        dropout_p = 0.0
    return Options(scale, validation.flag("causal", causal), left, right, cap, None, dropout_p)


def of_op(q: Tensor, options: Options, engine: str) -> tuple[Any, ...]:
    """What an op takes after its tensors. A number that compiled code knows only when it runs is an element of a tensor
    there: an argument would be a number in the code, which would be compiled again for the next."""
    if not torch.compiler.is_compiling():
        return *options, engine
    if options.softcap == 0.0:  # of a default, too, which Dynamo may take for a number that changes
        options = options.changed(softcap=0.0)
    changing = any(map(_changes, (options.softmax_scale, options.softcap, options.dropout_p)))
    if not changing or sharding.is_distributed(q):  # an op of DTensors takes no plain tensor of numbers
        return *options, engine
    one = torch.ones((), dtype=torch.float64)  # a product with it stays a tensor; torch.tensor(number) does not
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    tensor = torch.stack([one * number for number in (scale, options.softcap, options.dropout_p)])
    # In their places numbers that say as much of the call as its code depends on.
    known = options.changed(
        softmax_scale=1.0, softcap=1.0 if options.softcap > 0.0 else 0.0, dropout_p=0.5 if options.dropout_p else 0.0
    )
    return *known, engine, tensor


def _changes(number: float | None) -> bool:
    """Has Dynamo found that a number changes from call to call? Private API, torch.fx.experimental: has_static_value,
    tried with torch 2.11.0, 2.13.0 and 2.15.0."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, and here it is

    if number is None or type(number) not in (float, int):  # NumPy's numbers are tensors there
        return False
    return not has_static_value(number)


def seeded(options: Options, check: Callable[..., None], q: Tensor, k: Tensor, v: Tensor, *packing: Any) -> Options:
    """With a seed from the device's generator, where there is dropout; a call that is refused draws none."""
    if not options.dropout_p:
        return options
    if sharding.is_distributed(q):
        validation.refuse("dropout_p", "0 with DTensors, for which no seed is drawn", options.dropout_p)
    if not torch.compiler.is_compiling():
        check(q, k, v, *packing, *options.changed(dropout_p=0.0))
    return options.changed(dropout_seed=seed.drawn(q, k, v))
