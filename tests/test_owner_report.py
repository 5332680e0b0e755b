"""python -m compiled_fa report, on a CPU with small shapes; and the notebook that runs it on a free T4."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_fa.check import flex, owner, picture, speed
from compiled_fa.check.cases import CASES
from compiled_fa.testing import Case

ROOT = Path(__file__).resolve().parent.parent
SMALL = (speed.Shape(1, 32, 2, 16, False), speed.Shape(2, 16, 1, 16, True))
NEEDS_A_CARD = "needs-a-card"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")
    monkeypatch.setattr(speed, "ON_CPU", SMALL)
    monkeypatch.setitem(CASES, "GQA", Case.uniform(64, nheads_k=2, heads_per_key=2))


def written(folder):
    (file,) = folder.glob("compiled_fa-*.json")
    return json.loads(file.read_text())


def test_file_and_table(tmp_path, capsys):
    assert owner.main(["--folder", str(tmp_path), "--device", "cpu", "--case", "GQA"]) == 0
    report = written(tmp_path)
    assert report["ok"]
    assert [row["case"] for row in report["checks"]] == ["GQA"]
    assert [(row["shape"], row["direction"]) for row in report["speed"]] == [
        (dataclasses.asdict(shape), direction) for shape in SMALL for direction in ("forward", "forward+backward")
    ]
    for row in report["speed"]:
        wanted = {"ours", "SDPA"} | ({"ours, int8"} if row["direction"] == "forward" else set())
        assert wanted <= row["seconds"].keys()
        assert all(row["seconds"][name] > 0 for name in wanted)
    assert report["device"]["name"]
    assert report["environment"]["torch"] == torch.__version__
    told = capsys.readouterr()
    assert "checking 1 of 1: GQA" in told.err
    assert "measuring 2 of 2: 2 x 16 x 1 x 16 causal" in told.err
    assert "GQA" in told.out
    assert "1 x 32 x 2 x 16" in told.out
    assert len(list(tmp_path.glob("*.png"))) == picture.can_draw()
    assert ("no picture: matplotlib is not installed" in told.out) == (not picture.can_draw())


def test_it_is_of_use_though_something_fails(tmp_path, monkeypatch, capsys):
    """A check that raises, a peer that cannot, and no matplotlib."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(owner, "check", fails)
    monkeypatch.setattr(speed, "sdpa", fails)
    monkeypatch.setattr(picture, "can_draw", lambda: False)
    assert owner.main(["--folder", str(tmp_path), "--device", "cpu", "--case", "GQA"]) == 1
    report = written(tmp_path)
    assert not report["ok"]
    assert report["checks"] == [{"case": "GQA", "error": "RuntimeError: no kernel image", "ok": False}]
    assert {row["seconds"]["SDPA"] for row in report["speed"]} == {"RuntimeError: no kernel image"}
    assert all("SDPA" not in speed.tflops(row) for row in report["speed"])
    out = capsys.readouterr().out
    assert "GQA: RuntimeError: no kernel image" in out
    assert "SDPA, 2 x 16 x 1 x 16 causal, forward: RuntimeError: no kernel image" in out
    assert "no picture: matplotlib is not installed" in out


def test_no_such_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        owner.main(["--folder", str(tmp_path / "none")])
    assert "--folder must be a folder" in capsys.readouterr().err


def test_operations():
    assert speed.Shape(2, 8, 3, 4, False).operations(False) == 4 * 2 * 3 * 8 * 8 * 4
    assert speed.Shape(2, 8, 3, 4, True).operations(True) == 3.5 * 2 * 2 * 3 * 8 * 8 * 4
    row = {"shape": dataclasses.asdict(SMALL[0]), "direction": "forward", "seconds": {"ours": 1e-6, "SDPA": "no"}}
    assert speed.tflops(row) == {"ours": pytest.approx(4 * 2 * 32 * 32 * 16 / 1e6)}


