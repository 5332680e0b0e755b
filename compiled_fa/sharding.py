"""What our ops do with DTensors (torch.distributed.tensor): tensor parallelism and what else shards activations.

A mesh dimension may shard, of all tensors of a call alike,

    the batch    of dense ones
    heads        where query heads stay with the key heads that they read: as many of both, or nheads_k divides evenly;
                 of one key head (MQA) k and v are whole everywhere, and their gradients are sums
    queries      of dense ones, k and v whole, where a score does not depend on positions: no causal, window or ALiBi

or nothing. A bias is sharded by those of these that it has, and is whole along others. DTensor takes what moves least,
and moves the rest: keys that are sharded by length are gathered. With dropout nothing is sharded, since what is dropped
depends on the numbers of sequences, rows and heads.

Rules are registered as soon as torch.distributed.tensor is imported, by its experimental register_sharding. Private
API: mesh and tensor_meta of what that gives a rule for a tensor, tried with torch 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType
from typing import Any

from compiled_fa_turing.late import when_imported

from . import ops
from .problem import Options

Dims = dict[str, int]  # a dimension's number, by its name

QUERIES = ("q", "q_tangent", "out", "out_tangent", "dout", "dq")
KEYS = ("k", "v", "k_tangent", "v_tangent", "dk", "dv")
LSES = ("lse", "lse_tangent", "dlse")
SUMMED = ("dk", "dv", "dbias")  # over what the others are sharded by, where what they are of is whole
SCORES = ("batch", "heads", "queries", "keys")  # the dimensions of a bias, of which it may have less, or of size 1
DEFAULTS = {**Options()._asdict(), "bias_gradient": True}


@dataclass(frozen=True)
class _Way:
    """One way to shard a call along one mesh dimension. by: the name of the dimension. whole: tensors without it."""

    by: str
    whole: tuple[str, ...] = ()


def is_distributed(x: object) -> bool:
    """Is it a DTensor?"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, getattr(module, "DTensor", ()))


def _dims(name: str, packed: bool, given: dict[str, Any]) -> Dims:
    """Of the op's argument or result of this name."""
    if name == "alibi_slopes":
        return {"heads": 0} if len(given[name].shape) == 1 else {"batch": 0, "heads": 1}
    if name in ("bias", "dbias"):
        sizes = given["bias"].shape
        return {
            dim: at for at, (dim, size) in enumerate(zip(SCORES[4 - len(sizes) :], sizes, strict=True)) if size != 1
        }
    if name in LSES:
        return {"heads": 0} if packed else {"batch": 0, "heads": 1, "queries": 2}
    if name in QUERIES:
        return {"heads": 1} if packed else {"batch": 0, "queries": 1, "heads": 2}
    if name in KEYS:
        return {"heads": len(given["k"].shape) - 2, **({} if packed else {"batch": 0})}
    return {}


def _ways(packed: bool, given: dict[str, Any]) -> Iterator[_Way]:
    """Those that give a shard what the whole call would give it."""
    if given["dropout_p"]:
        return
    nheads, nheads_k = given["q"].shape[-2], given["k"].shape[-2]
    sizes = given["q"].mesh.shape
    if not packed:
        yield _Way("batch")
    if nheads_k == 1 and nheads > 1:
        yield _Way("heads", whole=KEYS)
    elif nheads == nheads_k or all(nheads_k % shards == 0 for shards in _products(sizes) if shards <= nheads_k):
        yield _Way("heads")
    windowed = given["causal"] or given["window_left"] >= 0 or given["window_right"] >= 0
    if not packed and not windowed and given["alibi_slopes"] is None:
        yield _Way("queries", whole=KEYS)


def _products(sizes: tuple[int, ...]) -> set[int]:
    """Into how many shards a dimension may be cut, by any dimensions of a mesh of these sizes."""
    return {math.prod(some) for count in range(len(sizes) + 1) for some in combinations(sizes, count)}


def _register(tensor: ModuleType) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for op in (ops.attention, ops.attention_backward, ops.attention_jvp):
        register_sharding(op)(_rule(op, False, tensor))
    for op in (ops.biased_attention, ops.biased_attention_backward, ops.biased_attention_jvp):
        register_sharding(op)(_rule(op, False, tensor))
    for op in (ops.varlen_attention, ops.varlen_attention_backward, ops.varlen_attention_jvp):
        register_sharding(op)(_rule(op, True, tensor))


def _rule(op: Any, packed: bool, tensor: ModuleType) -> Any:
    """What register_sharding wants: the op's arguments, specs for tensors -> placements of its results and tensors."""
    names = [argument.name for argument in op._schema.arguments]
    results = [result.name for result in op._schema.returns]

    def placement(name: str, way: _Way, given: dict[str, Any]) -> Any:
        if name == "dbias" and not (given["bias_gradient"] and given["bias"].tensor_meta.dtype.is_floating_point):
            return tensor.Replicate()  # of no elements
        dim = None if name in way.whole else _dims(name, packed, given).get(way.by)
        if dim is not None:
            return tensor.Shard(dim)
        return tensor.Partial() if name in SUMMED else tensor.Replicate()

    def acceptable(*arguments: Any, **named: Any) -> list[tuple[list[Any], list[Any]]]:
        given = {**DEFAULTS, **dict(zip(names, arguments, strict=False)), **named}
        tensors = [name for name in names if hasattr(given.get(name), "placements")]
        replicated = [tensor.Replicate()] * len(results), [tensor.Replicate()] * len(tensors)
        return [replicated] + [
            ([placement(name, way, given) for name in results], [placement(name, way, given) for name in tensors])
            for way in _ways(packed, given)
        ]

    return acceptable


when_imported("torch.distributed.tensor", _register)
