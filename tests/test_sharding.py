"""Our ops on DTensors: what four ranks find out (ranks_sharding.py). examples/parallel_llama.py trains with them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ranks
import ranks_sharding  # noqa: F401  # which adds its checks


@pytest.mark.parametrize("name", ranks.names_in("ranks_sharding"))
def test_on_four_ranks(name):
    if wrong := ranks.outcomes(*ranks.OURS)[name]:
        pytest.fail(wrong, pytrace=False)


def test_importing_us_does_not_import_dtensor():
    program = "import sys, torch, compiled_fa; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
