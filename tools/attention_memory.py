"""How many bytes attention keeps and moves: naive, and ours with the tiles of its engines.

Kept bytes are of tensors, in the accounting of an allocator: everything alive at the moment when most is, inputs
included. Moved bytes are reads and writes of main memory by a machine whose caches hold a tile, and no score matrix.

    B batch, Sq and Sk lengths, H and Hk query and key heads, D head_dim
    S = B · H · Sq · Sk scores; naive attention computes them all, ours those that causal leaves

Naive is what model code writes, softmax(q @ kᵀ · scale, dtype=fp32).to(dtype) @ v, its scale folded into q:

    forward, at the softmax     q, k, v, scores, fp32 probabilities, and in half precision their copy: 8 S bytes
    training, its backward      q, k, v, out, dout, dv, probabilities, their gradient, that of the scores

Ours keeps no S: q, k, v, out and lse, the gradients, and its engine's scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch

from compiled_fa.engines.tiled.call import Call
from compiled_fa.problem import Problem
from compiled_fa.tuning import current

Direction = Literal["forward", "training"]
Bytes = dict[str, int]
FP32 = 4
STEP = 64  # of the lengths that `longest` tries


@dataclass(frozen=True)
class Config:
    batch: int = 1
    seqlen_q: int = 2048
    seqlen_k: int = 2048
    nheads: int = 8
    nheads_k: int = 8
    head_dim: int = 64
    dtype: str = "float16"
    causal: bool = False

    @property
    def itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def scores(self) -> int:
        return self.batch * self.nheads * self.seqlen_q * self.seqlen_k

    @property
    def useful_scores(self) -> int:
        """Those that causal leaves; bottom right alignment."""
        if not self.causal:
            return self.scores
        first, last = max(0, self.seqlen_k - self.seqlen_q + 1), self.seqlen_k
        rows = last - first + 1  # rows with `first` to `last` keys; those before have none
        return self.batch * self.nheads * (first + last) * rows // 2

    @property
    def rows(self) -> int:
        return self.batch * self.nheads * self.seqlen_q

    def flops(self, direction: Direction) -> int:
        """Of the matrix products that are useful: two forward, and five more backward, one of them for the scores."""
        return (4 if direction == "forward" else 14) * self.head_dim * self.useful_scores

    def at(self, seqlen: int) -> Config:
        return replace(self, seqlen_q=seqlen, seqlen_k=seqlen)


@dataclass(frozen=True)
class Tiling:
    """What an engine does with a configuration, in one direction.

    queries, keys: a tile's. sharing: query heads that share one load of keys. copied: bytes of an element as tiles are
    loaded. scratch: bytes of its buffers, beside inputs and results.
    """

    queries: int
    keys: int
    sharing: int
    copied: int
    scratch: Bytes


def tiled(config: Config, direction: Direction) -> Tiling:
    """The tiled engine's: its largest chunk, as it cuts tensors of these shapes, and the scratch that its tiles take.

    Steps are taken for compiled; run as plain ops they hold a few tiles of scores more.
    """
    dtype = getattr(torch, config.dtype)
    q = torch.empty(config.batch, config.seqlen_q, config.nheads, config.head_dim, dtype=dtype, device="meta")
    k = torch.empty(config.batch, config.seqlen_k, config.nheads_k, config.head_dim, dtype=dtype, device="meta")
    call = Call(Problem.of(q, k, k, None, causal=config.causal), None)
    chunk = next(call.chunks("forward" if direction == "forward" else "backward"))
    wide, size = call.dtype.itemsize, call.product_dtype(config.seqlen_q, config.seqlen_k).itemsize
    heads, head_dim = chunk.heads_per_key, config.head_dim
    if direction == "forward":
        tile_q, tile_k = min(chunk.tiles.queries, config.seqlen_q), min(chunk.tiles.keys, config.seqlen_k)
        rows = chunk.batch_heads * heads * tile_q  # of a tile
        scratch: Bytes = {"queries": rows * head_dim * size, "scores": rows * tile_k * size}
        view = tile_q == config.seqlen_q and dtype.itemsize == size and len(chunk.sequences) == 1
        for name in () if view else ("keys", "values"):
            scratch[name] = chunk.batch_heads * config.seqlen_k * head_dim * size
        scratch |= {"accumulator": rows * head_dim * wide, "row_max": rows * wide, "row_sum": rows * wide}
        if size != wide:
            scratch["product"] = rows * head_dim * size
    else:
        tile_k = min(chunk.tiles.keys, config.seqlen_k)
        # Nobody's keys are needed by more queries than the first.
        tile_q = max(tile.stop - tile.start for tile in chunk.query_tiles(0, tile_k))
        queries = chunk.batch_heads * heads * config.seqlen_q  # rows of the chunk
        rows = chunk.batch_heads * heads * tile_q
        scratch = dict.fromkeys(("queries", "dout"), queries * head_dim * size)
        scratch |= {"dq": queries * head_dim * wide, "lse": queries * wide, "delta": queries * wide}
        scratch["out"] = chunk.batch_heads * heads * min(current().tiled.tile, config.seqlen_q) * head_dim * wide
        scratch |= dict.fromkeys(("keys", "values"), chunk.batch_heads * tile_k * head_dim * size)
        scratch |= dict.fromkeys(("dk", "dv"), chunk.batch_heads * tile_k * head_dim * wide)
        scratch |= dict.fromkeys(("scores", "dprobs"), rows * tile_k * size)
        scratch["product"] = max(rows, chunk.batch_heads * tile_k if size != wide else 0) * head_dim * size
    return Tiling(tile_q, tile_k, chunk.heads_per_key, size, scratch)


# Another engine goes here: a function that says which tiles it takes, from its own table, and what scratch.
ENGINES: dict[str, Callable[[Config, Direction], Tiling]] = {"tiled": tiled}


INPUTS, GRADIENTS = ("q", "k", "v"), ("dout", "dq", "dk", "dv")


def _tensors(config: Config) -> Bytes:
    side_q = config.rows * config.head_dim * config.itemsize
    side_k = config.batch * config.nheads_k * config.seqlen_k * config.head_dim * config.itemsize
    return dict.fromkeys(("q", "out", "dout", "dq"), side_q) | dict.fromkeys(("k", "v", "dk", "dv"), side_k)


def _some(tensors: Bytes, *names: str) -> Bytes:
    return {name: tensors[name] for name in names}


def naive_kept(config: Config, direction: Direction) -> Bytes:
    """Tensors alive at naive attention's peak; see the top of this file."""
    tensors, size = _tensors(config), config.itemsize
    half = size < FP32
    if direction == "forward":
        scores = {"scores": config.scores * size, "probabilities": config.scores * max(FP32, size)}
        if half:
            scores["probabilities, half"] = config.scores * size
        return _some(tensors, *INPUTS) | scores
    probabilities = config.scores * max(FP32, size)
    gradients = {"probabilities": probabilities, "dprobabilities": probabilities, "dscores": config.scores * size}
    return _some(tensors, *INPUTS, "out", "dout", "dv") | gradients


