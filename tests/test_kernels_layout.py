"""The kernel that compiled_fa.integrations.kernels writes: its layout, and that it stands alone.

The `kernels` package itself loads it in clients/kernels_layout.py, where it is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import compiled_fa
from compiled_fa.integrations import kernels

# As kernels imports it: by the id in its metadata, from its file. compiled_fa is found nowhere but in the folder.
ALONE = """
import importlib.util, json, sys
from importlib.machinery import PathFinder
from pathlib import Path
import torch

variant = Path(sys.argv[1])

class OnlyThere:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in ("compiled_fa", "compiled_fa_turing"):
            return None
        found = PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry) == variant])
        if found is None:
            raise ModuleNotFoundError(name)
        return found

sys.meta_path.insert(0, OnlyThere)
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[name] = kernel
spec.loader.exec_module(kernel)

q, k, v = torch.randn(3, 2, 9, 2, 8).unbind(0)
out = kernel.flash_attn_func(q, k, v, causal=True)
wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
assert torch.allclose(out, wanted.transpose(1, 2), atol=1e-5)
assert kernel.flash_attn_interface._wrapped_flash_attn_forward  # diffusers asks for it
files = {kernel.flash_attn_func.__code__.co_filename, kernel.flash_attn_varlen_func.__code__.co_filename}
assert all(Path(file).is_relative_to(variant) for file in files), files
"""


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    return kernels.write(tmp_path_factory.mktemp("kernel"))


def test_it_stands_alone(variant):
    environment = {**os.environ, "COMPILED_FA_COMPILE": "0", "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE, str(variant)]
    done = subprocess.run(command, env=environment, cwd=variant, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr


def test_what_kernels_reads(variant):
    assert variant.name == "torch-universal"
    assert variant.parent.name == "build"
    told = json.loads((variant / "metadata.json").read_text())
    assert told["id"].isidentifier()
    assert told["id"] != "compiled_fa"
    assert told["python-depends"] == []
    assert not list(variant.rglob("__pycache__"))
    assert (variant / "compiled_fa" / "drop_in" / "v2_7_4" / "flash_attn" / "bert_padding.py").is_file()


def test_the_command(tmp_path, capsys):
    assert kernels.main([str(tmp_path / "new")]) == 0
    assert f"LOCAL_KERNELS=compiled-fa/flash-attn={tmp_path / 'new'}" in capsys.readouterr().out
    assert (tmp_path / "new" / "build" / "torch-universal" / "__init__.py").is_file()
    assert kernels.main([str(tmp_path / "new")]) == 1
    assert "there is a" in capsys.readouterr().err
    with pytest.raises(ValueError, match="already: remove it, or name another folder"):
        kernels.write(tmp_path / "new")


def test_its_version_is_ours():
    assert kernels.metadata()["id"] == f"_compiled_fa_kernel_{compiled_fa.__version__.replace('.', '_')}"
