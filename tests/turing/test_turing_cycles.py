"""tools/turing_cycles.py: what it tells of a kernel that is compiled, and of one of the engine's by its figures."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tools import turing_cycles
from tools.offline.issue import Run
from tools.offline.turing_sm import RTX_2080_TI, T4

HERE = Path(__file__).parent
SIGNATURE = "*fp16:16, *fp16:16, *fp32:16, i32:16, 0, tl.float32"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_one_kernel_by_its_signature(tmp_path, capsys):
    """A loop of 32 HMMA a warp: on GeForce it takes longer, and its tensor cores, slower, are busier."""
    found = []
    for card in (T4, RTX_2080_TI):
        line = ["--card", card.name, "--kernel", "matmul", "--signature", SIGNATURE, "--json", str(tmp_path / "cycles")]
        assert turing_cycles.main([*line, str(HERE / "kernels.py")]) == 0
        content = json.loads((tmp_path / "cycles").read_text())
        assert content["card"]["name"] == card.name
        (row,) = content["rows"]
        (run,) = row["runs"]
        assert run["cycles"] / row["blocks"] >= 32 * card.hmma
        assert run["busy"]["tensor"] == pytest.approx(32 * card.hmma * row["blocks"] / run["cycles"], rel=0.05)
        assert run["issued"] + sum(run["waits"].values()) == pytest.approx(1)
        found.append(run)
    assert found[0]["cycles"] < found[1]["cycles"]
    assert found[0]["busy"]["tensor"] < found[1]["busy"]["tensor"]
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("matmul(OTHER=0, OUT=fp32), 4 warps, 2 stages: ")
    assert f"{found[0]['cycles'] / row['blocks']:.0f} cycles, tensor cores" in second


def test_a_line_a_loop():
    run = Run(4000, {"tensor": 0.5, "shared": 0.25}, 0.3, {"global": 0.4, "barrier": 0.26, "mufu": 0.04})
    cycles = turing_cycles.Cycles(blocks=2, registers=200, spills=0, shared=24 << 10, runs=(run,))
    head, line = turing_cycles.lines("a kernel", cycles)
    assert head == "a kernel: 200 registers, 0 spills, 24 KB, 2 blocks/SM"
    told = "2000 cycles, tensor cores 50%, shared memory 25%, issues 30%; waits for global 40%, barrier 26%"
    assert line.strip() == told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--kernel", "matmul", "kernels.py"], "are wanted together"),
        (["--kernel", "matmul", "--signature", "i32"], "are wanted together"),
        (["no_such.py"], "there is no no_such.py"),
        (["--card", "Voodoo 2"], "invalid choice: 'Voodoo 2'"),
    ],
)
def test_the_command_refuses(line, message, capsys):
    with pytest.raises(SystemExit):
        turing_cycles.main(line)
    assert message in capsys.readouterr().err