def test_peers_agree():
    """All of them compute the same attention."""
    shape = speed.Shape(1, 40, 2, 16, True)
    q, k, v = shape.inputs(torch.device("cpu"), torch.float32)
    wanted = speed.sdpa(q, k, v, True)
    for name, peer in speed.peers(False).items():
        found = peer(q, k, v, True)
        assert torch.allclose(found, wanted, atol=0.05 if "int8" in name else 1e-5), name


def test_flex_in_a_process_of_its_own(monkeypatch):
    cpu = torch.device("cpu")
    assert isinstance(speed.in_own_process(SMALL[1], False, cpu, False), float)
    assert "does not support backward on CPU" in str(speed.in_own_process(SMALL[1], True, cpu, False))
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    assert speed.in_own_process(SMALL[1], False, cpu, False) == "not done after 0.01 s"


@pytest.mark.parametrize("stage", [True, False])
def test_flex_has_the_stage_or_not(stage, monkeypatch, capsys):
    done: list[bool] = []
    monkeypatch.setattr("compiled_fa.turing.enable", lambda: done.append(True))
    monkeypatch.setattr("compiled_fa.turing.disable", lambda: done.append(False))
    assert flex.main(["cpu", str(stage), "False", *map(str, dataclasses.astuple(SMALL[1]))]) == 0
    assert done == [stage]
    assert float(capsys.readouterr().out) > 0


@pytest.mark.parametrize(
    ("capability", "names"),
    [((7, 5), {"flex, stock Triton": False, "flex, our stage": True}), ((8, 0), {"flex, stock Triton": False})],
)
def test_flex_variants(capability, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert speed.flex_variants(torch.device("cuda")) == names
    assert speed.flex_variants(torch.device("cpu")) == {}


def test_a_picture_of_all_peers(tmp_path):
    pytest.importorskip("matplotlib")
    rows: list[dict[str, Any]] = [
        {"shape": dataclasses.asdict(shape), "direction": direction, "seconds": dict.fromkeys(picture.COLOURS, 1e-3)}
        for shape in SMALL
        for direction in ("forward", "forward+backward")
    ]
    rows[0]["seconds"]["xformers"] = "RuntimeError: no"
    environment = {"compiled_fa": "0.1.0", "torch": "2.13.0", "Triton": "3.9.0"}
    report = {"speed": rows, "ok": False, "environment": environment, "device": {"name": "Tesla T4"}}
    picture.draw(report, tmp_path / "t4.png")
    assert (tmp_path / "t4.png").read_bytes().startswith(b"\x89PNG")


def test_every_peer_has_a_colour(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert {*speed.peers(False), *speed.flex_variants(torch.device("cuda"))} == picture.COLOURS.keys()


@pytest.mark.parametrize(("words", "said"), [(["report"], "--folder"), ([], "python -m compiled_fa report")])
def test_the_command(words, said, monkeypatch, capsys):
    """`report` behind `python -m compiled_fa`; without it, the check."""
    monkeypatch.setattr(sys, "argv", ["compiled_fa", *words, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("compiled_fa", run_name="__main__")
    assert said in capsys.readouterr().out


# The notebook


def cells():
    notebook = json.loads((ROOT / "examples" / "turing_colab.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tags(cell):
    return cell["metadata"].get("tags", [])


def test_notebook_runs_up_to_what_needs_a_card(monkeypatch, tmp_path, capsys):
    """Without Jupyter: its code cells but those that say so, in order and in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        code = compile("".join(cell["source"]), f"cell {number}", "exec")
        if NEEDS_A_CARD not in tags(cell):
            exec(code, namespace)
    out = capsys.readouterr().out
    assert "Turing stage:" in out
    assert "greatest error:" in out


def test_notebook_as_it_is_committed():
    """Without outputs; what needs a card comes last, and runs the report."""
    found = cells()
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in found)
    needs = [NEEDS_A_CARD in tags(cell) for cell in found]
    assert needs == sorted(needs)
    assert '"-m", "compiled_fa", "report"' in "".join(next(c for c in found if NEEDS_A_CARD in tags(c))["source"])
