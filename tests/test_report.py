"""python -m compiled_fa."""

import json
import os
import subprocess
import sys

import pytest

from compiled_fa.check import report
from compiled_fa.testing import budget

# `python -m compiled_fa` where hypothesis, which only tests install, is missing.
WITHOUT_HYPOTHESIS = (
    "import runpy, sys; sys.modules['hypothesis'] = None; runpy.run_module('compiled_fa', run_name='__main__')"
)


def test_command_prints_json_and_progress():
    command = [sys.executable, "-c", WITHOUT_HYPOTHESIS, "--json", "--case", "GQA", "--case", "varlen"]
    command += ["--engine", "tiled"]
    environment = {**os.environ, "COMPILED_FA_COMPILE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert [case["case"] for case in found["cases"]] == ["GQA", "varlen"]
    assert found["environment"]["engine"] == "tiled (asked for by name)"
    for case in found["cases"]:
        assert set(case["errors"]) == {"out", "lse", "dq", "dk", "dv"}
        assert all(0 < error["ours"] <= error["budget"] for error in case["errors"].values())
        assert {"ours", "naive", "sdpa"} <= set(case["seconds"])
        assert case["engines"] == {"forward": "tiled", "backward": "tiled"}
    assert "[1/2] GQA" in done.stderr
    assert "[2/2] varlen" in done.stderr


def test_tables_and_status_1_out_of_budget(monkeypatch, capsys):
    monkeypatch.setattr(budget, "FACTOR", 0.0)
    monkeypatch.setattr(budget, "floor", lambda *_: 0.0)
    assert report.main(["--case", "softcap"]) == 1
    out = capsys.readouterr().out
    assert "OUT OF BUDGET" in out
    assert all(label in out for label in ("Python", "torch", "Triton", "C++ compiler", "device", "engine"))
    assert "split_kv, then sdpa_cpu, then tiled (not fused: it needs a CUDA device, and this is cpu;" in out
    assert out.splitlines()[-3].endswith("tiled, tiled")


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        report.main(["--case", "nonsense"])
    assert "dense causal" in capsys.readouterr().err
