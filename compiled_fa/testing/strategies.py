"""Cases drawn by hypothesis: lengths around nothing, one and a tile, every feature, every dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from .cases import DIMS, Bias, Case

TILE = 16  # lengths are drawn around its multiples
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 3, 7, 13, 23, 37, 53]),
    st.integers(0, 70),
)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
WINDOW_SIDE = st.one_of(st.just(-1), st.integers(0, 40))

BIASES = st.builds(
    Bias,
    st.sampled_from([DIMS, DIMS, "hqk", "bqk", "bk", "qk", "hk", "bhq", ""]),
    st.sampled_from([torch.float32, torch.float32, torch.bool, torch.float16, torch.bfloat16, torch.float64]),
    st.booleans(),
    st.booleans(),
)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "nheads_k": st.integers(1, 3),
    "heads_per_key": st.integers(1, 3),
    "head_dim": st.sampled_from([1, 3, 8, 16, 33]),
    "head_dim_v": st.sampled_from([1, 5, 8, 24]),
    "dtype": DTYPES,
    "causal": st.booleans(),
    "window_size": st.one_of(st.just((-1, -1)), st.tuples(WINDOW_SIDE, WINDOW_SIDE)),
    "softmax_scale": st.sampled_from([None, None, 0.05, 1.0, -0.3]),
    "softcap": st.sampled_from([0.0, 0.0, 2.0, 30.0]),
    "slopes": st.sampled_from(["none", "none", "heads", "batch"]),
    "dropout_p": st.sampled_from([0.0, 0.0, 0.1, 0.7]),
    "seed": st.integers(0, 2**31),
}


@st.composite
def cases(draw: st.DrawFn, /, dense: bool, of: Callable[..., Any] = Case, **fields: Any) -> Any:
    """Dense or packed ones. fields: a value of a field of the case, or a strategy of its own. of: makes the case."""
    pairs = st.tuples(LENGTHS, LENGTHS)
    lengths = st.integers(0, 3).flatmap(lambda batch: pairs.map(lambda pair: (pair,) * batch))
    if not dense:
        lengths = st.lists(pairs, max_size=6).map(tuple)
    wanted = {"lengths": lengths, **FIELDS, **fields}
    drawn = {name: draw(x) if isinstance(x, st.SearchStrategy) else x for name, x in wanted.items()}
    return of(dense=dense, **drawn)
