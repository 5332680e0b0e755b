"""What there is to tune: frozen dataclasses, one for each engine, and a table of them for a class of machine.

Which of two ways serves a call is a `Rule`; all else is a number.

"Rows" are query rows that share a key head: queries times query heads for each key head. Names that end in _bytes,
_keys, _queries, _tokens, _rows count those; `_from_` is inclusive, and NEVER for "at no length". measured_on: the
machine that found the numbers; None: nobody has measured there, and they are those that do no harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from math import log
from typing import NamedTuple

FlexOptions = tuple[tuple[str, int], ...]  # a kernel's tile sizes, warps and stages, by the flex template's names

TileOptions = tuple[int, int, int, int]  # of a kernel of our own: BLOCK_M, BLOCK_N, warps, stages

NEVER = 1 << 62


class Sizes(NamedTuple):
    """Of a call. queries, keys: of an average sequence; batch: sequences; heads: of queries."""

    queries: int
    keys: int
    batch: int
    heads: int
    heads_per_key: int
    head_dim: int
    causal: bool
    packed: bool

    def features(self) -> tuple[float, ...]:
        """What a rule weighs: 1, logarithms, and 0 or 1 for what is or is not."""
        logarithms = [log(size) if size > 1 else 0.0 for size in self[:6]]
        return 1.0, *logarithms, float(self.causal), float(self.packed)


@dataclass(frozen=True)
class Rule:
    """ln(seconds of one way to serve a call / seconds of another), as a sum over the call's `Sizes`: a weight each,
    times the size's logarithm. Where it is below 0 the one is the faster.

    Work, and what is paid for each head, sequence or call, are products of sizes, and so is the rim at which two ways
    take alike; tools.tune fits the weights to timings.
    """

    constant: float
    queries: float = 0.0
    keys: float = 0.0
    batch: float = 0.0
    heads: float = 0.0
    heads_per_key: float = 0.0
    head_dim: float = 0.0
    causal: float = 0.0
    packed: float = 0.0

    @cached_property
    def weights(self) -> tuple[float, ...]:
        return astuple(self)

    def value(self, features: tuple[float, ...]) -> float:
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))

    def favours(self, features: tuple[float, ...]) -> bool:
        """Is the one way the faster at a call of these `Sizes.features`?"""
        return self.value(features) < 0.0


AT_NO_CALL, AT_EVERY_CALL = Rule(1.0), Rule(-1.0)


@dataclass(frozen=True)
class SdpaCpu:
    """When PyTorch's CPU flash kernel leaves a call to tiles, and how calls of it are put together."""

    measured_on: str | None
    # Tiles / PyTorch's kernel. In bf16, where either may be faster, calls whose query heads share key heads (gqa) are a
    # kind of their own: their tiles are taller.
    tiles_forward: Rule
    tiles_forward_bf16: Rule
    tiles_forward_bf16_causal: Rule
    tiles_forward_bf16_gqa: Rule
    tiles_forward_bf16_gqa_causal: Rule
    tiles_backward: Rule
    tiles_backward_bf16: Rule
    tiles_backward_bf16_gqa: Rule
    # Packed sequences below this share a call with those of their lengths, of so many tokens at a time that they are
    # still in the cache when they are used.
    shared_call_below_tokens: int
    shared_call_tokens: int
    # Products (scores * heads * head_dim) that take as long as a call, for which a sequence may rather be one with its
    # neighbours; and tokens of all of these, at most.
    call_products: int
    call_tokens: int
    # So few queries are not for tiles. Query heads that share a key head run as rows of one, where there is enough that
    # need not be read again and again: elements of keys, times the heads that share them but one; in bf16, which the
    # kernel converts each time, and in more.
    few_queries: int
    few_queries_from_elements: int
    few_queries_from_elements_bf16: int
    # Is bf16 computed in fp32 forward, as fp16 always is, and both are backward? Copies in fp32 at a time.
    widens_bf16: bool
    widened_bytes: int


