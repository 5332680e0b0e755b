"""Tables of tuned numbers: which is in force, what each leaves to whom, and files of one's own."""

import json
import math
import platform
import random
import re
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from support import Case, check_against_float64, make, run_op
from tuned import retune

from bench import cases
from bench.timing import Timing
from compiled_fa import config, tuning
from compiled_fa.engines import select
from compiled_fa.engines.sdpa_cpu import aten
from compiled_fa.tuning import AT_EVERY_CALL, AT_NO_CALL, Rule, Sizes, classes, cpu, files
from compiled_fa.tuning.gpu_tiles import GPU
from tools import tune
from tools.rule_fit import Timed, fit, mean_regret, regrets
from tools.tuning_search import ENOUGH, Measured, Pick, number_of, settle_all, settled_rule, told


@pytest.fixture
def unread(monkeypatch):
    """As in a process that has not read its table yet."""
    monkeypatch.setattr(tuning, "_current", None)


def served(lengths, dense=True, direction="forward", **options):
    return select(make(Case(lengths, dense, **options)).problem(), direction).engine.name


def test_the_classes_have_tables_and_names():
    assert tuple(cpu.TABLES) == config.CPU_CLASSES
    assert all(name == table.name for name, table in cpu.TABLES.items())


@pytest.mark.parametrize(
    ("machine", "capability", "answers", "name"),
    [
        ("x86_64", "AVX512", ("_is_amx_tile_supported", "_is_avx512_bf16_supported"), "amx"),
        ("x86_64", "AVX512", ("_is_avx512_bf16_supported",), "avx512_bf16"),
        ("x86_64", "AVX512", ("_is_avx512_bf16_supported", "avx512_vp2intersect"), "zen5"),
        ("x86_64", "AVX512", (), "avx512"),
        ("x86_64", "AVX512", ("_is_amx_tile_supported",), "avx512"),
        ("x86_64", "AVX2", ("_is_avx512_bf16_supported",), "avx2"),  # kept to it by ATEN_CPU_CAPABILITY
        ("x86_64", "DEFAULT", (), "plain"),
        ("aarch64", "SVE256", (), "arm"),
        ("arm64", "DEFAULT", (), "arm"),
        ("ppc64le", "VSX", (), "plain"),
    ],
)
def test_the_class_of_a_cpu(monkeypatch, machine, capability, answers, name):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda question=question: question in answers)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(answers, True))
    assert classes.cpu_class.__wrapped__() == name


