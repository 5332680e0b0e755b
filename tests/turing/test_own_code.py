"""The triton engine's kernels, with the options of its table, compiled for sm_75: what a Turing card would execute."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from tools.offline.figures import SHARED, figures_of_launch
from tools.offline.own_kernels import compile_launch, launch_of

# A few: `python -m tools.own_kernels` has them all.
CASES = [
    ("forward", 64, "dropout"),
    ("queries", 128, "dropout"),
    ("keys", 64, "dropout"),
    ("forward", 96, "causal"),
    ("keys", 256, "causal"),
]
HMMA = 8  # cycles of a HMMA.1688
# With Triton 3.6 (tried with torch 2.11) the same code needs more registers; docs/turing.md says so.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
SPILLS = {("keys", 64, "dropout"): 43} if OLD else {}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        launches = {case: launch_of(*case) for case in CASES}
        return {case: (launch, compile_launch(launch)) for case, launch in launches.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_what_a_t4_would_execute(compiled, case):
    launch, code = compiled[case]
    figures = figures_of_launch(launch, code)
    assert len(figures.loops) == 2
    assert figures.hmma * HMMA == sum(loop.cycles["tensor"] for loop in figures.loops)
    assert all(loop.cycles["tensor"] >= loop.ideal for loop in figures.loops)
    assert figures.spills <= SPILLS.get(case, 0)
    assert figures.shared <= SHARED
    assert figures.blocks_per_sm >= 1
