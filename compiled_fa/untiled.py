"""Which calls on a CPU need no tiles: the tiled engine has steps of their own for them (engines/tiled/split_kv), the
sdpa_cpu engine leaves them to it, and warmup compiles them.

As measured: bench/NOTES.md. The steps are code for one head_dim and number of rows, which a small call does not repay.
"""

from __future__ import annotations

from .problem import Problem

ROWS = 16  # query rows that share a key head, at most

# Few queries on many keys: keys of a sequence, and elements of all keys.
DECODING_KEYS, DECODING_ELEMENTS = 64, 1 << 16
# In fp32, where ATen's kernel is faster for less; half of it where sequences have this many keys.
DECODING_ELEMENTS_FP32, DECODING_LONG = 1 << 20, 1024

# Many short packed sequences: keys of the longest, and elements of q.
SHORT_KEYS, SHORT_ELEMENTS = 96, 1 << 18


def rows(problem: Problem, queries: int) -> int:
    """Query rows that share a key head, of so many queries."""
    return queries * problem.q.shape[-2] // problem.k.shape[-2]
