"""enable() and disable(): other hooks, the cache keys, and what is missing."""

import subprocess
import sys
import warnings

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from triton import knobs

import compiled_fa.turing
from compiled_fa_turing import hook, triton_private
from tools.offline import compile_jit, in_own_process

from . import in_child, kernels

TYPES = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}


@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    compiled_fa.turing.disable()
    knobs.runtime.add_stages_inspection_hook = None


class OtherHook:
    """Somebody else's hook: it wraps the ttgir stage, and counts what passes."""

    def __init__(self, previous=None):
        self.previous = previous
        self.modules = []

    def __call__(self, backend=None, stages=None, options=None, language=None, capability=None):
        if backend is None:
            key, digest = self.previous() if self.previous else ("", "")
            return key + "other", digest + "other"
        if self.previous:
            self.previous(backend, stages, options, language, capability)
        inner = stages["ttgir"]

        def ttgir(module, metadata):
            lowered = inner(module, metadata)
            self.modules.append(str(lowered))
            return lowered

        stages["ttgir"] = ttgir
        return None


def test_enable_and_disable():
    assert not compiled_fa.turing.is_enabled()
    compiled_fa.turing.enable()
    compiled_fa.turing.enable()
    assert compiled_fa.turing.is_enabled()
    compiled_fa.turing.disable()
    assert not compiled_fa.turing.is_enabled()
    assert knobs.runtime.add_stages_inspection_hook is None
    compiled_fa.turing.disable()


def test_a_hook_that_was_there_keeps_working():
    other = OtherHook()
    knobs.runtime.add_stages_inspection_hook = other
    compiled = compile_jit(kernels.batched, TYPES, turing=True)  # enables, and disables again
    assert compiled.hmma == 32
    assert len(other.modules) == 1
    assert "versionMinor = 1" in other.modules[0]
    assert knobs.runtime.add_stages_inspection_hook is other


def test_a_hook_that_comes_later_keeps_working():
    compiled_fa.turing.enable()
    other = OtherHook(knobs.runtime.add_stages_inspection_hook)
    knobs.runtime.add_stages_inspection_hook = other
    assert compile_jit(kernels.batched, TYPES, turing=True).hmma == 32
    compiled_fa.turing.disable()
    assert knobs.runtime.add_stages_inspection_hook is other
    assert compile_jit(kernels.batched, TYPES, turing=False).hmma == 0
    assert other() == ("other", "other")
    compiled_fa.turing.enable()  # on top of a hook that still calls our first one
    assert compile_jit(kernels.batched, TYPES, turing=True).hmma == 32
    assert len(other.modules) >= 2  # the third may come from Triton's cache


def test_the_key_names_this_code_and_the_other_hook():
    compiled_fa.turing.enable()
    alone = knobs.runtime.add_stages_inspection_hook()
    compiled_fa.turing.disable()
    knobs.runtime.add_stages_inspection_hook = OtherHook()
    compiled_fa.turing.enable()
    chained = knobs.runtime.add_stages_inspection_hook()
    for key in (*alone, *chained):
        assert hook.source_hash() in key
    assert all(key.startswith("other") for key in chained)


def test_the_hash_changes_with_the_source(tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text("a = 1")
    monkeypatch.setattr(hook, "__file__", str(tmp_path / "hook.py"))
    before = hook.source_hash.__wrapped__()
    (tmp_path / "stage.py").write_text("a = 2")
    assert hook.source_hash.__wrapped__() != before


def test_triton_cache_on_disk(tmp_path):
    """Alternately with and without the stage, in one cache folder: each gets its own code, and there is no third."""
    found = [compile_jit(kernels.batched, TYPES, turing=turing).hmma for turing in (False, True, False, True)]
    assert found == [0, 32, 0, 32]
    assert len(list(tmp_path.glob("*/batched.cubin"))) == 2


def test_triton_cache_in_memory():
    assert in_own_process(in_child.jit_cache) == [False, True, False, True]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(triton_private, "_TRITON", {"triton.knobs": ("runtime.no_such_knob",)})
    with pytest.raises(RuntimeError, match=r"triton 3\.6 or newer .*no triton\.knobs\.runtime\.no_such_knob"):
        compiled_fa.turing.enable()
    assert not compiled_fa.turing.is_enabled()


def test_everything_private_is_there():
    assert triton_private.missing() is None


def test_without_triton_the_import_works_and_enable_says_what_is_wanted():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import compiled_fa.turing as t\n"
        "t.disable(); print(t.is_enabled())\n"
        "try: t.enable()\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "False",
        "compiled_fa.turing cannot be enabled: "
        "triton 3.6 or newer is wanted and not installed; pip install 'triton>=3.6'",
    ]


def test_gluon_kernels_are_not_touched():
    compiled_fa.turing.enable()
    stages = {"ttgir": "gluon's own", "llir": None}
    knobs.runtime.add_stages_inspection_hook("backend", stages, None, None, 75)
    assert stages["ttgir"] == "gluon's own"


def test_no_warning_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        constants = {"OTHER": 0, "OUT": tl.float32}
        assert compile_jit(kernels.matmul, {**TYPES, "K": "i32"}, constants, turing=True).hmma
