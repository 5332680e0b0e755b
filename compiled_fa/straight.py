"""Calls that go from our functions straight to an engine, past PyTorch's dispatcher, where that would only find it.

`Calls` remembers what the arguments of a function came to, by all of them that are no tensors, and by what PyTorch's
own guards say of the tensors: to look at each anew takes many times as long (bench/NOTES.md).

Whether anybody else has to see a call is said by key sets, from which the dispatcher computes who does: those of the
tensors, with what this thread includes, without what it excludes. Anything in there but a CPU and autograd (a mode, a
transform, tracing, autocast, a tensor that is not what its memory says), and any tensor of a class of its own, goes the
dispatcher's way; and so do calls of which something is differentiated, under torch.compile, in a TorchFunctionMode, and
before a profiler. Nobody can tell of an ExecutionTraceObserver without a profiler, nor of a kernel that others register
for our ops: neither sees these calls.

Private API, of torch._C: _dispatch_keys, _dispatch_tls_local_include_set, _dispatch_tls_local_exclude_set, DispatchKey,
DispatchKeySet, _any_requires_grad, _len_torch_function_stack, _autograd._profiler_enabled, _dynamo.guards.TensorGuards
and _dynamo.eval_frame.get_eval_frame_callback; forward_ad._current_level and profiler._is_profiler_enabled of
torch.autograd; tried with torch 2.11.0, 2.13.0 and 2.15.0. Without them all calls go the dispatcher's way, and a
warning says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from . import signatures
from .caches import Cache
from .messages import say_once
from .registration import Kernel, not_traced

Found = TypeVar("Found")

MOST_ALIKE = 8  # calls with the same shapes, and other strides or dtypes


def _plain_key_sets() -> list[Any]:
    """Of calls that an op's kernel for autograd would serve, which differentiates nothing; or its own, in inference
    mode or below autograd."""
    keys, key_set = torch._C.DispatchKey, torch._C.DispatchKeySet
    # BackendSelect, which each thread includes, is for factory functions: no op of ours has a kernel there.
    alone = key_set(keys.CPU) | key_set(keys.BackendSelect)
    in_place = alone | key_set(keys.ADInplaceOrView)  # nor there
    return [in_place | key_set(keys.AutogradCPU), in_place, alone]


try:
    _keys_of = torch._C._dispatch_keys
    _included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
    _function_modes, _profiler_enabled = torch._C._len_torch_function_stack, torch._C._autograd._profiler_enabled
    _dynamo_looks, _Guards = torch._C._dynamo.eval_frame.get_eval_frame_callback, torch._C._dynamo.guards.TensorGuards
    _PLAIN = _plain_key_sets()
    _ = forward_ad._current_level, profiler._is_profiler_enabled  # which change: read where they are asked for
    _able = True
except (AttributeError, TypeError) as error:
    say_once(f"torch {torch.__version__} does not tell what its dispatcher has to do, and every call asks it: {error}")
    _able = False


class Calls(Generic[Found]):
    """What calls of a function on a CPU came to that nobody else has to see; found once for all that are alike: their
    tensors differ in what they hold, and in nothing else."""

    def __init__(self, name: str) -> None:
        self._alike: Cache[Hashable, list[tuple[Any, Found | None]]] = Cache(name, entries=1024)

    def get(
        self, tensors: Sequence[Tensor | None], others: Sequence[Any], find: Callable[[], Found | None]
    ) -> Found | None:
        """None: it is another call, or there is nothing to be found. others: the arguments that are no tensors, of
        which equal ones of two types are two."""
        if not _able or torch.compiler.is_compiling() or not getattr(tensors[0], "is_cpu", False) or _is_watched():
            return None
        given, types = [x for x in tensors if x is not None], tuple(map(type, others))
        if not (signatures.TENSORS.issuperset(map(type, given)) and signatures.OTHERS.issuperset(types)):
            return None
        if _are_differentiated(given):
            return None
        shapes = [None if x is None else x.shape for x in tensors]
        alike = self._alike.get((*shapes, *others, *types), list)
        for guards, found in alike:
            if guards.check(*given):
                return found
        if not _is_plain(given):
            return None
        found = find()
        guards = _Guards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        if guards.check(*given):  # not if one tensor is given twice
            alike[:] = [*alike[1 - MOST_ALIKE :], (guards, found)]
        return found


def _is_watched() -> bool:
    """Is there somebody who wants to see calls, whom no key set names?"""
    is_profiled = _profiler_enabled() or profiler._is_profiler_enabled  # this thread; any
    return is_profiled or _function_modes() > 0 or forward_ad._current_level >= 0


def _are_differentiated(tensors: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)


def _is_plain(tensors: Sequence[Any]) -> bool:
    """Are they on a CPU, and no more than that to the dispatcher?"""
    keys = _included()
    for x in tensors:
        keys = keys | _keys_of(x)
    return keys - _excluded() in _PLAIN


def not_looked_at(function: Kernel) -> Kernel:
    """The function, called so that Dynamo, where it compiles what runs, does not look into it."""
    hidden = not_traced(function)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _able or _dynamo_looks() is not None:
            return hidden(*arguments)
        return function(*arguments)

    return call
