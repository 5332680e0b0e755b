"""The sm_75 kernels themselves, on a newer GPU whose driver translates their PTX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_turing_code_agrees_with_float64(tmp_path):
    if torch.cuda.get_device_capability() < (7, 5):
        pytest.skip("this GPU is older than Turing")
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    script = Path(__file__).with_name("turing_code.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("within budget") == 20
