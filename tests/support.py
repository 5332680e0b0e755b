"""What tests say of attention cases: compiled_fa.testing's words, with small cases and tile sizes."""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from compiled_fa import testing
from compiled_fa.engines import tiled
from compiled_fa.engines.tiled import TileSizes
from compiled_fa.testing import (
    RESULTS,
    Inputs,
    check_against_float64,
    cumulative,
    packed,
    run_engine,
    run_function,
    run_naive,
    run_op,
    strategies,
)
from compiled_fa.testing.strategies import DTYPES, LENGTHS, TILE, WINDOW_SIDE

Data = Inputs

TILES = st.one_of(
    st.none(),
    st.builds(TileSizes, st.sampled_from([6, TILE]), st.sampled_from([7, TILE]), st.integers(1, 7)),
)


@dataclass(frozen=True)
class Case(testing.Case):
    """tiles: sizes for the tiled engine; None: its own."""

    nheads_k: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    tiles: TileSizes | None = None


def cases(dense: bool, **fields: Any) -> st.SearchStrategy[Case]:
    return strategies.cases(dense, Case, **{"tiles": TILES, **fields})


def make(case: Case, std: float = 1.0) -> Inputs[Case]:
    return Inputs.of(case, std=std)


def run_tiled(data: Inputs[Case]) -> dict[str, Any]:
    """The tiled engine itself, with the case's tile sizes."""
    return run_engine(tiled, data, tiles=data.case.tiles)


__all__ = [
    "DTYPES",
    "LENGTHS",
    "RESULTS",
    "WINDOW_SIDE",
    "Case",
    "Data",
    "cases",
    "check_against_float64",
    "cumulative",
    "make",
    "packed",
    "replace",
    "run_engine",
    "run_function",
    "run_naive",
    "run_op",
    "run_tiled",
]
