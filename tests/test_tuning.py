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

from bench.cases import Inputs
from compiled_fa import config, tuning
from compiled_fa.engines import select
from compiled_fa.engines.sdpa_cpu import kernel
from compiled_fa.tuning import classes, cpu, files
from tools import tune
from tools.tuning_search import Pick, Rim, Step, ratio_of, settle_all, value_of


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
    for name in ("avx2", "avx512_bf16", "amx"):
        monkeypatch.setattr(tuning, "_current", cpu.TABLES[name])
        options: tuple[dict[str, Any], ...] = ({}, {"causal": True}, bf16, {"causal": True, **bf16})
        found[name] = [served(lengths, True, direction, **some) for some in options]
    sdpa, tiled = "sdpa_cpu", "tiled"
    if direction == "forward":
        assert found == {"avx2": [sdpa] * 4, "avx512_bf16": [sdpa, sdpa, tiled, tiled], "amx": [sdpa] * 4}
    else:
        assert found == {
            "avx2": [sdpa] * 4,
            "avx512_bf16": [sdpa, tiled, tiled, tiled],
            "amx": [sdpa, sdpa, tiled, sdpa],
        }


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
    forward = kernel._forward

    def recorded(q, *rest, **options):
        seen.append(q.dtype)
        return forward(q, *rest, **options)

    monkeypatch.setattr(kernel, "_forward", recorded)
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
        (lambda table: table.update(version=0), "must be of version 1, got version 0"),
        (lambda table: table.pop("version"), "must be of version 1, got version None"),
        (lambda table: table.pop("tiled"), "must be a table with tiled, got none"),
        (lambda table: table.update(gpu={}), "must be a table without other fields, got gpu"),
        (lambda table: table.update(name=7), "must be a string as name, got 7"),
        (lambda table: table.update(split_kv=[]), r"must be an object as split_kv, got \[\]"),
        (without("sdpa_cpu", "few_queries"), "must be a table with sdpa_cpu.few_queries, got none"),
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
        assert {field.type for field in fields(form)} <= {"int", "bool", "str | None"}


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

    def crossing_at(self, rim):
        """Tiles, which take longer to begin with, and a kernel: as fast as each other at this size."""
        return lambda size: (self.takes(1e-3 * (1.0 + size / rim)), self.takes(1e-3 * (0.5 + 1.5 * size / rim)))


SIZES = (64, 128, 256, 512, 1024, 2048)
FIELD = "sdpa_cpu.backward_tiles_from_queries"


@pytest.mark.parametrize("rim", [100, 300, 700, 1500])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_planted_crossing_is_found(monkeypatch, rim, noise):
    found = Rim(FIELD, "tiles", SIZES, Clock(monkeypatch, noise).crossing_at(rim)).settle(cpu.PLAIN, 1e3)
    assert found.settled
    assert found.old == tuning.NEVER
    assert rim / 1.1 < found.new < rim * 1.1
    assert f"{FIELD} never -> {found.new}   tiles 64 " in str(found)


def test_a_ratio_has_what_was_planted_and_ends_when_it_is_known(monkeypatch):
    clock = Clock(monkeypatch, noise=0.05)
    ratio = ratio_of(clock.takes(3e-3), clock.takes(2e-3), 60.0)
    assert ratio.low < 1.5 < ratio.high
    assert ratio.spread < 0.05
    assert clock.now < 1.0


@pytest.mark.parametrize(("slower", "in_table", "number"), [
    (2.0, 512, tuning.NEVER),  # never faster
    (0.5, tuning.NEVER, 64),  # from the smallest on that was measured
    (0.5, 0, 0),  # which is what the table says
    (1.01, 300, 300),  # as fast as each other: what the table says
])  # fmt: skip
def test_where_there_is_no_crossing(monkeypatch, slower, in_table, number):
    clock = Clock(monkeypatch)
    rim = Rim(FIELD, "tiles", SIZES, lambda size: (clock.takes(slower * size), clock.takes(size)))
    table = replace(cpu.PLAIN, sdpa_cpu=replace(cpu.PLAIN.sdpa_cpu, backward_tiles_from_queries=in_table))
    found = rim.settle(table, 1e9)
    assert found.settled
    assert (found.old, found.new) == (in_table, number)


def test_a_size_that_is_out_of_order_moves_no_rim(monkeypatch):
    """The rim is where all that was measured loses least."""
    clock = Clock(monkeypatch)
    ratios = {64: 1.3, 128: 0.97, 256: 1.2, 512: 0.9, 1024: 1.05, 2048: 0.7}
    rim = Rim(FIELD, "tiles", SIZES, lambda size: (clock.takes(ratios[size]), clock.takes(1.0)), halvings=0)
    assert 256 < rim.settle(cpu.PLAIN, 1e9).new < 512


@pytest.mark.parametrize(("last", "number"), [(0, 0), (4, 4), (16, 16)])
def test_a_way_that_serves_up_to_a_size(monkeypatch, last, number):
    clock = Clock(monkeypatch)
    few = Rim("sdpa_cpu.few_queries", "tiles", (1, 2, 4, 8, 16),
              lambda size: (clock.takes(0.8 if size <= last else 1.2), clock.takes(1.0)), up_to=True)  # fmt: skip
    table = replace(cpu.PLAIN, sdpa_cpu=replace(cpu.PLAIN.sdpa_cpu, few_queries=3))
    assert few.settle(table, 1e9).new == number


