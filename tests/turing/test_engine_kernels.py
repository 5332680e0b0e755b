"""The fused engine's kernels, with the options of its table, compiled for sm_75: what a Turing card would execute."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from compiled_fa.engines.fused.kernels import Spec
from compiled_fa.engines.fused.mods import Features
from compiled_fa.engines.fused.options import options_for
from compiled_fa.tuning.gpu import FUSED
from tools.offline import Kernel, in_own_process
from tools.offline.engine import compile_spec
from tools.offline.engine_kernels import DIRECTIONS, EVERYTHING
from tools.offline.figures import SHARED

from . import in_child

HMMA = 8  # cycles of a HMMA.1688
KERNELS = [Kernel(*names) for names in itertools.product(DIRECTIONS, (64, 128), ("causal", EVERYTHING))]
# With Triton 3.6 (tried with torch 2.11) the same code needs more registers; docs/turing.md says so of each of these.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
SPILLS = {Kernel("forward", 64, "causal"): 12, Kernel("backward", 128, EVERYTHING): 12} if OLD else {}
BARRIERS = {Kernel("forward", 64, "causal"): [5, 2]} if OLD else {}
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k.direction} {k.head_dim} {k.features}")


@pytest.fixture(scope="module")
def kernels():
    """Figures by kernel."""
    return dict(zip(KERNELS, in_own_process(in_child.engine_kernels, KERNELS), strict=True))


@each_kernel
def test_all_multiply_adds_are_on_the_tensor_cores(kernels, kernel):
    figures = kernels[kernel].figures
    assert len(figures.loops) == (2 if kernel.direction == "forward" else 4)
    for loop in figures.loops:
        assert loop.cycles["tensor"] >= loop.ideal, loop
    assert figures.hmma * HMMA == sum(loop.cycles["tensor"] for loop in figures.loops)


@each_kernel
def test_no_spills(kernels, kernel):
    assert kernels[kernel].figures.spills <= SPILLS.get(kernel, 0)


@each_kernel
def test_a_block_fits_in_an_sm(kernels, kernel):
    figures = kernels[kernel].figures
    assert figures.shared <= SHARED
    assert figures.blocks_per_sm >= 1


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k.features == "causal"], ids=lambda k: f"{k.direction} {k.head_dim}"
)
def test_the_share_of_the_peak_that_the_loops_allow(kernels, kernel):
    """Counting no multiply-add twice. But for forward at head_dim 64, shared memory bounds them."""
    of_forward_64 = 0.9 if OLD else 0.95
    share = {("forward", 64): of_forward_64, ("forward", 128): 0.7, ("backward", 64): 0.58, ("backward", 128): 0.4}
    assert kernels[kernel].figures.useful_share >= share[kernel.direction, kernel.head_dim]


@pytest.mark.parametrize(
    "kernel",
    [k for k in KERNELS if k.direction == "forward" and dict(k.spec.options)["num_stages"] > 1],
    ids=lambda k: f"{k.head_dim} {k.features}",
)
def test_the_forward_loops_are_pipelined(kernels, kernel):
    """One barrier after a tile is read, one after the next is stored; without the pipeline there are twelve."""
    assert kernels[kernel].barriers == BARRIERS.get(kernel, [2, 2])


def test_wide_dtypes_fit_in_an_sm():
    """Without tensor cores, and so in another table; in the most demanding class, fp32: bf16 takes half of its room."""
    dtype = torch.float32
    for direction in DIRECTIONS:
        spec = Kernel(direction, 128, EVERYTHING).spec
        options = options_for(direction, 128, dtype, spec.features, (7, 5))
        compiled = in_own_process(compile_spec, dataclasses.replace(spec, dtype=dtype, options=options), turing=True)
        assert compiled.shared <= SHARED
        assert compiled.hmma == 0


CAPABILITIES = {99: (8, 6), 163: (8, 0), 227: (9, 0)}


@pytest.mark.parametrize(
    "key",
    [(99, 2, "forward", 256), (163, 2, "backward", 512), (227, 2, "forward", 512)],
    ids=lambda key: f"{key[0]} KB {key[2]} {key[3]}",
)
def test_newer_gpus_have_the_shared_memory(key):
    """A sample of their tiles, of those that take most: compiled for such a GPU."""
    kilobytes, itemsize, direction, head_dim = key
    assert itemsize == torch.bfloat16.itemsize
    features = Features(softcap=True, layout="packed")
    strides = ((4 * head_dim, head_dim),) * (3 if direction == "forward" else 5)
    spec = Spec(direction, features, torch.bfloat16, 4, 4, head_dim, head_dim, strides, False, options=FUSED.newer[key])
    compiled = in_own_process(compile_spec, spec, turing=False, capability=CAPABILITIES[kilobytes])
    assert compiled.shared <= kilobytes * 1024
