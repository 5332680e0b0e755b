"""tools/memory_model.py: hand-computed bytes, how they grow, and the tiled engine's own scratch."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiled_fa.engines import tiled
from compiled_fa.engines.tiled.scratch import Scratch
from compiled_fa.problem import Problem
from tools import attention_memory as model
from tools import memory_model as tool
from tools.attention_memory import Config, kept, longest, moved

MIB = 1 << 20
IMPLEMENTATIONS = ("naive", "tiled")
DIRECTIONS = st.sampled_from(["forward", "training"])
CONFIGS = st.builds(
    lambda batch, seqlen_q, seqlen_k, nheads_k, heads_per_key, head_dim, dtype, causal: Config(
        batch, seqlen_q, seqlen_k, nheads_k * heads_per_key, nheads_k, head_dim, dtype, causal
    ),
    st.integers(1, 8),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([8, 64, 128]),
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.booleans(),
)
QUICKLY = settings(max_examples=50)


def total(sizes: dict[str, int]) -> int:
    return sum(sizes.values())


def without_scratch(sizes: dict[str, int]) -> int:
    return total(sizes) - sizes.get("scratch", 0)


def test_192_mib_against_1128():
    """Batch 32, seqlen 512, 16 heads of 64, fp16, one forward pass, in MiB as a CUDA allocator shows them.

    A tensor like q has 32, the scores 256. 1128 are q, k, v, the fp16 scores, the fp32 softmax and its fp16 copy, which
    is the model's, and the 8 of cuBLAS's workspace, which is not. 192 are q, k, v and the output twice, in fp32 as it
    is summed up and in fp16. Ours has it once, and lse, and the scratch of its engine.
    """
    config = Config(32, 512, 512, 16, 16, 64, "float16")
    naive, ours = kept(config, "forward", "naive"), kept(config, "forward", "tiled")
    cublas_workspace = 8 * MIB
    assert total(naive) + cublas_workspace == 1128 * MIB
    assert ours["q"] + ours["k"] + ours["v"] + 2 * ours["out"] + ours["out"] == 192 * MIB
    assert without_scratch(ours) == (128 + 1) * MIB
    assert total(ours) < 192 * MIB


def test_training_by_hand():
    """One head of 4 x 4 scores, head_dim 2, fp16: tensors like q have 16 bytes, S = 16."""
    config = Config(1, 4, 4, 1, 1, 2, "float16")
    naive = kept(config, "training", "naive")
    assert total(naive) == 6 * 16 + 16 * (4 + 4 + 2)  # q k v out dout dv; fp32 p, fp32 dp, fp16 ds
    assert without_scratch(kept(config, "training", "tiled")) == 8 * 16 + 4 * 4  # ... and dq dk, lse
    assert config.flops("forward") == 2 * 2 * 4 * 4 * 2


def test_grouped_heads_and_unequal_lengths_by_hand():
    config = Config(1, 3, 5, 4, 2, 8, "float32", causal=True)
    ours = kept(config, "forward", "tiled")
    assert (ours["q"], ours["k"], ours["v"], ours["out"], ours["lse"]) == (384, 320, 320, 384, 48)
    assert config.useful_scores == 4 * (3 + 4 + 5)
    assert Config(1, 5, 3, 1, 1, causal=True).useful_scores == 1 + 2 + 3


def test_traffic_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Tiles of 2 queries and 2 keys, 4 x 4 scores of one head of 8, in fp16, loaded as it lies."""
    monkeypatch.setitem(model.ENGINES, "fused", lambda config, direction: model.Tiling(2, 2, 1, 2, {}))
    row, side = 8 * 2, 4 * 8 * 2  # bytes of a row, of q
    dense = Config(1, 4, 4, 1, 1, 8, "float16")
    forward = 2 * side + 4 * 4 + 2 * (4 + 4) * row  # q, out, lse; k and v for each of two tiles of queries
    assert total(moved(dense, "forward", "fused")) == forward
    causal = Config(1, 4, 4, 1, 1, 8, "float16", causal=True)
    assert total(moved(causal, "forward", "fused")) == forward - 2 * 2 * row
    # delta; k, v, dk, dv; q and dout, lse and delta, and dq in and out for each of two tiles of keys; dq at the end
    backward = (2 * side + 16) + 4 * side + 8 * (2 * row + 8) + 8 * 2 * 8 * 4 + side
    assert total(moved(dense, "training", "fused")) == forward + backward
    assert kept(dense, "forward", "fused")["scratch"] == 0


@given(CONFIGS, DIRECTIONS)
@QUICKLY
def test_ours_is_linear_and_naive_has_a_quadratic_part(config, direction):
    longer = Config(**{**vars(config), "seqlen_q": 2 * config.seqlen_q, "seqlen_k": 2 * config.seqlen_k})
    ours, ours_longer = (kept(c, direction, "tiled") for c in (config, longer))
    assert without_scratch(ours_longer) == 2 * without_scratch(ours)
    naive, naive_longer = (kept(c, direction, "naive") for c in (config, longer))
    for name, size in naive.items():
        quadratic = name.startswith(("scores", "probabilities", "dscores", "dprobabilities"))
        assert naive_longer[name] == (4 if quadratic else 2) * size


