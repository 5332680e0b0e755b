"""What there is to tune: frozen dataclasses, one for each engine, and a table of them for a class of machine.

"Rows" are query rows that share a key head: queries times query heads for each key head. Names that end in _bytes,
_keys, _queries, _tokens, _rows count those; `_from_` is inclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

FlexOptions = tuple[tuple[str, int], ...]  # a kernel's tile sizes, warps and stages, by the flex template's names


@dataclass(frozen=True)
class SdpaCpu:
    """When PyTorch's CPU flash kernel leaves a call to tiles, and how calls of it are put together."""

    # Forward, where the CPU has fast bf16: from so many keys (of an average sequence) on, bf16 is for tiles.
    bf16_tiles_from_keys: int
    # Forward: so few queries at most, on so many keys at least, are for tiles, which read keys faster.
    few_queries: int
    few_queries_tiles_from_keys: int
    # Backward: causal with more queries than this is for tiles.
    causal_backward_queries: int
    # Packed sequences below this share a call with those of their lengths, of so many tokens at a time that they are
    # still in the cache when they are used.
    shared_call_below_tokens: int
    shared_call_tokens: int
    # fp32 copies at a time, where fp16 is computed in fp32.
    widened_bytes: int


@dataclass(frozen=True)
class SplitKV:
    """Which calls are served without tiles, and how their keys are split."""

    # A step is code for a number of rows, each of which is unrolled: so many at most.
    most_rows: int
    # Few queries on many keys: keys of an average sequence, and elements of all keys, from which the step repays
    # itself beside tiles...
    decode_from_keys: int
    decode_from_elements: int
    # ... and, in fp32 and fp64, beside PyTorch's kernel; half of them where sequences have the keys of the second.
    decode_from_elements_wide: int
    decode_long_keys: int
    # Keys of a split: enough splits for all threads, or, from so many keys on, few to be merged.
    split_keys: int
    long_split_keys: int
    long_split_from_keys: int
    # Many short packed sequences: keys of the longest, at most, and elements of q, at least.
    short_keys: int
    short_from_elements: int
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
    # Scores of a pair of heads from which bf16 products pay; among fewer, a rounding of one of them shows.
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


@dataclass(frozen=True)
class Tuning:
    """A class of machine, and on which machine its numbers were measured."""

    name: str
    measured_on: str
    sdpa_cpu: SdpaCpu
    split_kv: SplitKV
    tiled: Tiled
