"""examples/: each runs as people run it and finds itself right, and notices an attention that is wrong."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# The function that each example is about.
FUNCTIONS = {
    "deepspeed_zero": "dense_attention",
    "gpt2_trainer": "varlen_attention",
    "megatron_gpt": "attention",
    "kernel_from_a_folder": "flash_attn_func",
    "leaving_xformers": "flash_attn_varlen_func",
    "packed_batch": "flash_attn_varlen_qkvpacked_func",
    "paged_decoding": "flash_attn_with_kvcache",
    "parallel_llama": "flash_attn_func",
    "ring_attention": "attention",
    "sdpa_block": "attention",
    "train_compiled": "flash_attn_func",
    "transformers_padded": "varlen_attention",
}
# What an example needs that is not installed with this package.
NEEDS = {
    "deepspeed_zero": "deepspeed",
    "gpt2_trainer": "accelerate",
    "megatron_gpt": "megatron",
    "transformers_padded": "transformers",
}

# The module that calls the function, where it is not the example itself.
CALLERS = {
    "deepspeed_zero": "compiled_fa.integrations.transformers",
    "gpt2_trainer": "compiled_fa.integrations.transformers",
    "megatron_gpt": "compiled_fa.integrations.megatron",
    "leaving_xformers": "compiled_fa.xformers_api.attention",
    "ring_attention": "compiled_fa.context_parallel",
    "sdpa_block": "compiled_fa.scaled_dot_product",
    "transformers_padded": "compiled_fa.integrations.transformers",
}


def test_every_example_is_known():
    assert [path.stem for path in EXAMPLES] == sorted(FUNCTIONS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_right(example):
    pytest.importorskip(NEEDS.get(example.stem, "torch"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("COMPILED_FA_COMPILE", None)  # as people have it; Inductor's cache on disk is shared
    done = subprocess.run(
        [sys.executable, example], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("right")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_notices_a_wrong_attention(example, monkeypatch, capsys):
    pytest.importorskip(NEEDS.get(example.stem, "torch"))
    name = FUNCTIONS[example.stem]
    caller = importlib.import_module(CALLERS.get(example.stem, "compiled_fa"))
    right = getattr(caller, name)

    def wrong(q: Any, *arguments: Any, **options: Any) -> Any:
        return right(1.03 * q, *arguments, **options)

    monkeypatch.setattr(caller, name, wrong)
    program = runpy.run_path(str(example))
    assert program["main"]() == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("WRONG")
