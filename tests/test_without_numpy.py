"""A first run is clean where there is no NumPy, which torch does not need; in processes of their own."""

import os
import subprocess
import sys

import pytest
import torch

# As if it were not installed, for Python and for C.
NO_NUMPY = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_all_but_numpy(name, path=None, target=None):
    return None if name.partition(".")[0] == "numpy" else find_spec(name, path, target)

PathFinder.find_spec = find_all_but_numpy
"""

COMMAND = """
import runpy, sys
sys.argv = ["compiled_fa", "--case", "GQA"]
runpy.run_module("compiled_fa", run_name="__main__", alter_sys=True)
"""

CALL = """
import compiled_fa, torch
q = torch.randn(1, 16, 2, 8, requires_grad=True)
cu_seqlens = torch.tensor([0, 3, 16], dtype=torch.int32)
compiled_fa.flash_attn_func(q, q, q, causal=True, window_size=torch.tensor([3, 0]), dropout_p=0.1).sum().backward()
compiled_fa.flash_attn_varlen_func(q[0], q[0], q[0], cu_seqlens, cu_seqlens, 13, torch.tensor(13)).sum().backward()
torch.compile(compiled_fa.flash_attn_func, fullgraph=True, backend="aot_eager")(q, q, q).sum().backward()
"""


def run(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)


def check(done):
    assert done.returncode == 0, done.stderr
    assert not any(word in done.stderr.lower() for word in ("numpy", "warning")), done.stderr


def test_the_command():
    done = run(NO_NUMPY + COMMAND)
    check(done)
    assert "All within budget." in done.stdout


def test_a_call():
    check(run(NO_NUMPY + CALL))


def test_torch_itself_is_not_quiet():
    """What the others would print; and the stub does what it says."""
    done = run(NO_NUMPY + "import torch\n")
    if "NumPy" not in done.stderr:
        pytest.skip(f"torch {torch.__version__} says nothing of NumPy")
    assert "Failed to initialize NumPy: No module named 'numpy'" in done.stderr


@pytest.mark.parametrize("stub", [NO_NUMPY, "import sys\n"], ids=["without NumPy", "with it"])
def test_filters_of_warnings_are_torchs_own(stub):
    program = stub + "import {}, warnings\nprint([f[:3] for f in warnings.filters])\n"
    filters = [run(program.format(module)).stdout for module in ("torch", "torch, compiled_fa", "compiled_fa")]
    assert filters[2].strip()
    assert filters[2] == filters[1]


def test_other_words_about_numpy_are_not_silenced():
    """Such as that there is a NumPy, but none that torch can use."""
    done = run("import sys\nsys.modules['numpy'] = None\nimport compiled_fa\n")
    assert "Failed to initialize NumPy: " in done.stderr
