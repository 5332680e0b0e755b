"""tools/turing_report.py and the figures it shows, without compiling."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tools import turing_report
from tools.offline.compile import Compiled
from tools.offline.engine_kernels import DIRECTIONS, HEAD_DIMS, Kernel
from tools.offline.figures import Figures, Loop, blocks_per_sm, kinds_of_loops, loops_over_tiles
from tools.offline.machine_code import UNITS


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "blocks"),
    [
        (255, 24 << 10, 4, 2),  # registers
        (168, 16 << 10, 4, 3),  # registers of a sub-core: 16384 / (168 * 32) = 3 warps
        (64, 22 << 10, 4, 2),  # shared memory
        (32, 0, 8, 4),  # threads
        (32, 0, 1, 16),  # blocks
        (128, 65 << 10, 4, 0),
    ],
)
def test_blocks_per_sm(registers, shared, num_warps, blocks):
    assert blocks_per_sm(registers, shared, num_warps) == blocks


def loop(kind="out", elements=64 * 64, ideal=1024.0, **cycles):
    return Loop(kind, elements, {unit: cycles.get(unit, 0) for unit in UNITS}, ideal)


def figures(*loops, spills=0, registers=200, shared=24 << 10, blocks=2):
    return Figures(256, 0, spills, registers, shared, blocks, loops)


def test_shares_of_the_peak():
    """One loop bound by the tensor cores that repeats half of its work, one bound by something else."""
    both = figures(loop(tensor=2048, alu=100), loop(tensor=1024, alu=4096))
    assert both.tensor_share == 1024 / 4096
    assert both.useful_share == (1024 + 1024) / (2048 + 4096)
    assert figures().useful_share == figures().tensor_share == 0


def test_figures_survive_json():
    original = figures(loop(tensor=1024, issue=7))
    assert Figures.from_dict(json.loads(json.dumps(original.as_dict()))) == original


KEYS, QUERIES = ("dk dv", 128, 96), ("dq", 96, 128)  # of a loop: its kind; HMMA, and FFMA, of an iteration


@pytest.mark.parametrize("tensor_cores", [True, False])
@pytest.mark.parametrize("order", [(KEYS, KEYS, QUERIES, QUERIES), (QUERIES, QUERIES, KEYS, KEYS)], ids=["keys", "dq"])
def test_loops_are_known_by_their_work_in_whatever_order_the_compiler_has_them(order, tensor_cores):
    """On the tensor cores, where more FFMA are beside fewer HMMA; and without them."""
    tiles = {"BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32, "num_warps": 4, "num_stages": 2}
    spec = Kernel("backward", 64, "causal", tuple(tiles.items())).spec
    sass = ""
    for i, (_, hmma, ffma) in enumerate(order):
        dots = [("HMMA.1688.F32", hmma), ("FFMA", ffma)] if tensor_cores else [("FFMA", hmma)]
        body = "".join(f"        /*0000*/  {opcode} R1, R2, R3, R1 ;\n" * count for opcode, count in dots)
        masks = "        /*0000*/  ISETP R1 ;\n" * (i % 2 == 0)  # only in the first of each kind
        sass += f".L_x_{i}:\n{body}{masks}        /*0000*/  @P0 BRA `(.L_x_{i}) ;\n"
    compiled = Compiled("k", 4, 255, 0, "", "", sass, b"")
    loops = loops_over_tiles(compiled, kinds_of_loops(spec))
    assert [loop.kind for loop in loops] == [kind for kind, _, _ in order]
    assert [loop.elements for loop in loops] == [32 * 64] * 4
    assert [loop.ideal for loop in loops] == [{"dk dv": 1024, "dq": 768}[kind] for kind, _, _ in order]
    assert [loop.cycles["alu"] for loop in loops] == [2, 0] * 2


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_grid_is_what_the_template_takes(direction, head_dim):
    options = [dict(candidate) for candidate in turing_report.grid(direction, head_dim)]
    assert options
    for sizes in options:
        assert all(128 % size == 0 for name, size in sizes.items() if name.startswith("BLOCK"))
        if direction == "backward":
            assert sizes["BLOCK_N1"] % sizes["BLOCK_M1"] == 0
            assert sizes["BLOCK_M2"] % sizes["BLOCK_N2"] == 0


def forward(m, n, warps=4, stages=2):
    return (("BLOCK_M", m), ("BLOCK_N", n), ("num_warps", warps), ("num_stages", stages))


def test_the_order_of_candidates():
    bound, slow = loop(tensor=1024), loop(tensor=1024, alu=2048)
    expected = [
        (forward(128, 32), figures(bound)),  # the larger tile
        (forward(64, 32), figures(bound)),
        (forward(64, 32, 8), figures(bound, blocks=1)),
        (forward(64, 64, 8, stages=1), figures(bound)),
        (forward(64, 128), figures(bound, blocks=1)),  # one warp a sub-core
        (forward(32, 32), figures(slow, blocks=4)),
        (forward(128, 64), figures(bound, spills=2)),
        (forward(128, 128), figures(bound, shared=65 << 10, blocks=0)),
        (forward(16, 128), "OutOfMemory: not compiled"),
    ]
    assert turing_report.ranked(dict(reversed(expected))) == [options for options, _ in expected]


def test_the_report_as_a_table():
    """With what a kernel moves beside it, if that was measured; a kernel that does not compile, or launch, says so."""
    good, large = figures(loop(tensor=1024)), figures(loop(tensor=1024), shared=80 << 10, blocks=0)
    rows = [
        {
            "direction": "forward",
            "head_dim": 64,
            "features": "causal",
            "options": dict(forward(64, 64)),
            "turing": good.as_dict(),
            "stock": stock,
            "traffic": {"read": 1e6},
        }
        for stock in (large.as_dict(), "CompilationError: no", None)
    ]
    header, _, *lines = turing_report.markdown(rows)
    assert header.endswith("bytes moved |")
    assert "64x64, 4, 2 | 256 / 0 / 0 | 200 | 24 KB | 2 | 100%" in lines[0]
    assert "80 KB: cannot be launched" in lines[0]
    assert "CompilationError: no" in lines[1]
    assert all(line.count("|") == header.count("|") for line in lines)


def test_results_are_kept(tmp_path, monkeypatch):
    """A second run compiles nothing."""
    task = turing_report.Task(Kernel("forward", 64, "causal"))
    turing_report._keep(tmp_path, task, figures(loop(tensor=1024)))
    monkeypatch.setattr(turing_report, "PROCESSES", None)  # a pool would fail
    assert turing_report.compiled([task], tmp_path) == {task: figures(loop(tensor=1024))}
    other = turing_report.Task(task.kernel, turing=False)
    assert turing_report._cached(tmp_path, other) is None