def test_a_question_that_torch_does_not_know_is_answered_no(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert classes.cpu_class.__wrapped__() == "avx512"


def test_the_environment_chooses(monkeypatch, unread):
    for name, table in cpu.TABLES.items():
        monkeypatch.setattr(tuning, "_current", None)
        monkeypatch.setenv("COMPILED_FA_TUNING", name)
        assert tuning.current() is table
        assert name in tuning.described()
    monkeypatch.setattr(tuning, "_current", None)
    monkeypatch.setenv("COMPILED_FA_TUNING", "auto")
    assert tuning.current().name == classes.cpu_class()


def test_every_device_but_the_cpu_has_the_table_of_gpus(monkeypatch, unread):
    for device in ("cpu", "meta"):
        assert tuning.on(torch.device(device)) is tuning.current()
    for device in ("cuda", "xpu", "mps"):
        assert tuning.on(torch.device(device)) is GPU
    monkeypatch.setattr(tuning, "_current", None)
    monkeypatch.setenv("COMPILED_FA_TUNING", GPU.name)
    assert tuning.on(torch.device("cpu")) is GPU
    assert tuning.described().startswith("gpu, on a CPU of class ")
    assert all(table.tiled.memory_parts == 0 for table in cpu.TABLES.values())


def test_described_says_what_was_measured_where(monkeypatch):
    monkeypatch.setattr(tuning, "_current", cpu.AMX)
    found = tuning.described()
    assert found.startswith("amx")
    assert "sdpa_cpu: 2 cores of an Intel Xeon (Sapphire Rapids)" in found
    assert "tiled: not measured" in found


def test_importing_reads_no_table():
    """So that a program may set the variable after it; a wrong value is an error of the first call."""
    program = (
        "import os, torch, compiled_fa\n"
        "os.environ['COMPILED_FA_TUNING'] = 'zen9'\n"
        "try: compiled_fa.flash_attn_func(*[torch.randn(1, 4, 2, 8)] * 3)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "COMPILED_FA_TUNING must be one of ['auto', 'avx2'," in done.stdout
    assert "or a file that compiled_fa.tuning.files.save wrote, got 'zen9'" in done.stdout


# ------------------------------------------------------------------------------------------------ where nobody measured

PLAIN_CALLS = [
    (lengths, dense, options)
    for lengths, dense in [
        (((8, 8),) * 2, True),
        (((600, 600),), True),
        (((1, 5000),), True),
        (((4, 9000),), True),
        (((3000, 3000),), True),
        (((60, 60),) * 300, False),
        (((1, 5000), (1, 3000)), False),
        (((700, 700), (20, 90)), False),
    ]
    for options in ({}, {"causal": True}, {"heads_per_key": 4}, {"dtype": torch.bfloat16}, {"dtype": torch.float16})
]


@pytest.mark.parametrize("name", ["plain", "arm", "avx512"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pytorchs_kernel_serves_all_that_it_can(compiled_steps, monkeypatch, name, direction):
    monkeypatch.setattr(tuning, "_current", cpu.TABLES[name])
    assert all(getattr(cpu.TABLES[name], part).measured_on is None for part in files.PARTS)
    for lengths, dense, options in PLAIN_CALLS:
        assert served(lengths, dense, direction, **options) == "sdpa_cpu", (lengths, options)
    others: list[dict[str, Any]] = [{"softcap": 2.0}, {"window_size": (5, 0)}, {"slopes": "heads"}, {"dropout_p": 0.1}]
    for options in others:
        assert served(((600, 600),), True, direction, **options) == "tiled"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_a_table_leaves_to_tiles(monkeypatch, direction):
    bf16 = {"dtype": torch.bfloat16}
    lengths = ((600, 600),)
    found = {}
    for name in ("avx2", "zen5", "amx"):
        monkeypatch.setattr(tuning, "_current", cpu.TABLES[name])
        options: tuple[dict[str, Any], ...] = ({}, {"causal": True}, bf16, {"causal": True, **bf16})
        found[name] = [served(lengths, True, direction, **some) for some in options]
    sdpa, tiled = "sdpa_cpu", "tiled"
    if direction == "forward":
        assert found == {"avx2": [sdpa] * 4, "zen5": [sdpa, sdpa, tiled, tiled], "amx": [sdpa] * 4}
    else:
        assert found == {
            "avx2": [sdpa] * 4,
            "zen5": [sdpa, tiled, tiled, tiled],
            "amx": [sdpa, sdpa, tiled, tiled],
        }


def test_bf16_has_a_rule_for_every_kind_of_call(monkeypatch):
    bf16 = {"dtype": torch.bfloat16}
    kinds: dict[str, dict[str, Any]] = {
        "": bf16,
        "_causal": {"causal": True, **bf16},
        "_gqa": {"heads_per_key": 4, **bf16},
        "_gqa_causal": {"causal": True, "heads_per_key": 4, **bf16},
    }
    for direction in ("forward", "backward"):
        for kind in kinds:
            asked = f"tiles_{direction}_bf16{kind if direction == 'forward' else kind.removesuffix('_causal')}"
            monkeypatch.setattr(tuning, "_current", cpu.PLAIN)
            retune(monkeypatch, sdpa_cpu={asked: AT_EVERY_CALL})
            tiled = {other for other in kinds if served(((99, 99),), True, direction, **kinds[other]) == "tiled"}
            same = {kind, kind.removesuffix("_causal"), f"{kind.removesuffix('_causal')}_causal"}
            assert tiled == ({kind} if direction == "forward" else same)
            assert served(((16, 99),), True, direction, **kinds[kind]) == "sdpa_cpu"  # few queries


@pytest.mark.parametrize("name", cpu.TABLES)
def test_results_are_right_under_every_table(monkeypatch, name):
    monkeypatch.setattr(tuning, "_current", cpu.TABLES[name])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for lengths, dense in (
            (((70, 70),) * 2, True),
            (((1, 90), (1, 70)), False),
            (((9, 9), (0, 4), (130, 150)), False),
        ):
            for options in ({}, {"causal": True}, {"window_size": (20, 3), "softcap": 4.0}):
                data = make(Case(lengths, dense, heads_per_key=2, dtype=dtype, **options))
                check_against_float64(data, run_op(data))


@pytest.mark.parametrize(("widened", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_bf16_is_widened_where_a_table_says_so(monkeypatch, widened, dtype):
    """There it is computed as fp16 is: in fp32, by pieces, so that memory stays linear."""
    retune(monkeypatch, sdpa_cpu={"widens_bf16": widened})
    data, seen = make(Case(((40, 40),) * 2, True, heads_per_key=2, dtype=torch.bfloat16)), []
    forward = aten._forward

    def recorded(q, *rest, **options):
        seen.append(q.dtype)
        return forward(q, *rest, **options)

    monkeypatch.setattr(aten, "_forward", recorded)
    check_against_float64(data, run_op(data, "sdpa_cpu"))
    assert set(seen) == {dtype}


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", cpu.TABLES)
def test_files_hold_tables(tmp_path, monkeypatch, unread, name):
    path = tmp_path / "mine.json"
    table = replace(cpu.TABLES[name], name="mine")
    files.save(table, path)
    assert files.load(path) == table
    monkeypatch.setenv("COMPILED_FA_TUNING", str(path))
    assert tuning.current() == table


def without(part, field):
    return lambda table: table[part].pop(field)


def changed(part, field, value):
    return lambda table: table[part].update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(version=0), "must be of version 3, got version 0"),
        (lambda table: table.pop("version"), "must be of version 3, got version None"),
        (lambda table: table.pop("tiled"), "must be a table with tiled, got none"),
        (lambda table: table.update(gpu={}), "must be a table without other fields, got gpu"),
        (lambda table: table.update(name=7), "must be a string as name, got 7"),
        (lambda table: table.update(split_kv=[]), r"must be an object as split_kv, got \[\]"),
        (without("sdpa_cpu", "tiles_forward"), "must be a table with sdpa_cpu.tiles_forward, got none"),
        (changed("sdpa_cpu", "tiles_forward", 3), "must be an object as sdpa_cpu.tiles_forward, got 3"),
        (
            lambda table: table["sdpa_cpu"]["tiles_forward"].pop("keys"),
            "must be a table with sdpa_cpu.tiles_forward.keys, got none",
        ),
        (
            lambda table: table["sdpa_cpu"]["tiles_forward"].update(width=1.0),
            "must be a table without other fields, got sdpa_cpu.tiles_forward.width",
        ),
        (
            lambda table: table["split_kv"]["short_beside_sdpa"].update(keys="2"),
            "must be a finite number as split_kv.short_beside_sdpa.keys, got '2'",
        ),
        (
            lambda table: table["split_kv"]["short_beside_sdpa"].update(keys=float("nan")),
            "must be a finite number as split_kv.short_beside_sdpa.keys, got nan",
        ),
        (changed("tiled", "titles", 3), "must be a table without other fields, got tiled.titles"),
        (changed("tiled", "tile", "512"), "must be an integer of at least 0, or null, as tiled.tile, got '512'"),
        (changed("tiled", "tile", -1), "must be an integer of at least 0, or null, as tiled.tile, got -1"),
        (changed("tiled", "tile", 1.5), "must be an integer of at least 0, or null, as tiled.tile, got 1.5"),
        (changed("tiled", "tile", True), "must be an integer of at least 0, or null, as tiled.tile, got True"),
        (changed("sdpa_cpu", "widens_bf16", 1), "must be true or false as sdpa_cpu.widens_bf16, got 1"),
        (changed("split_kv", "measured_on", 5), "must be a string or null as split_kv.measured_on, got 5"),
    ],
)
def test_a_malformed_file_is_refused_by_field(tmp_path, change, message):
    path = tmp_path / "mine.json"
    files.save(cpu.PLAIN, path)
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"the tuning file .*mine.json {message}"):
        files.load(path)


def test_what_is_no_table(tmp_path):
    path = tmp_path / "mine.json"
    for text, message in (("{", "must be JSON, got "), ("[]", "must be an object, got list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            files.load(path)


def test_every_number_is_one_that_a_file_can_hold():
    for form in files.PARTS.values():
        assert {field.type for field in fields(form)} <= {"int", "bool", "str | None", "Rule"}


# ----------------------------------------------------------------------------------------------------------- tools.tune


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


def test_another_table_for_a_while():
    before, seen = tuning.current(), []

    def fails():
        seen.append(tuning.current())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), tuning.using(tuning.changed(tiled={"tile": 64})):
        fails()
    assert seen == [replace(before, tiled=replace(before.tiled, tile=64))]
    assert tuning.current() is before