@given(CONFIGS, DIRECTIONS, st.sampled_from(["batch", "seqlen_q", "seqlen_k"]), st.integers(1, 500))
@QUICKLY
def test_more_takes_and_moves_more(config, direction, field, more):
    larger = Config(**{**vars(config), field: getattr(config, field) + more})
    for implementation in IMPLEMENTATIONS:
        assert without_scratch(kept(larger, direction, implementation)) >= without_scratch(
            kept(config, direction, implementation)
        )
    assert total(moved(larger, direction, "naive")) > total(moved(config, direction, "naive"))
    for implementation in IMPLEMENTATIONS:
        training = total(moved(config, "training", implementation))
        assert training > total(moved(config, "forward", implementation)) > 0
        assert kept(config, "training", implementation).keys() > {"q", "k", "v"}


@given(CONFIGS, DIRECTIONS, st.sampled_from(IMPLEMENTATIONS), st.integers(1 << 20, 1 << 31))
@QUICKLY
def test_the_longest_sequence_fits_and_the_next_does_not(config, direction, implementation, memory):
    found = longest(config, direction, implementation, memory)
    assert found % 64 == 0
    if found:
        assert total(kept(config.at(found), direction, implementation)) <= memory
    assert total(kept(config.at(found + 64), direction, implementation)) > memory


@pytest.mark.parametrize(
    "config",
    [
        Config(1, 300, 300, 2, 2, 16, "float32"),
        Config(1, 700, 700, 2, 2, 16, "float32"),
        Config(3, 700, 1300, 4, 2, 8, "bfloat16"),
        Config(2, 900, 900, 6, 2, 8, "float16", causal=True),
    ],
    ids=str,
)
def test_scratch_is_what_the_engine_takes(monkeypatch: pytest.MonkeyPatch, config: Config):
    taken: dict[str, int] = {}
    take = Scratch.take

    def recorded(self: Scratch, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        buffer = take(self, name, shape, dtype)
        taken[name] = max(taken.get(name, 0), buffer.numel() * buffer.itemsize)
        return buffer

    monkeypatch.setattr(Scratch, "take", recorded)
    dtype = getattr(torch, config.dtype)
    q = torch.randn(config.batch, config.seqlen_q, config.nheads, config.head_dim).to(dtype)
    k = torch.randn(config.batch, config.seqlen_k, config.nheads_k, config.head_dim).to(dtype)
    problem = Problem.of(q, k, k, None, causal=config.causal)
    out, lse = tiled.forward(problem)
    assert model.tiled(config, "forward").scratch == taken
    taken.clear()
    tiled.backward(problem, out, out, lse)
    assert model.tiled(config, "training").scratch == taken


@pytest.fixture
def quick_measurement(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    small = Config(4, 1024, 1024, dtype="float32", causal=True)
    monkeypatch.setattr(tool, "MEASURED", (("tiled", "forward", small),))
    return tool


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process: Linux only")
def test_measure_compares_and_fails_where_the_model_is_off(quick_measurement, monkeypatch, capsys):
    monkeypatch.setattr(tool, "measured_peak", lambda *_: (1000 * MIB, ""))
    assert quick_measurement.main(["--measure"]) == 1
    assert "MORE THAN 10% OFF" in capsys.readouterr().out
    monkeypatch.undo()
    peak, complaint = tool.measured_peak("naive", "forward", Config(1, 1536, 1536, dtype="float32"))
    expected = kept(Config(1, 1536, 1536, dtype="float32"), "forward", "naive")
    assert not complaint
    assert expected["scores"] + expected["probabilities"] == pytest.approx(peak, rel=0.1)


def test_command_prints_tables_and_json(capsys):
    assert tool.main(["--seqlen", "512", "--nheads-k", "2", "--card", "rtx2080ti"]) == 0
    printed = capsys.readouterr().out
    assert "longest sequence on RTX 2080 Ti" in printed
    assert "tiled, forward, tiles of" in printed
    assert tool.main(["--json", "--direction", "training", "--memory", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["naive"]["longest_seqlen"] < found["tiled"]["longest_seqlen"]
    assert found["tiled"]["flop_per_byte"] > found["naive"]["flop_per_byte"]
    with pytest.raises(SystemExit):
        tool.main(["--nheads-k", "3"])
    assert "multiple of --nheads-k 3" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    assert "within 10%; Linux" in " ".join(capsys.readouterr().out.split())


def test_plot_writes_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    assert tool.main(["--plot", str(tmp_path / "memory.png")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"memory.png", "memory.svg"}
