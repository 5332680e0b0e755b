"""Inductor: its caches do not mix code, its compile workers have the stage, its attention kernels have tensor cores."""

import functools

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.turing import in_child
from tools.offline import flex_graphs, in_own_process


def test_cache_keys_on_disk():
    """Those of graphs, of autotuning and of kernels change with enable() and return with disable(), on every thread."""
    for name, (before, enabled, after) in in_own_process(in_child.inductor_keys).items():
        assert before != enabled, name
        assert before == after, name


def test_modules_in_memory_are_not_reused():
    assert in_own_process(in_child.reloaded_modules) == [True, False, False]


@pytest.mark.parametrize("start_method", ["subprocess", "fork"])
def test_compile_workers(start_method):
    """A worker compiles with the stage while it is enabled, and without it afterwards."""
    seen = in_own_process(in_child.compile_workers, start_method)
    assert seen["here"] not in seen["workers"]
    assert seen["on_disk"] == [[True], [False, True]]


@pytest.mark.parametrize(
    ("build", "hmma", "barriers_of_loops"),
    [
        (functools.partial(flex_graphs.forward, 64, 64, 64, 4, 2), 256, [2, 2]),
        (functools.partial(flex_graphs.forward, 128, 128, 32, 8, 2), 256, [2, 2]),
        (functools.partial(flex_graphs.backward, 64, 32, 64, 64, 32, 4, 2), 448, None),
        (functools.partial(flex_graphs.backward, 128, 32, 64, 64, 32, 8, 2), 704, None),
    ],
    ids=["forward 64", "forward 128", "backward 64", "backward 128"],
)
def test_attention_kernels(build, hmma, barriers_of_loops):
    """On tensor cores, without spills, in Turing's shared memory; and the loops bound by the tensor cores."""
    kernel = in_own_process(in_child.flex_kernel, build)
    assert kernel["turing"]["hmma"] == hmma
    assert kernel["turing"]["spills"] == 0
    assert kernel["turing"]["shared"] <= 65536
    if barriers_of_loops:
        assert [loop["barriers"] for loop in kernel["loops"]] == barriers_of_loops
        assert all(loop["tensor"] == max(loop.values()) for loop in kernel["loops"])
