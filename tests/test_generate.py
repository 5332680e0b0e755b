"""tools/generate.py: every cache writes what the model writes without one, and a cache that is wrong is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from compiled_fa import flash_attn_with_kvcache
from tools import generate
from tools.byte_gpt import GPT, Shape, attend_compiled_fa, load, sample, save
from tools.train_gpt import main as train

LENGTH = 40


def model(positions: str = "rotary", kv_heads: int = 2) -> GPT:
    """Untrained, with weights large enough for a text that is no repetition."""
    found = GPT(Shape(2, 32, 4, kv_heads, 64, positions), attend_compiled_fa)
    found.initialise(torch.Generator().manual_seed(3))
    for parameter in found.parameters():
        parameter.data *= 6.0
    return found.eval()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_cache_writes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], positions: str, temperature: str
) -> None:
    file, expected = tmp_path / "gpt.pt", model(positions)
    save(expected, file)
    options = ["--length", str(LENGTH), "--page-size", "7", "--temperature", temperature, "--prompt", "def é"]
    assert generate.main([str(file), *options]) == 0
    text, _, table = capsys.readouterr().out.rpartition("\n\ncache ")
    written = sample(expected, "def é".encode(), LENGTH, float(temperature), 0)
    assert len(set(written)) > 5
    assert text == written
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(generate.WAYS)


def test_compiled_steps_are_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's and one for every byte after it, and they write the same."""
    count = torch._dynamo.testing.CompileCounter()
    compile_it = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, fullgraph: compile_it(function, backend=count, fullgraph=fullgraph)
    )
    options = generate.Options(12, 0.0, 0, 16, True)
    found = [bytes(generate.generate(model(), b"abc", way, options)) for way in ("dense", "paged")]
    assert count.frame_count == 2 * 2
    plain = generate.Options(12, 0.0, 0, 16, False)
    assert set(found) == {bytes(generate.generate(model(), b"abc", "none", plain))}


def test_a_wrong_cache_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model(), tmp_path / "gpt.pt")
    monkeypatch.setattr(
        "tools.generate.flash_attn_with_kvcache",
        lambda *a, causal, **k: flash_attn_with_kvcache(*a, **{**k, "window_size": (2, 0)}),
    )
    assert generate.main([str(tmp_path / "gpt.pt"), "--cache", "none,paged"]) == 1
    assert "the texts differ" in capsys.readouterr().out


def test_what_train_gpt_saves_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "gpt.pt"
    sizes = "--layers 1 --width 16 --heads 2 --block-size 32 --steps 2 --no-compile --sample 0 --positions rotary"
    assert train([*sizes.split(), "--attention", "naive", "--save", str(file)]) == 0
    assert load(file, attend_compiled_fa).shape == Shape(1, 16, 2, 2, 32, "rotary")
    assert generate.main([str(file)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "dense,none,slow"], "got 'slow'"),
        (["--length", "99"], "4 and 99 bytes, must be at least 1 each, and together at most"),
        (["--page-size", "0"], "at least 1, got 0"),
        (["--prompt", ""], "0 and 64 bytes"),
    ],
)
def test_wrong_options_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    save(model(), tmp_path / "gpt.pt")
    with pytest.raises(SystemExit):
        generate.main([str(tmp_path / "gpt.pt"), *options])
    assert message in capsys.readouterr().err


def test_another_file_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.pt"
    torch.save({"weights": {}}, file)
    with pytest.raises(SystemExit):
        generate.main([str(file)])
    assert "is no model that tools.train_gpt saved" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([str(tmp_path / "nothing.pt")])
    assert "No such file" in capsys.readouterr().err
