"""tools/turing_kernels.py: what a program launches, or a signature says, compiled both ways and told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
import triton.language as tl

from tools import turing_kernels
from tools.offline import compile_jit
from tools.offline.launches import CudaOnCpu
from tools.turing_kernels import code_of, compiled_apart, launch_of

from . import kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_a_program(tmp_path):
    """Each configuration of an autotuned kernel, and each kernel once; the program's own failure is told."""
    words = [HERE / "user_program.py", "--json", "its own"]
    line = [sys.executable, "-m", "tools.turing_kernels", "--json", tmp_path / "figures.json", *words]
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    small, large, doubled = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["kernel"] for row in (small, large, doubled)] == ["matmul", "matmul", "doubled"]
    assert [row["constants"]["BLOCK"] for row in (small, large)] == [16, 32]
    assert [row["options"]["num_warps"] for row in (small, large, doubled)] == [1, 2, 4]
    assert [row["turing"]["hmma"] for row in (small, large, doubled)] == [4, 8, 0]
    for row in (small, large):
        assert row["stock"]["hmma"] == 0 < row["stock"]["ffma"]
        assert row["turing"]["spills"] == row["turing"]["ffma"] == 0
    assert doubled["turing"] == doubled["stock"]
    lines = done.stdout.splitlines()
    assert lines[0] == "--json its own"
    assert lines[3].startswith("| matmul(BLOCK=16, OUT=fp32) | 1, 3 | turing | 4 / 0 / 0 | 0 |")
    assert len([line for line in lines if line.startswith("|")]) == 2 + 2 * 3
    assert "user_program.py ended with AssertionError: wrong (no kernel has written anything)" in done.stderr


def test_one_kernel_by_its_signature(capsys):
    signature = "*fp16:16, *fp16:16, *fp32:16, i32:16, 0, tl.float32"
    line = ["--kernel", "matmul", "--signature", signature, "--no-stock", str(HERE / "kernels.py")]
    assert turing_kernels.main(line) == 0
    types = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}
    wanted = compile_jit(
        kernels.matmul, types, {"OTHER": 0, "OUT": tl.float32}, turing=True, divisible_by_16=("a", "b", "c", "K")
    )
    (row,) = capsys.readouterr().out.splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == [
        *("matmul(OTHER=0, OUT=fp32)", "4, 2", "turing", f"{wanted.hmma} / 0 / {wanted.ffma}"),
        *(str(wanted.spills), str(wanted.registers), f"{wanted.shared / 1024:.4g} KB"),
    ]
    assert code_of(wanted).bound_by == cells[-1].split(",")[0]


def test_what_does_not_compile_is_told_in_one_line(capfd):
    launch = launch_of(HERE / "kernels.py", "matmul", "*i8:16, *i8:16, *i32:16, i32:16, 0, tl.int32", OPTIONS)
    stock = compiled_apart(launch, turing=False)
    assert isinstance(stock, str)
    assert "must be floating-point-like" in stock
    assert len(stock) <= turing_kernels.LONGEST_ERROR
    assert capfd.readouterr().err == ""
    row = {"kernel": "matmul", "constants": {}, "options": OPTIONS, "turing": stock}
    (line,) = turing_kernels.markdown(row)
    assert line.count("|") == len(turing_kernels.COLUMNS) + 1


def test_a_compiler_that_ends_its_process(monkeypatch):
    launch = launch_of(HERE / "kernels.py", "volatile", "*fp16, *fp16, *fp32, i32", OPTIONS)
    monkeypatch.setattr(turing_kernels, "compile_ast", lambda *arguments: os._exit(3))
    assert compiled_apart(launch, turing=False) == "the compiler ended with exit code 3"


@pytest.mark.parametrize(
    ("kernel", "signature", "message"),
    [
        (
            "matmul",
            "*fp16, *fp16",
            r"signature must have a type for each of \['a', .*, 'OUT'\], got 2: '\*fp16, \*fp16'",
        ),
        ("triton", "*fp16", r"kernel must be one of \['matmul', .*, got 'triton'"),
        ("volatile", "*fp16:8, *fp16, *fp32, i32", r"divisibility by 16 is of use, got '\*fp16:8' for a"),
    ],
)
def test_wrong_arguments(kernel, signature, message):
    with pytest.raises(ValueError, match=message):
        launch_of(HERE / "kernels.py", kernel, signature, OPTIONS)


@pytest.mark.parametrize(
    ("word", "value"),
    [("64", 64), ("0.5", 0.5), ("True", True), ("None", None), ("tl.int8", tl.int8), ("i32", "no"), ("tl.no", "no")],
)
def test_constants_of_a_signature(word, value):
    known, found = turing_kernels._constant(word)
    assert known == (value != "no")
    assert found == (value if known else None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--kernel", "a", "x.py"], "wanted together"),
        (["--num-warps", "8", "x.py"], "are of --kernel"),
        (["--kernel", "a", "--signature", "i32", "x.py", "--num-warps", "8"], "takes no arguments, got ['--num-warps'"),
        (["no_such.py"], "there is no no_such.py"),
    ],
)
def test_the_command_refuses(line, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        turing_kernels.main(line)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_on_a_cpu():
    plain = torch.ones(2)
    with CudaOnCpu():
        made = [
            torch.empty(2, device="cuda:1", pin_memory=False),
            torch.empty(2, device=torch.device("cuda")),
            torch.zeros(2, device=0),
            plain.to("cuda"),
            plain.cuda(),
            torch.empty_like(plain, device="cuda"),
        ]
        assert all(tensor.is_cuda for tensor in made)
        assert {tensor.device for tensor in made} == {torch.device("cuda", 0)}
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert not plain.is_cuda