def ours_kept(config: Config, direction: Direction, engine: str = "tiled") -> Bytes:
    """Tensors alive while ours runs, its engine's scratch as one."""
    lse = {"lse": config.rows * max(FP32, config.itemsize)}
    gradients = GRADIENTS if direction == "training" else ()
    scratch = ENGINES[engine](config, direction).scratch
    return _some(_tensors(config), *INPUTS, "out", *gradients) | lse | {"scratch": sum(scratch.values())}


def kept(config: Config, direction: Direction, implementation: str) -> Bytes:
    """implementation: naive, or an engine's name."""
    if implementation == "naive":
        return naive_kept(config, direction)
    return ours_kept(config, direction, implementation)


def naive_moved(config: Config, direction: Direction) -> Bytes:
    """Bytes that each operation of naive attention reads and writes."""
    t, size = _tensors(config), config.itemsize
    scores, probabilities = config.scores * size, config.scores * max(FP32, size)
    half = 2 * config.scores if size < FP32 else 0  # the copy in half precision
    moved = {
        "q @ kᵀ": t["q"] + t["k"] + scores,
        "softmax": scores + probabilities + (probabilities + half if half else 0),
        "p @ v": scores + t["v"] + t["out"],
    }
    if direction == "forward":
        return moved
    return moved | {
        "pᵀ @ dout": scores + t["dout"] + t["dv"],
        "dout @ vᵀ": t["dout"] + t["v"] + scores,
        "dsoftmax": (half + probabilities if half else 0) + 2 * probabilities + scores,
        "ds @ k": scores + t["k"] + t["dq"],
        "dsᵀ @ q": scores + t["q"] + t["dk"],
    }


def _visible_keys(config: Config, tile: int) -> int:
    """Keys that tiles of queries load, summed over the tiles of one head."""
    offset = config.seqlen_k - config.seqlen_q
    stops = [min(start + tile, config.seqlen_q) for start in range(0, config.seqlen_q, tile)]
    return sum(min(config.seqlen_k, max(0, stop + offset)) if config.causal else config.seqlen_k for stop in stops)


def _visible_queries(config: Config, tile: int) -> int:
    """Queries that tiles of keys load, summed over the tiles of one head."""
    offset = config.seqlen_k - config.seqlen_q
    starts = range(0, config.seqlen_k, tile)
    return sum(config.seqlen_q - min(config.seqlen_q, max(0, s - offset) if config.causal else 0) for s in starts)


def ours_moved(config: Config, direction: Direction, engine: str = "tiled") -> Bytes:
    """Bytes read and written by the forward's pass over query tiles, and the backward's over key tiles."""
    t, statistics = _tensors(config), config.rows * FP32
    forward = ENGINES[engine](config, "forward")
    loads = config.batch * config.nheads // forward.sharing * _visible_keys(config, forward.queries)
    moved = {
        "q, out, lse": t["q"] + t["out"] + statistics,
        "k, v a query tile": loads * 2 * config.head_dim * forward.copied,
    }
    if direction == "forward":
        return moved
    backward = ENGINES[engine](config, "training")
    rows = config.batch * config.nheads * _visible_queries(config, backward.keys)
    return moved | {
        "delta": t["out"] + t["dout"] + statistics,
        "k, v, dk, dv": 2 * t["k"] + 2 * t["dk"],
        "q, dout, lse, delta a key tile": rows * (2 * config.head_dim * backward.copied + 2 * FP32),
        "dq a key tile, in fp32": rows * 2 * config.head_dim * FP32,
        "dq": t["dq"],
    }


def moved(config: Config, direction: Direction, implementation: str) -> Bytes:
    """implementation: naive, or an engine's name."""
    if implementation == "naive":
        return naive_moved(config, direction)
    return ours_moved(config, direction, implementation)


def intensity(config: Config, direction: Direction, implementation: str) -> float:
    """Useful arithmetic a byte moved, in FLOP/B."""
    traffic = sum(moved(config, direction, implementation).values())
    return config.flops(direction) / traffic if traffic else inf


def longest(config: Config, direction: Direction, implementation: str, memory: int) -> int:
    """The longest self-attention, a multiple of STEP, that fits into so many bytes; the next does not. 0: none."""

    def fits(seqlen: int) -> bool:
        return sum(kept(config.at(seqlen), direction, implementation).values()) <= memory

    low, high = 0, STEP
    while fits(high):
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