def test_noise_is_told_and_changes_nothing(monkeypatch):
    clock = Clock(monkeypatch, noise=1.0)
    rim = Rim(FIELD, "tiles", SIZES, clock.crossing_at(300))
    pick = Pick("tiled.tile", "tiles", (256, 512), lambda: clock.takes(1e-3))
    for step, old in ((rim, tuning.NEVER), (pick, 512)):
        found = step.settle(cpu.PLAIN, 0.2)
        assert (found.settled, found.old, found.new) == (False, old, old)
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

    def pair(size):
        in_force.append(tuning.current().tiled.tile)
        return clock.takes(1e-3), clock.takes(2e-3)

    steps: list[Step] = [
        Pick("tiled.tile", "tiles", (512, 1024), lambda: lambda: clock.takes(1.0 / tuning.current().tiled.tile)()),
        Rim(FIELD, "tiles", SIZES, pair),
        Pick("tiled.tile", "tiles", (512, 1024), lambda: clock.takes(1e9)),
        Rim("sdpa_cpu.bf16_tiles_from_keys", "tiles", SIZES, pair),
    ]
    table, found = settle_all(steps, cpu.PLAIN, 100.0, told.append)
    assert [result.settled for result in found] == [True, True, True, False]
    assert str(found[-1]) == "sdpa_cpu.bf16_tiles_from_keys never: kept, no time was left for it"
    assert told == found
    assert set(in_force) == {1024}
    assert table == replace(
        cpu.PLAIN,
        tiled=replace(cpu.PLAIN.tiled, tile=1024),
        sdpa_cpu=replace(cpu.PLAIN.sdpa_cpu, backward_tiles_from_queries=64),
    )


def test_the_command_writes_a_file_that_is_read(monkeypatch, tmp_path, capsys, unread):
    clock, path = Clock(monkeypatch), tmp_path / "mine.json"
    before = tuning.current()
    monkeypatch.setattr(tune, "eager_reason", lambda: None)
    monkeypatch.setattr(tune, "steps", lambda table: [Rim(FIELD, "tiles", SIZES, clock.crossing_at(300))])
    assert tune.main(["--output", str(path)]) == 0
    printed = capsys.readouterr().out
    table = files.load(path)
    assert 270 < table.sdpa_cpu.backward_tiles_from_queries < 330
    change = f"{FIELD} never -> {table.sdpa_cpu.backward_tiles_from_queries}"
    assert printed.count(change) == 2
    assert f"{change}   tiles 64 " in printed
    assert "1 of 1 numbers changed" in printed
    place = f"{tune.here()}: backward_tiles_from_queries; the rest: {before.sdpa_cpu.measured_on}"
    assert table.sdpa_cpu.measured_on == place
    assert (table.tiled, table.split_kv) == (before.tiled, before.split_kv)
    monkeypatch.setattr(tuning, "_current", None)
    monkeypatch.setenv("COMPILED_FA_TUNING", str(path))
    assert tuning.current() == table
    assert torch.__version__ in tuning.described()


def test_the_command_writes_nothing_where_nothing_was_measured(monkeypatch, tmp_path, capsys):
    path = tmp_path / "mine.json"
    assert tune.main(["--output", str(path)]) == 1  # steps are not compiled in tests
    assert "do not run compiled" in capsys.readouterr().out
    monkeypatch.setattr(tune, "eager_reason", lambda: None)
    noisy = Rim(FIELD, "tiles", SIZES, Clock(monkeypatch, noise=1.0).crossing_at(300))
    monkeypatch.setattr(tune, "steps", lambda table: [noisy])
    assert tune.main(["--output", str(path), "--minutes", "0.01"]) == 1
    assert "nothing was measured" in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.parametrize("table", [cpu.AMX, cpu.PLAIN], ids=lambda table: table.name)
def test_what_the_command_times_are_calls_that_engines_serve(monkeypatch, table):
    monkeypatch.setattr(tuning, "_current", table)
    monkeypatch.setattr(tune, "LENGTH", 48)
    steps = tune.steps(table)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    chosen_by = {f"sdpa_cpu.{field.name}" for field in fields(tuning.SdpaCpu) if "_tiles_from_" in field.name}
    assert chosen_by | {"sdpa_cpu.widens_bf16", "split_kv.decode_from_elements_beside_sdpa"} <= set(names)
    assert ("tiled.bf16_tile_queries" in names) == (table is cpu.AMX)
    for step in steps:
        value_of(table, step.name)
        for run in step.pair(step.sizes[0]) if isinstance(step, Rim) else [step.run()]:
            run()


@pytest.mark.parametrize("elements", [1 << 14, 99_999, 370_728, 1 << 20])
def test_calls_have_as_many_elements_as_the_size_says(elements):
    """So that the rim that is found is of what the field counts."""
    cache, packed = (Inputs.of(case(elements, torch.float32)) for case in (tune._cache, tune._packed))
    assert cache.k.numel() == pytest.approx(elements, rel=0.02)
    assert packed.q.numel() == pytest.approx(elements, rel=0.02)
    assert cache.case.max_seqlen_k < cpu.PLAIN.split_kv.decode_long_keys
    assert packed.case.max_seqlen_k <= cpu.PLAIN.split_kv.short_keys


def test_another_table_for_a_while():
    before, seen = tuning.current(), []

    def fails():
        seen.append(tuning.current())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), tuning.using(tuning.changed(tiled={"tile": 64})):
        fails()
    assert seen == [replace(before, tiled=replace(before.tiled, tile=64))]
    assert tuning.current() is before
