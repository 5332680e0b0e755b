"""Inductor: its caches do not mix code, and its compile workers have the stage."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tools.offline import in_own_process

from . import in_child


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
