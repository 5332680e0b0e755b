"""tools.tune: numbers and rules found by timing, and what becomes of noise. The clock is a test's own."""

import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tuned import retune

from bench import cases
from bench.timing import Timing
from compiled_fa import tuning
from compiled_fa.tuning import AT_EVERY_CALL, AT_NO_CALL, Rule, Sizes, cpu, files
from tools import tune
from tools.rule_fit import Timed, fit, mean_regret, regrets
from tools.tuning_search import ENOUGH, Measured, Pick, number_of, settle_all, settled_rule, told


class Clock:
    """Time that passes by what is run, and by nothing else. noise: of the logarithm of seconds."""

    def __init__(self, monkeypatch, noise=0.0):
        self.now, self._noise, self._drawn = 0.0, noise, random.Random(0)
        monkeypatch.setattr("bench.timing.time", self)
        monkeypatch.setattr("tools.tuning_search.time", self)

    def perf_counter(self):
        return self.now

    def takes(self, seconds):
        def run():
            self.now += seconds * math.exp(self._drawn.gauss(0.0, self._noise))

        return run


def test_noise_is_told_and_changes_nothing(monkeypatch):
    clock = Clock(monkeypatch, noise=1.0)
    found = Pick("tiled.tile", "tiles", (256, 512), lambda: clock.takes(1e-3)).settle(cpu.PLAIN, 0.2)
    assert (found.settled, found.old, found.new) == (False, 512, 512)
    assert "kept, the machine was too noisy: " in str(found)
    assert re.search(r"with a spread of \d+%", str(found))


@pytest.mark.parametrize(("seconds", "number"), [
    ({256: 1.2, 512: 1.0, 1024: 0.9}, 1024),
    ({256: 0.8, 512: 1.0, 1024: 0.9}, 256),
    ({256: 0.99, 512: 1.0, 1024: 1.1}, 512),  # too little to leave the table's
])  # fmt: skip
def test_the_fastest_value_is_picked(monkeypatch, seconds, number):
    clock = Clock(monkeypatch, noise=0.02)
    pick = Pick(
        "tiled.tile", "both", (256, 512, 1024), lambda: lambda: clock.takes(seconds[tuning.current().tiled.tile])()
    )
    found = pick.settle(cpu.PLAIN, 1e9)
    assert found.settled
    assert (found.old, found.new) == (512, number)


def test_widening_is_picked_as_a_bool(monkeypatch):
    clock = Clock(monkeypatch)
    pick = Pick("sdpa_cpu.widens_bf16", "bf16", (0, 1),
                lambda: lambda: clock.takes(1.0 if tuning.current().sdpa_cpu.widens_bf16 else 8.0)())  # fmt: skip
    table, (found,) = settle_all([pick], cpu.PLAIN, 1e9, lambda found: None)
    assert found.new == 1
    assert table.sdpa_cpu.widens_bf16 is True


def test_numbers_are_settled_one_after_another_until_time_is_over(monkeypatch):
    clock = Clock(monkeypatch)
    in_force: list[int] = []
    told: list[Any] = []

    def by_banded_tile():
        in_force.append(tuning.current().tiled.tile)
        clock.takes(1.0 / tuning.current().tiled.banded_tile)()

    picks = [
        Pick("tiled.tile", "tiles", (512, 1024), lambda: lambda: clock.takes(1.0 / tuning.current().tiled.tile)()),
        Pick("tiled.banded_tile", "causal", (128, 256), lambda: by_banded_tile),
        Pick("tiled.tile", "tiles", (512, 1024), lambda: clock.takes(1e9)),
        Pick("tiled.score_bytes_a_core", "tiles", (1, 2), lambda: clock.takes(1.0)),
    ]
    table, found = settle_all(picks, cpu.PLAIN, 100.0, told.append)
    assert [result.settled for result in found] == [True, True, True, False]
    assert str(found[-1]) == "tiled.score_bytes_a_core 1048576: kept, no time was left for it"
    assert told == found
    assert set(in_force) == {1024}
    assert table == replace(cpu.PLAIN, tiled=replace(cpu.PLAIN.tiled, tile=1024))


# ---------------------------------------------------------------------------------------------------------------- rules


