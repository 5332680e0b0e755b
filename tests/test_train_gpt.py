"""tools/train_gpt.py: GPTs that differ in their attention alone learn alike, and one that is wrong is noticed."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools import train_gpt
from tools.byte_gpt import ATTENTIONS, Attention

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"--layers": 1, "--width": 32, "--block-size": 32, "--learning-rate": 0.003}
TINY = ["--text", str(ROOT / "LICENSE"), *(str(word) for option in SIZES.items() for word in option)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as people call it, on a tiny model, in a process of its own."""
    command = [sys.executable, "-m", "tools.train_gpt", *TINY, *arguments]
    environment = {**os.environ, "COMPILED_FA_COMPILE": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, encoding="utf-8")


def losses(output: str) -> dict[str, tuple[float, float]]:
    """attention -> first and last loss, out of the printed table."""
    rows = re.findall(r"^(\w+) +(\d\.\d{6}) +(\d\.\d{6}) ", output, re.MULTILINE)
    return {name: (float(first), float(last)) for name, first, last in rows}


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """The model is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_learned_alike(result: subprocess.CompletedProcess[str], *attentions: str) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    of_attention = losses(result.stdout)
    assert tuple(of_attention) == attentions
    firsts, lasts = zip(*of_attention.values(), strict=True)
    assert max(firsts) - min(firsts) < 1e-5
    assert max(lasts) - min(lasts) < 1e-4
    assert firsts[0] == pytest.approx(math.log(256), abs=0.2)  # untrained: every byte as likely as any other
    assert lasts[0] < firsts[0] - 1


def test_all_attentions_learn_alike_with_rotary_positions_and_gqa() -> None:
    options = "--no-compile --positions rotary --kv-heads 2 --steps 40 --prompt def --sample 60 --temperature 0"
    result = run(*options.split())
    check_learned_alike(result, "compiled_fa", "sdpa", "naive")
    assert "greatest difference between curves" in result.stdout
    _, sampled = result.stdout.split("trained with compiled_fa:\n\n")
    assert sampled.startswith("def")
    assert len(sampled.encode()) >= len("def") + 60
    assert "\r" not in result.stderr  # no progress bar where nobody watches


def test_compiled_whole() -> None:
    result = run("--attention", "naive,compiled_fa", "--steps", "30", "--sample", "0")
    check_learned_alike(result, "naive", "compiled_fa")


def scaled_by_three_percent_more(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(1.03 * q, k, v, is_causal=True).transpose(1, 2)


def sees_one_key_ahead(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("wrong", [scaled_by_three_percent_more, sees_one_key_ahead])
def test_a_wrong_attention_is_noticed(monkeypatch: pytest.MonkeyPatch, wrong: Attention) -> None:
    monkeypatch.setitem(ATTENTIONS, "wrong", wrong)
    options = ["--no-compile", "--sample", "0", "--positions", "rotary"]
    assert train_gpt.main([*TINY, *options, "--attention", "naive,sdpa"]) == 0
    assert train_gpt.main([*TINY, *options, "--attention", "naive,wrong"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "99999999"], "needs at least 100000000: give a longer --text"),
        (["--text", "no such file"], "cannot read --text"),
        (["--attention", "sdpa,flash"], "got 'flash'"),
        (["--kv-heads", "3"], "a multiple of --kv-heads"),
        (["--steps", "0"], "at least 1, got 0"),
    ],
)
def test_wrong_options_are_explained(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main([*TINY, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_one_thread")
def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "losses.png"
    train_gpt.main([*TINY, "--no-compile", "--steps", "3", "--attention", "naive,sdpa", "--plot", str(file)])
    assert file.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        train_gpt.main([*TINY, "--plot", "losses.png"])
    assert "compiled-fa[plots]" in capsys.readouterr().err
