"""Large results ask for huge pages, and are tensors like all others; what a call frees is there for the next one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compiled_fa import flash_attn_varlen_func, memory

SMAPS = Path("/proc/self/smaps")
HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists() and SMAPS.exists()


def asked_for_huge_pages(tensor: Tensor) -> bool:
    """Does the mapping that holds the tensor's middle have the flag of MADV_HUGEPAGE?"""
    at, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= at < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="a system without transparent huge pages")
def test_large_results_ask_for_huge_pages_and_small_ones_do_not() -> None:
    q = torch.zeros(1, 3)
    large = memory.new_empty(q, (memory.LARGE // 4, 3))
    assert large.shape == (memory.LARGE // 4, 3)
    assert large.dtype == q.dtype
    assert large.is_contiguous()
    assert asked_for_huge_pages(large)
    assert not asked_for_huge_pages(memory.new_empty(q, (1000, 3)))


def test_a_system_without_them_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 90, 2, 16).unbind(0)
    cu_seqlens = torch.tensor([0, 50, 90], dtype=torch.int32)
    monkeypatch.setattr(memory, "LARGE", 1)
    asking = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 50, 50)
    monkeypatch.setattr(memory, "_advise", lambda: None)
    assert torch.equal(asking, flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 50, 50))


FAULTS = """
import resource, torch
from compiled_fa import memory
def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.empty(4 << 20, dtype=torch.uint8).fill_(1) for _ in range(4)]
    del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
memory.keep_freed()
for _ in range(10):
    faults_of_a_call()
print(sum(faults_of_a_call() for _ in range(10)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux and its allocator")
def test_freed_memory_is_kept() -> None:
    """In a new process: what others have freed before would have told the allocator the same."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 40,960 pages
