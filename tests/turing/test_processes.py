"""The stage reaches every process that is to have it, and costs those that start little. Nothing here has a GPU."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import compiled_fa.turing
import compiled_fa_turing
from compiled_fa_turing import hook, site_hook

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).parent / "processes.py"
CHILDREN = {"fork", "spawn", "forkserver", "subprocess", "itself"}
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")


def run(python, *words, check=True, folder=None, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("COMPILED_FA_TURING", "PYTHONPATH")}
    return subprocess.run(
        [str(python), *map(str, words)],
        env={**kept, **variables},
        cwd=folder or Path(python).parent,
        check=check,
        capture_output=True,
        text=True,
    )


def make_environment(folder, *others):
    """The python of a virtual environment that finds modules in other folders, too."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    (packages / "others.pth").write_text("".join(f"{other}\n" for other in others))
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}), "python")


@pytest.fixture
def python(tmp_path):
    """Of an environment with all that is here, and this checkout."""
    return make_environment(tmp_path / "environment", ROOT, sysconfig.get_path("purelib"))


@pytest.fixture
def enabled(python):
    run(python, "-m", "compiled_fa_turing", "--enable")
    return python


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_every_process_of_an_enabled_environment_has_it_until_it_is_disabled(enabled):
    with_stage = json.loads(run(enabled, PROGRAM).stdout)
    run(enabled, "-m", "compiled_fa_turing", "--disable")
    stock = json.loads(run(enabled, PROGRAM, "spawn").stdout)
    assert {kind for kind, found in with_stage.items() if found["turing"]} == CHILDREN
    assert not any(found["turing"] for found in stock.values())
    assert not any(found["torch"] for found in (*with_stage.values(), *stock.values()))
    assert with_stage["sm_80"]["ptx"] == stock["sm_80"]["ptx"] != stock["itself"]["ptx"]
    for kind in CHILDREN:
        assert re.search(r"process \d+: enabled: kernels that Triton \S+ compiles for sm_75", with_stage[kind]["log"])
        assert "kernel dot: its dots are on tensor cores" in with_stage[kind]["log"]
    assert not any("compiled_fa" in found["log"] for found in stock.values())


@needs_triton
def test_a_process_can_do_without(enabled):
    found = json.loads(run(enabled, PROGRAM, "spawn", COMPILED_FA_TURING="0").stdout)
    assert not any(child["turing"] for child in found.values())