def drawn_sizes(count, seed=0):
    drawn = random.Random(seed)
    lengths = [1, 5, 40, 300, 2000]
    for _ in range(count):
        keys, heads = drawn.choice(lengths), drawn.choice([1, 2, 8, 32])
        yield Sizes(
            keys, keys, drawn.choice([1, 4, 16]), heads, 1, drawn.choice([32, 64, 128]), drawn.random() < 0.5, False
        )


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_planted_rule_is_found(noise):
    """Work per head against a fixed cost: from more than so many products on, tiles."""
    drawn = random.Random(1)
    planted = Rule(9.0, keys=-1.0, batch=-0.5, heads=-0.5, causal=0.7)
    features = [sizes.features() for sizes in drawn_sizes(300)]
    calls = [Timed(x, 0.3 * planted.value(x) + drawn.gauss(0.0, noise)) for x in features]
    rule = fit(calls)
    assert mean_regret(rule, calls) <= mean_regret(planted, calls) + 0.02
    others = [sizes.features() for sizes in drawn_sizes(300, seed=2)]
    alike = [rule.favours(x) == planted.favours(x) for x in others if abs(planted.value(x)) > 1.0]
    assert sum(alike) > 0.95 * len(alike)
    assert rule.head_dim == pytest.approx(0.0, abs=0.3)


def test_calls_that_tell_apart_count_more_than_those_that_do_not():
    """Ten calls at which one way is a little faster, and two at which it takes twice as long: by their keys alone."""
    few, many = (Sizes(keys, keys, 1, 1, 1, 64, False, False).features() for keys in (100, 200))
    rule = fit([*[Timed(few, -0.05)] * 10, *[Timed(few, 0.7)] * 2, *[Timed(many, -0.5)] * 3])
    assert not rule.favours(few)
    assert rule.favours(many)


def test_where_one_way_is_always_the_faster():
    x = Sizes(9, 9, 1, 1, 1, 64, False, False).features()
    assert fit([Timed(x, -0.1)] * 30) == AT_EVERY_CALL
    assert fit([Timed(x, 0.1)] * 30) == AT_NO_CALL
    assert regrets(AT_EVERY_CALL, [Timed(x, -0.1), Timed(x, math.log(2.0))]) == pytest.approx([1.0, 2.0])


def test_a_rule_is_taken_where_it_loses_less():
    name, x = "sdpa_cpu.tiles_forward", Sizes(9, 9, 1, 1, 1, 64, False, False).features()
    found = settled_rule(name, cpu.PLAIN, Measured({name: [Timed(x, -0.3)] * 30}))
    assert (found.settled, found.old, found.new) == (True, AT_NO_CALL, AT_EVERY_CALL)
    assert "30 calls: mean regret 1.350 as it was, 1.000 fitted" in str(found)
    found = settled_rule(name, cpu.PLAIN, Measured({name: [Timed(x, -0.01)] * 30}))
    assert (found.settled, found.new) == (True, AT_NO_CALL)
    found = settled_rule(name, cpu.PLAIN, Measured({name: [Timed(x, -0.3)] * 3}, noisy=7))
    assert (found.settled, found.new) == (False, AT_NO_CALL)
    assert "3 calls are too few to fit it, 7 calls of all were too noisy" in str(found)


def test_rules_are_measured_by_the_engines_they_choose_between(monkeypatch, compiled_steps):
    """Of calls of every kind: what is timed is what the engines' own questions name."""
    retune(monkeypatch, split_kv={"decode_from_elements": 1, "short_from_elements": 1})
    measured = Measured()
    dense = cases.Case(((20, 20),), dense=True, head_dim=8)
    decoding = cases.Case(((1, 70),) * 2, dense=True, head_dim=8)
    packed = cases.Case.packed((5, 9, 3), nheads_k=1)

    def run_once(runs, *options):
        for run in runs.values():
            run()
        return {name: Timing(1e-3, 0.0, 1) for name in runs}, {}

    monkeypatch.setattr(tune, "compared", run_once)
    tune.measure(dense, "forward+backward", measured, 0.01)
    tune.measure(decoding, "forward", measured, 0.01)
    tune.measure(packed, "forward", measured, 0.01)
    assert {name: len(calls) for name, calls in measured.calls.items()} == {
        "sdpa_cpu.tiles_forward": 1,  # no rule gives few queries to tiles
        "sdpa_cpu.tiles_backward": 1,
        "split_kv.decode_beside_tiles": 1,
        "split_kv.decode_beside_sdpa": 1,
        "split_kv.short_beside_tiles": 1,
        "split_kv.short_beside_sdpa": 1,
    }
    assert set(measured.calls) | {"sdpa_cpu.tiles_forward_bf16"} <= set(tune.rules(cpu.PLAIN))


