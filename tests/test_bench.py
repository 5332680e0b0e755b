"""python -m bench: its cases are right, a peer that is wrong is noticed and not timed, records and figures."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from bench import __main__ as command
from bench import choice, first_use, models, peers, plot, processes, records, serve, table, timing
from bench.cases import Case, Direction, Inputs
from bench.latency import latency_records
from bench.peers import Peer
from bench.race import _with_its_own, prepare, race
from bench.suites import BOTH, RACES, Entry, memory
from bench.themes import THEMES
from bench.timing import Ratio, Timing
from compiled_fa import engines, flash_attn_func
from compiled_fa.engines import select, tiled
from compiled_fa.testing.naive import naive_attention

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
COMPILERS = ("flex",)  # peers that take seconds to compile; one case of theirs is tested by itself


def run(case: Case, direction: Direction = "forward", names: tuple[str, ...] = ("ours",)) -> dict[str, Any]:
    return {outcome.peer: outcome for outcome in race(case, direction, names, CPU, rounds=1)}


@pytest.mark.parametrize("name", RACES)
def test_every_peer_computes_every_quick_case(name):
    for entry in RACES[name](True):
        if entry.case.compiled:
            continue  # below
        for direction in entry.directions:
            chosen = tuple(peer for peer in entry.peers if peer not in COMPILERS)
            outcomes = run(entry.case, direction, chosen)
            assert outcomes["ours"].status == "timed", outcomes["ours"]
            for outcome in outcomes.values():
                assert outcome.status in ("timed", "refused"), (entry.case.label, outcome)
                assert outcome.status == "timed" or outcome.reason


@pytest.mark.parametrize("layer", [False, True])
def test_compiled_case(layer):
    outcomes = run(Case.uniform(33, compiled=True, layer=layer), "forward+backward", ("ours", "SDPA", "naive"))
    assert {outcome.status for outcome in outcomes.values()} == {"timed"}, outcomes


def test_flex_with_mask_and_scores():
    case = Case.packed([7, 30, 12], nheads_k=1, heads_per_key=2, head_dim=16, causal=True, softcap=3.0)
    outcomes = run(case, names=("ours", "flex"))
    assert outcomes["flex"].status == "timed", outcomes["flex"]


@pytest.mark.parametrize("name", RACES)
def test_full_suites_name_each_case_once_and_known_peers(name):
    entries = RACES[name](False)
    labels = [entry.case.label for entry in entries]
    assert len(set(labels)) == len(labels)
    assert len(entries) >= len(RACES[name](True))
    for entry in entries:
        assert set(entry.peers) <= set(peers.PEERS)
        assert entry.peers[0] == "ours"
        assert Case.from_json(json.loads(json.dumps(entry.case.to_json()))) == entry.case


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        (lambda q, k, v: 1.001 * torch.nn.functional.scaled_dot_product_attention(q, k, v), "mismatch"),
        (lambda q, k, v: torch.full_like(q, torch.nan), "mismatch"),
        (lambda q, k, v: q @ v[..., :1, :], "unable"),
    ],
    ids=["0.1 % too large", "nan", "raises"],
)
def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch, capsys, wrong, status):
    def attend(q, k, v):
        return wrong(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    planted = Peer(lambda *_: None, lambda inputs: peers.base.dense(inputs, attend))
    monkeypatch.setitem(peers.PEERS, "SDPA", planted)
    outcome = run(Case.uniform(64), names=("ours", "SDPA"))["SDPA"]
    assert outcome.status == status
    assert outcome.timing is None
    assert outcome.reason
    code = command.main(["dense", "--quick", "--match", "N64 H8 D64 fp32", "--peers", "SDPA", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == (1 if status == "mismatch" else 0)
    assert ("WRONG" if status == "mismatch" else "fails") in printed
    assert f"{status}: SDPA, " in printed


def test_wrong_gradients_alone_are_noticed(monkeypatch):
    def attend(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k.detach(), v)))
        return out.transpose(1, 2) + 0.0 * k

    monkeypatch.setitem(peers.PEERS, "SDPA", Peer(lambda *_: None, lambda inputs: peers.base.dense(inputs, attend)))
    assert run(Case.uniform(64), "forward", ("SDPA",))["SDPA"].status == "timed"
    outcome = run(Case.uniform(64), "forward+backward", ("SDPA",))["SDPA"]
    assert outcome.status == "mismatch"
    assert outcome.reason.startswith("dk")


@pytest.mark.parametrize("causal", [False, True])
def test_a_case_too_large_for_float64_is_sampled_by_its_last_rows(monkeypatch, causal):
    monkeypatch.setattr("bench.parity.LARGEST_SAMPLE", 1)
    case = Case.uniform(200, nheads_k=1, heads_per_key=2, causal=causal)
    for direction in BOTH:
        assert run(case, direction, ("ours", "SDPA"))["SDPA"].status == "timed"


@pytest.mark.parametrize(
    "case",
    [
        Case.uniform(9),
        Case.uniform(9, causal=True),
        Case.uniform(20, window_size=(3, 0)),
        Case.uniform(20, window_size=(3, 5), nheads_k=4, heads_per_key=2),
        Case(((5, 9), (0, 3), (9, 5)), causal=True),
        Case(((1, 40),) * 3, dense=True, causal=True),
    ],
    ids=lambda case: case.label,
)
def test_useful_scores_are_those_that_the_mask_leaves(case):
    inputs = Inputs.of(case, CPU)
    seen = 0
    for seqlen_q, seqlen_k in case.lengths:
        mask = inputs.visible(seqlen_q, seqlen_k)
        seen += seqlen_q * seqlen_k if mask is None else int(mask.sum())
    assert case.useful_scores == case.nheads * seen


def test_the_naive_peer_is_naive_attention():
    """With every feature that a case may have; the reference of parity is the other one of them."""
    case = Case.uniform(
        40, 2, nheads_k=2, heads_per_key=2, window_size=(9, 2), softcap=2.0, slopes="paper", dtype=torch.float64
    )
    inputs = Inputs.of(case, CPU)
    q, k, v = (inputs.batched(x) for x in (inputs.q, inputs.k, inputs.v))
    expected, _ = naive_attention(q, k, v, window_size=(9, 2), softcap=2.0, alibi_slopes=inputs.alibi_slopes)
    torch.testing.assert_close(peers.PEERS["naive"].prepare(inputs).attend(q, k, v), expected)


def test_median_and_interquartile_range():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 0.0, 1)


def test_ratios_are_of_rounds_and_their_spread_is_of_the_median():
    assert Ratio.of([1.0, 3.0, 2.0]) == Ratio(2.0, 1.0, 3.0, 3)
    found = Ratio.of([1.0 + number / 100 for number in range(100)])
    assert (found.low, found.high) == pytest.approx((1.40, 1.59))  # of a hundred, the 41st and the 60th
    assert found.spread == pytest.approx(0.19 / 1.495)


def test_compared_leaves_out_who_has_no_chance(monkeypatch):
    now = [0.0]
    called: Counter[str] = Counter()

    def takes(name, seconds):
        def run():
            called[name] += 1
            now[0] += seconds

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    runs = {name: takes(name, seconds) for name, seconds in (("auto", 2.0), ("slow", 8.0), ("fast", 1.0))}
    timings, ratios = timing.compared(runs, CPU, 1e9, spread=0.0, rounds=30, hopeless=0.5)
    assert {name: ratio.median for name, ratio in ratios.items()} == {"slow": 0.25, "fast": 2.0}
    assert {name: timing.median for name, timing in timings.items()} == {"auto": 2.0, "slow": 8.0, "fast": 1.0}
    assert called["slow"] < called["auto"] == called["fast"] == 30 + timing.WARMUP
    called.clear()
    timing.compared(runs, CPU, 1e9, spread=0.01)  # exact from the first round on
    assert called["slow"] == timing.LEAST_COMPARED + timing.WARMUP
    called.clear()
    timing.compared(runs, CPU, 100.0, spread=0.0)
    assert called["slow"] == 10 + timing.WARMUP  # of 11 seconds each


def test_command_writes_records_that_can_be_read(tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    arguments = ["dense", "scale", "--quick", "--match", "N64 ", "--peers", "SDPA,naive", "--rounds", "2"]
    assert command.main([*arguments, "--output", str(file)]) == 0
    printed = capsys.readouterr()
    assert "/ SDPA" in printed.out
    assert printed.err == ""  # no progress bar without a terminal
    first = json.loads(file.read_text().splitlines()[0])
    assert first == {"command": f"python -m bench {' '.join(arguments[:4])} 'N64 ' {' '.join(arguments[5:])}"
                     f" --output {file}"}  # fmt: skip
    found = records.read([file])
    assert {record["suite"] for record in found} == {"dense", "scale"}
    assert {record["peer"] for record in found} == {"ours", "SDPA", "naive"}
    for record in found:
        identity = ("commit", "torch", "triton", "python", "machine", "threads", "time", "case", "shape", "dtype")
        assert set(identity) <= set(record)
        assert record["status"] == "timed"
        assert record["median_s"] > 0
        assert record["iqr_s"] >= 0
        assert record["rounds"] == 2
        assert record["tflops"] > 0


def test_serve_of_every_server(capsys, tmp_path):
    file = tmp_path / "records.jsonl"
    assert command.main(["serve", "--quick", "--output", str(file)]) == 0
    assert "/ SDPA padded" in capsys.readouterr().out
    found = records.read([file])
    assert {record["peer"] for record in found} == set(serve.SERVERS)
    assert all(record["tokens_per_s"] > 0 for record in found)


def roads() -> list[Any]:
    """Each road of each layer that this machine has, in two dtypes."""
    found = []
    for layer, (make, needed) in models.LAYERS.items():
        if needed is None or find_spec(needed) is not None:
            names = make(True, torch.float32, CPU).roads
            found += [(layer, name, dtype) for name in names for dtype in (torch.float32, torch.bfloat16)]
    return found


def test_models_by_every_road_are_right(monkeypatch):
    for layer, name, dtype in roads():
        assert models.complaint(models.LAYERS[layer][0], name, dtype, CPU) is None, (layer, name, dtype)
    monkeypatch.setitem(models.ATTENDS, "ours", lambda q, k, v: flash_attn_func(1.5 * q, k, v))
    complaint = models.complaint(models.vit, "ours", torch.float32, CPU)
    assert complaint is not None
    assert complaint.startswith("its output is off by")


def test_models_of_every_road(capsys, tmp_path, monkeypatch):
    """A road that is wrong is told of, and not timed."""
    file = tmp_path / "records.jsonl"
    assert command.main(["models", "--quick", "--rounds", "1", "--output", str(file)]) == 0
    assert "/ ours sdpa" in capsys.readouterr().out
    found = records.read([file])
    assert {record["peer"] for record in found} >= {"ours", "ours sdpa", "SDPA", "naive"}
    assert {record["case"].partition(" B")[0] for record in found} >= {"ViT block", "UNet attention block"}
    assert all(record["status"] == "timed" and record["median_s"] > 0 for record in found)

    monkeypatch.setitem(models.ATTENDS, "ours", lambda q, k, v: flash_attn_func(1.5 * q, k, v))
    assert command.main(["models", "--quick", "--rounds", "1", "--match", "ViT", "--output", str(file)]) == 1
    status = {record["peer"]: record["status"] for record in records.read([file])}
    assert status == {"ours": "mismatch", "ours sdpa": "timed", "SDPA": "timed", "naive": "timed"}
    assert "mismatch: ours, ViT block" in capsys.readouterr().out


def test_serve_frees_pages_and_uses_them_again():
    workload = serve.Workload.of(True, torch.float32)
    server = serve.Paged(workload, CPU)
    for _ in range(2):
        assert serve.serve(workload, server, serve.Tokens(workload, CPU)) > workload.requests[-1].arrival
        assert sorted(server._free) == list(range(len(server._free)))
    assert sum(request.tokens for request in workload.requests) > len(server._free) * workload.page_size


def test_a_wrong_server_is_noticed(monkeypatch, capsys):
    class Forgetful(serve.Paged):
        def prefill(self, row, q, k, v):
            return super().prefill(row, q, torch.zeros_like(k), v)

    monkeypatch.setitem(serve.SERVERS, "SDPA padded", Forgetful)
    assert command.main(["serve", "--quick"]) == 1
    assert "SDPA padded: WRONG request 0" in capsys.readouterr().out


# Random calls


def test_random_calls_are_the_same_again_bounded_and_of_all_kinds():
    found = choice.calls(choice.CALLS)
    assert choice.CALLS >= 200
    assert choice.calls(20) == found[:20]
    assert choice.calls(20, seed=1) != found[:20]
    for case, direction in found:
        assert case.score_elements * case.head_dim <= choice.MOST_PRODUCTS
        assert case.nheads_k * case.head_dim * sum(k for _, k in case.lengths) <= choice.MOST_KEYS
        assert direction == "forward" or not case.page_size
    for kind in (
        lambda case: case.dense and case.max_seqlen_q == case.max_seqlen_k > 1000,
        lambda case: case.dense and 16 < case.max_seqlen_q < case.max_seqlen_k,
        lambda case: case.dense and case.max_seqlen_q == 1 < case.max_seqlen_k,
        lambda case: case.max_seqlen_q <= 4 and case.max_seqlen_k > 10000,
        lambda case: case.varlen and len(set(case.lengths)) > 50,
        lambda case: case.page_size,
        lambda case: case.softcap,
        lambda case: case.window_size != (-1, -1),
        lambda case: case.causal and case.heads_per_key > 1,
        lambda case: case.head_dim == 16,
        lambda case: case.head_dim == 256,
        *(lambda case, dtype=dtype: case.dtype == dtype for dtype in choice.DTYPES),
    ):
        assert any(kind(case) for case, _ in found)


def chosen(regrets: dict[str, float], direction: Direction = "forward", **options: Any) -> choice.Found:
    """A call of 600 tokens of which engines took so much less time than auto."""
    case = Case.uniform(600, nheads_k=1, head_dim=16, **options)
    ways: list[Literal["forward", "backward"]] = ["forward"] if direction == "forward" else ["forward", "backward"]
    problem = Inputs.of(case).problem()
    routes = {way: select(problem, way).engine.name for way in ways}
    timings = {name: Timing(1.0 / ratio, 0.0, 9) for name, ratio in {"auto": 1.0, **regrets}.items()}
    ratios = {name: Ratio(ratio, ratio, ratio, 9) for name, ratio in regrets.items()}
    return choice.Found(case, direction, routes, timings, ratios)


def test_peers_apart_have_tensors_of_their_own():
    inputs = Inputs.of(Case(((1, 9),) * 2, dense=True, heads_per_key=2))
    for name, shares in (("ours", True), ("SDPA", True), ("ours cache", False)):
        prepared = prepare(name, inputs)
        apart = _with_its_own(prepared, inputs)
        _, k, v = apart.leaves
        for own, before, of_all in ((k, prepared.leaves[1], inputs.k), (v, prepared.leaves[2], inputs.v)):
            assert own.untyped_storage().data_ptr() != of_all.untyped_storage().data_ptr()
            assert (own is before) is not shares
            assert own.stride() == before.stride()
            assert torch.equal(own, before)


@pytest.mark.parametrize(("spread", "timed"), [(0.2, [2.0, 8.0]), (0.01, [2.0])])
def test_what_seems_to_lose_is_timed_again_where_there_is_noise(monkeypatch, spread, timed):
    given = []

    def compared(runs, device, seconds, least_spread, rounds=None, hopeless=0.0):
        given.append(seconds)
        regret = 1.5 if len(given) == 1 else 1.2
        ratio = Ratio(regret, regret, regret * (1 + spread), 9)
        return {name: Timing(1.0, 0.0, 9) for name in runs}, {name: ratio for name in runs if name != "auto"}

    monkeypatch.setattr(choice, "compared", compared)
    found = choice.measure(Case(((5, 5),), dense=True, head_dim=8), "forward", 2.0)
    assert given == timed
    assert found.regret == (1.2 if len(timed) == 2 else 1.5)


def test_regret_is_time_of_auto_over_that_of_the_fastest():
    found = chosen({"sdpa_cpu": 0.99, "tiled": 0.5})
    assert (found.auto, found.best, found.regret) == ("sdpa_cpu", "sdpa_cpu", 1.0)
    assert choice.deciding(found) == {}
    bf16 = chosen({"sdpa_cpu": 1.5, "tiled": 1.01}, dtype=torch.bfloat16)
    assert (bf16.auto, bf16.best, bf16.regret) == ("tiled", "sdpa_cpu", 1.5)
    assert choice.deciding(bf16) == {"sdpa_cpu.tiles_forward_bf16": pytest.approx(math.log(256 / 600))}
    pairs = {"sdpa_cpu+sdpa_cpu": 1.2, "sdpa_cpu+tiled": 1.0, "tiled+sdpa_cpu": 0.9}
    gradients = chosen(pairs, "forward+backward", causal=True)
    assert (gradients.auto, gradients.best) == ("sdpa_cpu+tiled", "sdpa_cpu+sdpa_cpu")
    assert choice.deciding(gradients) == {"sdpa_cpu.tiles_backward": pytest.approx(math.log(257 / 600))}
    few = replace(gradients, case=Case(((16, 600),), dense=True, nheads_k=2))
    assert (few.best, choice.deciding(few)) == ("sdpa_cpu+sdpa_cpu", {})  # no rule gives few queries to tiles
    longer = replace(chosen({"sdpa_cpu": 1.1, "split_kv": 1.0}), case=Case(((1, 9000),), dense=True, nheads_k=2))
    assert choice.deciding(replace(longer, routes={"forward": "split_kv"})).keys() == {"split_kv.decode_beside_sdpa"}
    record = choice.record_of(gradients)
    assert record["status"] == "chosen"
    assert record["regret"] == 1.2
    assert record["engines"]["sdpa_cpu+tiled"] == {
        "median_s": 1.0, "iqr_s": 0.0, "auto_over_it": 1.0, "spread": 0.0, "rounds": 9
    }  # fmt: skip
    lines = choice.told([choice.record_of(one) for one in (found, found, bf16, gradients)], worst=2)
    assert lines[1:4] == [
        "  median            1.100  target 1.02: MISSED",
        "  95th percentile   1.500  target 1.10: MISSED",
        "  worst             1.500  target 1.30: MISSED",
    ]
    told = [
        f"  1.50 (spread 0%)  {bf16.case.label}, forward: auto took tiled, fastest sdpa_cpu",
        "        decided by: sdpa_cpu.tiles_forward_bf16 -0.85",
        f"  1.20 (spread 0%)  {gradients.case.label}, forward+backward: auto took sdpa_cpu+tiled, "
        "fastest sdpa_cpu+sdpa_cpu",
        "        decided by: sdpa_cpu.tiles_backward -0.85",
    ]
    assert lines[5:] == told


def test_percentiles():
    values = [float(number) for number in range(100, 0, -1)]
    assert [choice.percentile(values, part) for part in (0.0, 0.5, 0.95, 1.0)] == [1.0, 50.0, 95.0, 100.0]
    assert choice.summary([1.0] * 3 + [2.0]) == {"median": 1.0, "95th percentile": 2.0, "worst": 2.0}


def test_every_pair_of_engines_that_could_serve_is_asked():
    problem = Inputs.of(Case(((1, 300),), dense=True, nheads_k=1)).problem()
    assert choice.able(problem, "forward") == [("split_kv",), ("sdpa_cpu",), ("tiled",)]
    pairs = choice.able(problem, "forward+backward")
    assert pairs == [(f, b) for f in ("split_kv", "sdpa_cpu", "tiled") for b in ("sdpa_cpu", "tiled")]
    problem = Inputs.of(Case.uniform(40, softcap=3.0, nheads_k=1)).problem()
    assert choice.able(problem, "forward+backward") == [("tiled", "tiled")]


def test_directions_run_by_the_engines_that_are_named(monkeypatch):
    seen = []

    def recorded(problem, direction, name="auto"):
        route = select(problem, direction, name)
        seen.append((direction, route.engine.name))
        return route

    monkeypatch.setattr(engines, "select", recorded)
    monkeypatch.setattr(engines, "prepared", lambda *call: None)
    chosen: list[tuple[Direction, tuple[str, ...]]] = [
        ("forward", ("tiled",)),
        ("forward+backward", ("sdpa_cpu", "tiled")),
    ]
    for direction, names in chosen:
        seen.clear()
        choice.computing(Inputs.of(Case.uniform(20, nheads_k=1)), direction)(names)
        assert seen == list(zip(("forward", "backward"), names, strict=False))


def test_choice_is_measured_and_recorded(monkeypatch, tmp_path, capsys):
    cases = [
        (Case.uniform(40, nheads_k=2, causal=True), "forward+backward"),
        (Case.packed([3, 20, 9], nheads_k=2), "forward"),
        (Case(((1, 300), (1, 200)), nheads_k=2, page_size=16), "forward"),
    ]
    drawn = []

    def calls(count, seed):
        drawn.append((count, seed))
        return cases

    monkeypatch.setattr(choice, "calls", calls)
    file = tmp_path / "choice.jsonl"
    assert command.main(["choice", "--quick", "--device", "cpu", "--output", str(file)]) == 0
    assert drawn == [(3, 0)]
    printed = capsys.readouterr().out
    assert "regret = time of auto / time of the fastest, 3 calls" in printed
    found = records.read([file])
    assert [record["case"] for record in found] == [case.label for case, _ in cases]
    for record in found:
        assert {"commit", "machine", "cpu", "class", "threads", "time", "decided_by"} <= record.keys()
        assert (record["suite"], record["status"]) == ("choice", "chosen")
        others = {name: times["auto_over_it"] for name, times in record["engines"].items() if name != "auto"}
        assert record["auto"] in others
        assert record["regret"] == max(1.0, *others.values())
        assert record["regret"] == 1.0 or others[record["best"]] == record["regret"]


def test_a_wrong_engine_is_told_and_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(choice, "calls", lambda count, seed: [(Case.uniform(40, nheads_k=2), "forward")])
    forward = tiled.forward
    monkeypatch.setattr(tiled, "forward", lambda problem: (1.001 * forward(problem)[0], forward(problem)[1]))
    assert command.main(["choice", "--quick", "--device", "cpu"]) == 1
    assert "WRONG tiled: out is off by" in capsys.readouterr().out


def test_unknown_suites_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "memory, compile" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a CPU process: Linux only")
def test_peak_memory_of_a_process_of_its_own():
    case = replace(memory(True)[0].case, causal=False)
    assert processes.peak_memory(replace(case, dense=False), "forward", "naive", CPU)["status"] == "refused"
    found = processes.peak_memory(case, "forward", "naive", CPU)
    scores = case.score_elements * 4
    assert found["status"] == "timed", found
    assert found["results_bytes"] == 512 * 8 * 64 * 4
    assert 1.5 * scores < found["extra_bytes"] < 4 * scores  # scores and probabilities


def test_latency():
    """Every way to call is measured, or says why not."""
    entry = Entry(Case.uniform(9, dtype=torch.float16, causal=True), ("ours", "SDPA", "flex"), ("forward",))
    found = {(r["peer"], r["mode"]): r for r in latency_records([entry], CPU, seconds=0.1, quick=True)}
    assert len(found) == 9
    for (peer, mode), record in found.items():
        refused = mode == "CUDA graph" or (peer, mode) == ("flex", "eager")
        assert record["status"] == ("refused" if refused else "timed"), record
        assert (record.get("launches") is not None) == (mode == "eager" and not refused)
        assert refused or 0.0 < record["issued_us"] == record["finished_us"]
        assert record["peer"] in table.latency_row(record)


def test_first_use_in_a_new_process():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    called = [sys.executable, "-m", "bench.first_use", "ours"]
    done = subprocess.run(called, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    found = json.loads(done.stdout)
    assert found["total_s"] >= found["import_torch_s"] + found["first_call_s"] > 0
    with pytest.raises(SystemExit, match="peer must be"):
        first_use.main("nobody")


def synthetic() -> list[dict[str, Any]]:
    """Records as `python -m bench dense memory` would write them."""
    found = []
    identity = records.circumstances(CPU)
    for seqlen in (512, 1024, 2048):
        case = Case.uniform(seqlen, causal=True)
        for direction in BOTH:
            for peer, factor in (("ours", 1.0), ("naive", 6.0)):
                seconds = factor * case.flops(direction) / 2e11
                common = identity | records.described(case, direction) | {"peer": peer, "status": "timed"}
                speed = {"median_s": seconds, "iqr_s": seconds / 10, "rounds": 5, "tflops": 0.2 / factor}
                found.append(common | {"suite": "dense"} | speed)
                found.append(common | {"suite": "memory", "peak_bytes": seqlen * int(1000 * factor)})
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"command": "python -m bench"}, *lines]))
    return path


def texts(svg: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def test_plot_of_what_grows_with_the_length(tmp_path):
    pytest.importorskip("matplotlib")
    file, folder = write(tmp_path / "records.jsonl", synthetic()), tmp_path / "figures"
    arguments = [str(file), "--output", str(folder), "--png", "--quantity", "time", "tflops", "memory"]
    assert plot.main(arguments) == 0
    stems = [f"{name}_B1_H8_D64_{quantity}" for name, quantity in (("dense", "time"), ("dense", "tflops"))]
    stems.append("memory_B1_H8_D64_memory")
    names = {f"{stem}-{theme}{kind}" for stem in stems for theme in ("light", "dark") for kind in (".svg", ".png")}
    assert {path.name for path in folder.iterdir()} == names
    found = texts(folder / f"{stems[0]}-light.svg")
    expected = {
        "sequence length",
        "time (ms)",
        "ours, causal",
        "naive, causal",
        "forward + backward, fp32",
        "512",
        "2k",
    }
    assert expected <= set(found)
    assert "ours" not in found  # all cases are causal


def test_plot_of_ratios(tmp_path):
    """Numbers beside the dots are ours / peer, in the overview in the order of its lines."""
    pytest.importorskip("matplotlib")
    packed = [5, 7]
    cases = [
        ("dense", Case.uniform(2048, causal=True), "SDPA", 0.25),
        ("short", Case.uniform(64, compiled=True), "SDPA", 1.75),
        ("short", Case.uniform(64), "SDPA", 1.5),
        ("varlen", Case.packed(packed), "SDPA loop", 0.125),
        ("variants", Case.uniform(96, softcap=30.0), "naive", 0.375),
        ("decode", Case(((1, 1024),), dense=True, nheads_k=4, heads_per_key=4), "SDPA", 2.25),
    ]
    lines = []
    for suite, case, peer, ratio in cases:
        direction: Direction = "forward+backward" if suite == "dense" else "forward"
        common = records.circumstances(CPU) | records.described(case, direction) | {"suite": suite, "status": "timed"}
        for name, seconds in (("ours", ratio), (peer, 1.0)):
            lines.append(common | {"peer": name, "median_s": seconds, "iqr_s": 0.0, "tflops": 1.0})
    refused = lines[0] | {"case": "B1 N64 H8 D64 bf16", "suite": "short", "peer": "SDPA", "status": "refused"}
    folder = tmp_path / "figures"
    assert plot.main([str(write(tmp_path / "records.jsonl", [*lines, refused])), "--output", str(folder)]) == 0
    figures = ("decode", "overview", "short", "variants", "varlen")
    assert {path.name for path in folder.iterdir()} == {f"{f}-{theme}.svg" for f in figures for theme in THEMES}
    overview = texts(folder / "overview-light.svg")
    places = [
        overview.index(label) for label in ("forward + backward", "dense, causal, 2,048 tokens", "64 tokens, eager")
    ]
    assert places == sorted(places)
    assert [text for text in overview if re.fullmatch(r"\d\.\d\d", text)][-4:] == ["0.25", "2.25", "1.75", "1.50"]
    assert "fp32" in overview
    assert {"0.12", "/ SDPA in a loop", "2 sequences of 5 to 7"} <= set(texts(folder / "varlen-dark.svg"))
    assert {"0.38", "/ naive attention", "softcap 30"} <= set(texts(folder / "variants-dark.svg"))


def test_plot_of_losses(tmp_path):
    pytest.importorskip("matplotlib")
    common = records.circumstances(CPU) | {"suite": "training", "case": "GPT-2, somebody's trainer", "trainer": "gpt2"}
    curves = {"naive": [5.0, 4.0, 3.0], "ours": [5.0, 4.0, 3.25]}
    lines = [common | {"peer": peer, "status": "trained", "losses": losses} for peer, losses in curves.items()]
    folder = tmp_path / "figures"
    assert plot.main([str(write(tmp_path / "records.jsonl", lines)), "--output", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {f"training_gpt2-{theme}.svg" for theme in THEMES}
    found = set(texts(folder / "training_gpt2-dark.svg"))
    assert {"eager attention", "compiled_fa", "step; the curves are at most 2.5e-01 apart"} <= found


def test_plots_are_the_same_again_and_differ_by_theme_in_colours_alone(tmp_path):
    pytest.importorskip("matplotlib")
    file = write(tmp_path / "records.jsonl", synthetic())
    first, second = tmp_path / "first", tmp_path / "second"
    assert [plot.main([str(file), "--output", str(folder)]) for folder in (first, second)] == [0, 0]
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [
        path.read_bytes() for path in sorted(second.iterdir())
    ]
    light, dark = (first / f"dense_B1_H8_D64_tflops-{theme}.svg" for theme in ("light", "dark"))
    assert texts(light) == texts(dark)
    assert THEMES["light"].text in light.read_text()
    assert THEMES["light"].text not in dark.read_text()


def test_plot_refuses_what_does_not_compare_and_says_when_there_is_nothing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines = synthetic()
    file = write(tmp_path / "mixed.jsonl", [*lines, lines[0] | {"machine": "another"}])
    with pytest.raises(SystemExit):
        plot.main([str(file), "--output", str(tmp_path / "figures")])
    assert "one machine at a time" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "missing.jsonl")])
    assert "no such file" in capsys.readouterr().err
    for few in ([], lines[:1]):
        assert plot.main([str(write(tmp_path / "few.jsonl", few)), "--output", str(tmp_path / "figures")]) == 1
        assert "nothing to draw" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()


def test_plot_without_matplotlib_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        plot.main([])
    assert "compiled-fa[plots]" in capsys.readouterr().err