@needs_triton
@pytest.mark.parametrize("locale", [{}, ASCII], ids=["any locale", "an ASCII locale"])
def test_a_program_and_its_children_have_it(python, locale, tmp_path):
    """No file in the environment; what is called sitecustomize elsewhere is executed as ever."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('theirs', file=sys.stderr)")
    kinds = ("spawn", "forkserver")
    done = run(python, "-m", "compiled_fa_turing", PROGRAM, *kinds, PYTHONPATH=str(tmp_path), **locale)
    found = json.loads(done.stdout)
    assert {kind for kind, child in found.items() if child["turing"]} == {*kinds, "subprocess", "itself"}
    assert done.stderr.count("theirs") >= 4  # one of them a resource tracker's or server's


@needs_triton
def test_enable_works_in_an_ascii_locale(python):
    script = (
        "import compiled_fa_turing, runpy, json, sys\ncompiled_fa_turing.enable()\n"
        f"print(json.dumps(runpy.run_path({str(PROGRAM)!r})['found']()))"
    )
    file = python.parent / "script.py"
    file.write_text(script)
    found = json.loads(run(python, file, **ASCII).stdout)
    assert found["turing"]
    assert not found["torch"]


def test_a_module_and_its_arguments(python, tmp_path):
    (tmp_path / "shows.py").write_text("import os, sys\nprint(sys.argv[1:], os.environ['COMPILED_FA_TURING'])")
    line = ("-m", "compiled_fa_turing", "-m", "shows", "--enable", "-m", "x")
    assert run(python, *line, PYTHONPATH=str(tmp_path)).stdout == "['--enable', '-m', 'x'] 1\n"
    assert site_file(python) is None


def test_a_program_keeps_the_interpreter_s_options_and_finds_a_checkout(tmp_path):
    """The environment knows nothing of us: only the first process has this checkout, as its working directory."""
    script = tmp_path / "shows.py"
    script.write_text("import sys\nprint(sys.flags.dont_write_bytecode, 'compiled_fa_turing.startup' in sys.modules)")
    python = make_environment(tmp_path / "environment")
    assert run(python, "-B", "-m", "compiled_fa_turing", script, folder=ROOT).stdout == "1 True\n"


@pytest.mark.skipif(os.name == "nt", reason="where exec does not keep the process")
def test_a_program_is_the_process_that_was_started(python):
    script = python.parent / "shows.py"
    script.write_text("import os\nprint(os.getppid())")
    assert run(python, "-m", "compiled_fa_turing", script).stdout == f"{os.getpid()}\n"


def test_a_program_whose_children_cannot_be_told_is_refused(python):
    done = run(python, "-E", "-m", "compiled_fa_turing", PROGRAM, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "this python ignores PYTHONPATH (-E, -I), by which its children are told; use --enable" in done.stderr


def site_file(python):
    found = list(python.parents[1].rglob(site_hook.NAME))
    return found[0] if found else None


def test_the_command_and_its_status(python):
    def command(word, **variables):
        done = run(python, "-m", "compiled_fa_turing", word, check=False, **variables)
        return done.returncode, done.stdout + done.stderr

    assert command("--status")[0] == 1
    assert re.fullmatch(rf"there was no .*{site_hook.NAME}\n", command("--disable")[1])
    assert command("--enable")[0] == 0
    assert command("--enable")[0] == 0
    assert site_file(python) is not None
    status, words = command("--status")
    assert status == 0
    assert f"enabled by {site_file(python)}" in words
    assert "COMPILED_FA_TURING: auto" in words
    assert command("--status", COMPILED_FA_TURING="0")[0] == 1
    status, words = command("--status", COMPILED_FA_TURING="yes")
    assert status == 1
    assert "COMPILED_FA_TURING must be one of ['auto', '1', '0'], got 'yes'" in words
    assert re.fullmatch(rf"removed .*{site_hook.NAME}\n", command("--disable")[1])
    assert site_file(python) is None


@pytest.mark.parametrize("line", [[], ["--enable", "script.py"], ["--enable", "--disable"]])
def test_one_thing_at_a_time(python, line):
    done = run(python, "-m", "compiled_fa_turing", *line, check=False)
    assert done.returncode == 2
    assert "--enable" in done.stderr
    assert site_file(python) is None


def test_a_value_that_means_nothing_is_told_and_stops_nothing(enabled):
    done = run(enabled, "-c", "print('runs')", COMPILED_FA_TURING="on")
    assert done.stdout == "runs\n"
    assert done.stderr == (
        "compiled_fa_turing: the environment variable COMPILED_FA_TURING must be one of ['auto', '1', '0'], got 'on'\n"
    )


def test_an_enabled_environment_starts_with_little(enabled):
    """No torch, no Triton, and none of the standard library's large modules: what takes the time at a start."""
    imported = "import sys; print(*sys.modules)"
    with_stage = set(run(enabled, "-c", imported).stdout.split())
    assert "compiled_fa_turing.hook" in with_stage
    large = {"argparse", "compiled_fa", "dataclasses", "hashlib", "inspect", "logging", "pathlib", "tempfile"}
    found = with_stage & {*large, "torch", "triton", "compiled_fa_turing.stage"}
    assert not found, found


INDUCTOR = """
from torch._inductor import async_compile, codecache
from torch._inductor.compile_worker import subproc_pool
import compiled_fa_turing
import triton
import json

def seen():
    return {
        "enabled": compiled_fa_turing.is_enabled(),
        "key": codecache.torch_key().hex(),
        "async_compile": async_compile.torch_key().hex(),
        "for workers": subproc_pool.torch_key().hex(),
        "in workers": async_compile._worker_compile_triton.__name__,
    }

first = seen()
compiled_fa_turing.disable()
print(json.dumps([first, seen()]))
"""


