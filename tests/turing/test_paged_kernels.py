"""The kernels that read keys in pages, compiled for sm_75, and what a decoding call launches around them."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from compiled_fa.engines.fused import pages
from compiled_fa.engines.fused.paged import PagedSpec
from tools.offline import Compiled, KernelSource, compile_source, in_own_process
from tools.offline.engine import ATTENTION, launches_of_tables, written_for
from tools.offline.engine_kernels import paged
from tools.offline.figures import SHARED

SPECS = {
    "64, pages of 16": paged(64, 16),
    "64, pages of 64": paged(64, 64),
    "128, everything": paged(128, 256, softcap=True, alibi=True),
    "128, prefill": paged(128, 256, queries=250, splits=False),
    "256": paged(256, 64),
}


def all_kernels(specs: list[PagedSpec]) -> list[tuple[Compiled, list[str], str]]:
    """For a process of its own: the attention kernel, launches in order, and the code that launches them."""
    found = []
    for each in specs:
        code = written_for(each)
        (kernel,) = (KernelSource(name, text) for name, text in code.kernels.items() if name.startswith(ATTENTION))
        found.append((compile_source(kernel, turing=True), code.launches, code.wrapper))
    return found


def everything(specs: list[PagedSpec], shape: pages.Shape) -> tuple[list[Any], list[str]]:
    return all_kernels(specs), launches_of_tables(shape)


@pytest.fixture(scope="module")
def offline() -> tuple[list[Any], list[str]]:
    shape = pages.Shape(4, 16, 64, False, False, True, False)
    found: tuple[list[Any], list[str]] = in_own_process(everything, list(SPECS.values()), shape)
    return found


@pytest.fixture(scope="module")
def kernels(offline: tuple[list[Any], list[str]]) -> dict[str, tuple[Compiled, list[str], str]]:
    return dict(zip(SPECS, offline[0], strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_tensor_cores_without_spills_in_an_sm(kernels, name):
    """An HMMA is 16 x 8 x 8 multiply-adds, which four warps share as far as there are tiles of 8 keys or columns."""
    kernel, options = kernels[name][0], dict(SPECS[name].options)
    head_dim = SPECS[name].head_dim
    products = 2 * options["BLOCK_M"] * options["BLOCK_N"] * head_dim // (16 * 8 * 8)
    assert kernel.hmma >= products // options["num_warps"]
    assert kernel.spills == 0
    assert kernel.shared <= SHARED
    assert kernel.ffma <= 64  # of the softmax


@pytest.mark.parametrize("name", SPECS)
def test_a_call_reads_the_cache_in_one_kernel(kernels, name):
    """Queries laid out, attention, lse and out merged or brought in order; k and v go to the attention kernel alone."""
    _, launches, code = kernels[name]
    assert len(launches) == 4
    assert sum(launch.startswith(ATTENTION) for launch in launches) == 1
    inputs = re.search(r"^ +(arg\d+_1(?:, arg\d+_1)*) = args$", code, re.MULTILINE)
    assert inputs is not None
    calls = [(kernel, given.split(", ")) for kernel, given in re.findall(r"(\w+)\.run\((.*), stream=", code)]
    for cache in inputs[1].split(", ")[1:3]:
        (reader,) = (kernel for kernel, given in calls if cache in given)
        assert reader.startswith(ATTENTION)


def test_launches_of_tables(offline):
    """Once a step, for all layers."""
    assert len(offline[1]) <= 5