def test_time_is_for_rules_that_have_few_calls(monkeypatch):
    case = cases.Case(((20, 20),), dense=True, head_dim=8)
    x = Sizes(9, 9, 1, 1, 1, 64, False, False).features()
    measured = Measured({"sdpa_cpu.tiles_forward": [Timed(x, 0.1)] * ENOUGH})
    clock = Clock(monkeypatch)
    monkeypatch.setattr(tune, "_by_engines", lambda inputs, way, names: {name: clock.takes(1e-3) for name in names})
    tune.measure(case, "forward+backward", measured, 0.2)
    assert {name: len(calls) for name, calls in measured.calls.items()} == {
        "sdpa_cpu.tiles_forward": ENOUGH,
        "sdpa_cpu.tiles_backward": 1,
    }


def test_what_is_too_noisy_is_counted_and_not_used(monkeypatch):
    clock, measured = Clock(monkeypatch, noise=1.0), Measured()
    monkeypatch.setattr(tune, "_by_engines", lambda inputs, way, names: {name: clock.takes(1e-3) for name in names})
    tune.measure(cases.Case(((20, 20),), dense=True, head_dim=8), "forward", measured, 0.2)
    assert (measured.calls, measured.noisy) == ({}, 1)


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_a_file_that_is_read(monkeypatch, tmp_path, capsys, unread):
    clock, path, name = Clock(monkeypatch), tmp_path / "mine.json", "sdpa_cpu.tiles_forward"
    before = tuning.current()
    x = Sizes(9, 9, 1, 1, 1, 64, False, False).features()
    pick = Pick("tiled.tile", "tiles", (512, 1024), lambda: lambda: clock.takes(1.0 / tuning.current().tiled.tile)())
    monkeypatch.setattr(tune, "eager_reason", lambda: None)
    monkeypatch.setattr(tune, "picks", lambda table: [pick])
    monkeypatch.setattr(tune, "measure_calls", lambda seconds, tell: Measured({name: [Timed(x, -0.3)] * 30}))
    assert tune.main(["--output", str(path)]) == 0
    printed = capsys.readouterr().out
    table = files.load(path)
    assert (table.tiled.tile, table.sdpa_cpu.tiles_forward) == (1024, AT_EVERY_CALL)
    assert printed.count("tiled.tile 512 -> 1024") == 2
    assert printed.count(f"{name} {told(before.sdpa_cpu.tiles_forward)} -> (constant -1)") == 2
    place = f"{tune.here()}: tiles_forward; the rest: {before.sdpa_cpu.measured_on}"
    assert table.sdpa_cpu.measured_on == place
    assert table.split_kv == before.split_kv
    monkeypatch.setattr(tuning, "_current", None)
    monkeypatch.setenv("COMPILED_FA_TUNING", str(path))
    assert tuning.current() == table
    assert torch.__version__ in tuning.described()


def test_the_command_writes_nothing_where_nothing_was_measured(monkeypatch, tmp_path, capsys):
    path = tmp_path / "mine.json"
    assert tune.main(["--output", str(path)]) == 1  # steps are not compiled in tests
    assert "do not run compiled" in capsys.readouterr().out
    monkeypatch.setattr(tune, "eager_reason", lambda: None)
    clock = Clock(monkeypatch, noise=1.0)
    monkeypatch.setattr(
        tune, "picks", lambda table: [Pick("tiled.tile", "tiles", (256, 512), lambda: clock.takes(1.0))]
    )
    monkeypatch.setattr(tune, "measure_calls", lambda seconds, tell: Measured(noisy=40))
    assert tune.main(["--output", str(path), "--minutes", "0.01"]) == 1
    assert "nothing was measured" in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.parametrize("table", [cpu.AMX, cpu.PLAIN], ids=lambda table: table.name)
def test_numbers_are_timed_with_calls_that_engines_serve(monkeypatch, table):
    monkeypatch.setattr(tuning, "_current", table)
    monkeypatch.setattr(tune, "LENGTH", 48)
    picks = tune.picks(table)
    names = [pick.name for pick in picks]
    assert len(set(names)) == len(names)
    assert ("tiled.bf16_tile_queries" in names) == (table is cpu.AMX)
    for pick in picks:
        number_of(table, pick.name)
        pick.run()()