@needs_triton
def test_inductor_has_it_from_the_start_of_a_process(enabled):
    """Triton is imported while Inductor is: its caches know of the stage all the same, until it is disabled."""
    ours, stock = json.loads(run(enabled, "-c", INDUCTOR).stdout)
    assert (ours["enabled"], ours["in workers"]) == (True, "compile_in_worker")
    assert (stock["enabled"], stock["in workers"]) == (False, "compile_in_worker_without")
    assert ours["key"] == ours["async_compile"] == ours["for workers"] + hook.source_hash().encode().hex()
    assert stock["key"] == stock["async_compile"] == stock["for workers"] == ours["for workers"]


def test_a_file_without_the_package_is_quiet(tmp_path):
    python = make_environment(tmp_path)
    assert run(python, "-c", site_hook.LINE).stderr == ""


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [
        ("3.2.0", "DEBUG", "before 3.3 has Turing's tensor cores"),
        ("3.4.0", "WARNING", "triton 3.6 or newer .* is wanted; here .*triton 3.4.0.* there is no triton.knobs"),
    ],
)
def test_other_versions_of_triton_are_left_alone(enabled, tmp_path, version, level, said):
    (tmp_path / "triton.py").write_text(f"__version__ = {version!r}\n")
    script = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "import triton, compiled_fa_turing; print(compiled_fa_turing.is_enabled(), vars(triton).keys() & {'knobs'})"
    )
    done = run(enabled, "-c", script, PYTHONPATH=str(tmp_path))
    assert done.stdout == "False set()\n"
    assert re.search(f"{level}:compiled_fa.turing:.*{said}", done.stderr)


def test_disabled_before_triton_comes(enabled, tmp_path):
    """With a Triton that the stage does not work with, so that an attempt would be told."""
    (tmp_path / "triton.py").write_text("__version__ = '3.4.0'\n")
    script = "import compiled_fa_turing, sys; compiled_fa_turing.disable(); import triton; print(triton.__version__)"
    done = run(enabled, "-c", script, PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ("3.4.0\n", "")


def test_compiled_fa_turing_is_the_same(python):
    assert compiled_fa.turing.enable is compiled_fa_turing.enable
    ours, same = (
        run(python, "-m", name, "--status", check=False) for name in ("compiled_fa_turing", "compiled_fa.turing")
    )
    assert (ours.returncode, ours.stdout) == (same.returncode, same.stdout)
    assert "this environment: not enabled" in same.stdout


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("setting", ["", "auto", "1", "0"])
def test_plugins_do_what_is_asked(monkeypatch, group, setting):
    """The entry points that vLLM and SGLang load in each of their processes, called as they call them."""
    text = (ROOT / "pyproject.toml").read_text()
    ((name, value),) = re.findall(rf'^\[project\.entry-points\."{re.escape(group)}"\]\n(\w+) = "(.+)"$', text, re.M)
    asked = []
    monkeypatch.setattr("compiled_fa_turing.hook.enable_with_triton", lambda: asked.append(True))
    monkeypatch.setenv("COMPILED_FA_TURING", setting)
    importlib.metadata.EntryPoint(name, value, group).load()()
    assert asked == [True] * (setting == "1")


def test_the_custom_node_of_the_docs(tmp_path):
    """ComfyUI imports such a file by its path, and looks for its NODE_CLASS_MAPPINGS."""
    (node,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs" / "int8.md").read_text(), re.M | re.S)
    assert len(list(filter(None, node.splitlines()))) == 3
    (tmp_path / "turing.py").write_text(node)
    program = "import turing; print(turing.compiled_fa_turing.is_enabled(), turing.NODE_CLASS_MAPPINGS)"
    done = run(sys.executable, "-c", program, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.stdout == "True {}\n"
