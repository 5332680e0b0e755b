"""tools/loss_curves.py: records of a trainer, by a trainer of a few lines in the place of examples'."""

from __future__ import annotations

import json

import pytest

from tools import loss_curves


@pytest.fixture
def trainer(monkeypatch):
    """An example whose last loss depends on the attention. -> its losses, to be changed."""
    last = {"eager": 3.0, "compiled_fa": 3.001}

    def losses(attention, steps, stage=1):
        return [5.0 + stage] * (steps - 1) + [last[attention]]

    monkeypatch.setattr("runpy.run_path", lambda path: {"losses": losses})
    return last


def test_a_file_for_each_trainer(trainer, tmp_path, capsys):
    assert loss_curves.main(["--steps", "3", "--output", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {f"training_{name}" for name in loss_curves.TRAINERS}
    assert "from eager's 1.0e-03 nats" in capsys.readouterr().out
    lines = (tmp_path / "training_deepspeed_zero.jsonl").read_text().splitlines()
    command, eager, ours = map(json.loads, lines)
    assert command["command"].startswith("python -m tools.loss_curves --steps 3")
    assert (eager["peer"], ours["peer"]) == ("naive", "ours")
    assert ours["losses"] == [8.0, 8.0, 3.001]  # ZeRO-3


def test_losses_that_part_are_told_of(trainer, tmp_path):
    trainer["compiled_fa"] = 3.5
    assert loss_curves.main(["gpt2_trainer", "--steps", "2", "--output", str(tmp_path)]) == 1
    assert [path.stem for path in tmp_path.iterdir()] == ["training_gpt2_trainer"]


def test_unknown_trainers_are_refused(capsys):
    with pytest.raises(SystemExit):
        loss_curves.main(["nobody"])
    assert "there are gpt2_trainer, deepspeed_zero, megatron_gpt" in capsys.readouterr().err
