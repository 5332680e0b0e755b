"""Tables of tuned numbers: which is in force, what each leaves to whom, and files of one's own."""

import json
import platform
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from support import Case, check_against_float64, make, run_op
from tuned import retune

from compiled_fa import config, tuning
from compiled_fa.engines import select
from compiled_fa.engines.sdpa_cpu import kernel
from compiled_fa.tuning import AT_EVERY_CALL, classes, cpu, files
from compiled_fa.tuning.gpu_tiles import GPU


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
        (lambda table: table.update(version=0), "must be of version 4, got version 0"),
        (lambda table: table.pop("version"), "must be of version 4, got version None"),
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


def test_another_table_for_a_while():
    before, seen = tuning.current(), []

    def fails():
        seen.append(tuning.current())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), tuning.using(tuning.changed(tiled={"tile": 64})):
        fails()
    assert seen == [replace(before, tiled=replace(before.tiled, tile=64))]
    assert tuning.current() is before