@dataclass(frozen=True)
class SplitKV:
    """Which calls are served without tiles, and how their keys are split."""

    measured_on: str | None
    # A step is code for a number of rows, each of which is unrolled: so many at most.
    most_rows: int
    # Few queries on many keys: keys of an average sequence, and elements of all keys, from which code of its own is
    # worth its while.
    decode_from_keys: int
    decode_from_elements: int
    # This engine / tiles, and / PyTorch's kernel: in fp32 and fp64; in 16 bits, and there of dense calls with a mask.
    decode_beside_tiles: Rule
    decode_beside_sdpa: Rule
    decode_beside_sdpa_16bit: Rule
    decode_beside_sdpa_16bit_masked: Rule
    # Rows up to which the first of these three is asked of dense calls: more PyTorch's kernel multiplies at once, and
    # faster.
    decode_rows_beside_sdpa: int
    # Keys of a split: enough splits for all threads, or, from so many keys on, few to be merged.
    split_keys: int
    long_split_keys: int
    long_split_from_keys: int
    # Many short packed sequences: keys of the longest, at most, and elements of q, at least; likewise.
    short_keys: int
    short_from_elements: int
    short_beside_tiles: Rule
    short_beside_sdpa: Rule
    # Their queries run in blocks of so many rows, together with blocks that see as many keys, rounded up to a multiple.
    short_block_rows: int
    short_key_multiple: int
    # Scores at once; a step's buffers are several times as large.
    score_bytes: int
    # Registers that hold sums in a loop, and what a register holds.
    accumulators: int
    register_bytes: int


@dataclass(frozen=True)
class Tiled:
    """Tile sizes, and what runs together."""

    measured_on: str | None
    # Queries or keys of a tile, at most; queries of a tile of bf16 products.
    tile: int
    bf16_tile_queries: int
    # Queries (forward) or keys (backward) of a tile under a window or causal, whose rims cost half a tile each.
    banded_tile: int
    # Few queries on many keys: rows up to which reading the keys is what takes time, and keys of a tile then, of all of
    # its sequences.
    thin_rows: int
    thin_tile_keys: int
    # Scores of a tile, for each core; copies of k and v (forward), or of the query side (backward), that a chunk holds.
    score_bytes_a_core: int
    chunk_bytes: int
    # Scores of a pair of heads from which products of bf16 are taken in bf16, where the CPU has instructions for them;
    # among fewer, a rounding of one of them shows.
    bf16_from_scores: int
    # oneDNN compiles a product of bf16 for every shape. Packed sequences of more different lengths than this (under a
    # window or causal: the second) run as if their lengths were rounded up to a multiple.
    bf16_lengths: int
    bf16_lengths_banded: int
    bf16_length_multiple: int
    # Packed sequences of more tokens are work enough by themselves; shorter ones run together, with their very lengths
    # where there are so many of each on average.
    grouped_tokens: int
    exact_group_sequences: int
    # Keys or queries that are rather one tile with a mask than several cut at its rims.
    uncut: int
    # Operations from which Inductor keeps a value in a loop: of softcap's forward step, and of backward steps.
    softcap_kept_operations: int
    backward_kept_operations: int
    # Scratch memory: larger buffers are given back after the call; what a thread keeps.
    kept_buffer_bytes: int
    kept_bytes: int
    # One part in so many of the device's memory is a call's scratch, and tiles are as large as that allows: as a GPU
    # wants them. 0: tiles stay in the cores' caches.
    memory_parts: int
    # There: rows of a tile, at least, that are worth to hold the scores of all their keys; where so many do not fit,
    # tiles of `tile` rows pass over the keys.
    whole_rows: int
    # There: scores that take as long as the launches of one more group of packed sequences.
    group_scores: int


@dataclass(frozen=True)
class Fused:
    """Options of the fused engine's kernels. On Turing by (direction, head_dim, kind of features), and in dtypes that
    its tensor cores do not take by (direction, head_dim); on newer GPUs by (KB of shared memory, bytes of an element,
    direction, head_dim). few_rows: of few queries on keys in pages, by (GPU and dtype, head_dim)."""

    measured_on: str | None
    fp16: Mapping[tuple[str, int, str], FlexOptions]
    wide: Mapping[tuple[str, int], FlexOptions]
    newer: Mapping[tuple[int, int, str, int], FlexOptions]
    few_rows: Mapping[tuple[str, int], FlexOptions]


@dataclass(frozen=True)
class OwnKernels:
    """Options of the triton engine's kernels, which are "forward", "queries" (backward: dq) and "keys" (dk, dv). On
    Turing by (kernel, head_dim, "plain" or, with terms that cost registers, "many"), and in dtypes that its tensor
    cores do not take by (kernel, head_dim); on newer GPUs by (KB of shared memory, bytes of an element, kernel,
    head_dim)."""

    measured_on: str | None
    fp16: Mapping[tuple[str, int, str], TileOptions]
    wide: Mapping[tuple[str, int], TileOptions]
    newer: Mapping[tuple[int, int, str, int], TileOptions]


@dataclass(frozen=True)
class Tuning:
    """Of engines on a CPU, for a class of machine."""

    name: str
    sdpa_cpu: SdpaCpu
    split_kv: SplitKV
    tiled: Tiled
