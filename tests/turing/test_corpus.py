"""Kernels of every kind that has been met (tools/corpus): right as executed PTX, nowhere worse than by stock Triton."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from tools.corpus import CASES
from tools.turing_corpus import execute, launches, main, markdown, worse
from tools.turing_kernels import Code, code_of, compiled_apart

ROOT = Path(__file__).parents[2]
LONGEST = 60  # seconds that stock Triton may take for a small kernel


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def _of_corpus(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_and_not_worse_than_stock(case):
    errors, (executed,) = execute(case)
    assert errors.right, errors
    stock = compiled_apart(executed.launch, turing=False, seconds=LONGEST)
    assert worse(case, code_of(executed.compiled), stock) == []


def test_cases_of_each_kind():
    assert {frozenset(), frozenset({"hmma"}), frozenset({"imma"})} == {case.tensor_cores for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_wrong_kernel_is_found():
    case = _of_corpus("matmul")
    doubled = dataclasses.replace(case, reference=lambda dtype, a, b: 1.01 * case.reference(dtype, a, b))
    errors, _ = execute(doubled)
    assert not errors.right


def test_what_no_kernel_writes_is_found():
    case = _of_corpus("layer norm")
    unwritten = dataclasses.replace(case, call=lambda x, weight, bias, num_warps: torch.empty_like(x))
    errors, executed = execute(unwritten)
    assert errors.ours == torch.inf
    assert executed == []
    assert not torch.are_deterministic_algorithms_enabled()


OTHER_CODE = "has no dots, and other machine code than stock's"
CODE = Code(
    hmma=16, imma=0, ffma=3, spills=2, registers=99, shared=8192, blocks_per_sm=4, bound_by=None, tensor_share=0.0
)


@pytest.mark.parametrize(
    ("name", "ours", "stock", "found"),
    [
        ("matmul", CODE, CODE, []),
        ("matmul", CODE, "OutOfResources: of registers", []),
        ("matmul", dataclasses.replace(CODE, spills=3), CODE, ["has 3 spills, stock 2"]),
        ("matmul", dataclasses.replace(CODE, ffma=4), CODE, ["has 4 scalar multiply-adds, stock 3"]),
        ("matmul", dataclasses.replace(CODE, shared=65537), CODE, ["cannot be launched, and stock's can"]),
        ("matmul", dataclasses.replace(CODE, hmma=0), CODE, ["has no HMMA"]),
        ("matmul int8", CODE, "it does not compile", ["has no IMMA"]),
        ("matmul", "RuntimeError: no", CODE, ["does not compile: RuntimeError: no"]),
        ("layer norm", "RuntimeError: no", "RuntimeError: no", []),
        ("layer norm", CODE, CODE, []),
        ("layer norm", CODE, dataclasses.replace(CODE, registers=98), [OTHER_CODE]),
    ],
)  # fmt: skip
def test_what_is_worse(name, ours, stock, found):
    assert worse(_of_corpus(name), ours, stock) == found


def test_time_is_limited():
    (launch,) = launches(_of_corpus("matmul"), full=True)
    assert compiled_apart(launch, turing=False, seconds=0.01) == "not compiled after 0 s"


def test_the_command_and_the_committed_table(tmp_path, capsys):
    """It writes rows like those of the table that the docs show, which has all cases and no fault."""
    file = tmp_path / "corpus.json"
    assert main(["--only", "running sum", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["turing"] == row["stock"]
    assert f"| running sum | block 1024, 4, {row['options']['num_stages']} | 0 / 0 / " in capsys.readouterr().out
    committed = json.loads((ROOT / "bench" / "results" / "turing_corpus.json").read_text())["rows"]
    assert [found["case"] for found in committed] == [case.name for case in CASES]
    assert [found["faults"] for found in committed] == [[]] * len(CASES)
    assert committed[[case.name for case in CASES].index("running sum")].keys() == row.keys()
    page = (ROOT / "docs" / "turing.md").read_text()
    assert "\n".join(markdown(committed)) in page
