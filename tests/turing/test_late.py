"""Waiting for a module to be imported."""

import importlib
import importlib.util
import inspect
import sys
from typing import Any

import pytest

from compiled_fa_turing import late


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "comes_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "comes_late"
    sys.modules.pop("comes_late", None)


def test_a_module_that_comes_late(module):
    seen = []
    late.when_imported(module, lambda found: seen.append(("first", found.value)))
    late.when_imported(module, lambda found: seen.append(("second", found.value)))
    assert seen == []
    imported = importlib.import_module(module)
    assert seen == [("first", 1), ("second", 1)]
    assert inspect.getsource(imported) == "value = 1\n"
    assert "exec_module" not in vars(imported.__loader__)
    assert late._Finder not in sys.meta_path
    late.when_imported(module, lambda found: seen.append(("at once", found.value)))
    assert seen[2:] == [("at once", 1)]


def test_nobody_is_told_who_has_called_it_off(module):
    seen: list[Any] = []
    call_off = late.when_imported(module, seen.append)
    late.when_imported(module, seen.append)
    call_off()
    call_off()
    importlib.import_module(module)
    assert len(seen) == 1
    assert late._Finder not in sys.meta_path


def test_asking_whether_a_module_exists_tells_nobody(module):
    seen: list[Any] = []
    call_off = late.when_imported(module, seen.append)
    assert importlib.util.find_spec(module) is not None
    assert seen == []
    importlib.import_module(module)
    assert len(seen) == 1
    call_off()


def test_an_import_that_fails_tells_nobody_and_the_next_one_does(module, tmp_path):
    seen: list[Any] = []
    late.when_imported(module, seen.append)
    file = tmp_path / "comes_late.py"
    file.write_text("raise ImportError('not yet')")
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(module)
    assert seen == []
    file.write_text("value = 'of another length'")
    importlib.invalidate_caches()
    imported = importlib.import_module(module)
    assert seen == [imported]


def test_a_module_that_is_being_imported(module, tmp_path):
    (tmp_path / "comes_late.py").write_text(
        "import sys\nfrom compiled_fa_turing import late\nduring = late.is_initializing(sys.modules[__name__])"
    )
    imported = importlib.import_module(module)
    assert imported.during
    assert not late.is_initializing(imported)
