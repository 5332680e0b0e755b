"""Environment variables: one place reads them, and a value that means nothing is an error."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from compiled_fa import config, flash_attn_func

q = torch.randn(1, 4, 2, 8)


@pytest.mark.parametrize("variable", config.VARIABLES, ids=lambda variable: variable.name)
def test_values(monkeypatch, variable):
    monkeypatch.delenv(variable.name, raising=False)
    default = variable.read()
    assert default == variable.allowed[0]
    assert variable.is_unset()
    monkeypatch.setenv(variable.name, "")
    assert not variable.is_unset()
    assert variable.read() == default
    for value in variable.allowed:
        monkeypatch.setenv(variable.name, value)
        assert variable.read() == value
    for value in () if variable.or_a_file else ("false", "true", "yes", "2", variable.allowed[-1] + " "):
        monkeypatch.setenv(variable.name, value)
        with pytest.raises(
            ValueError, match=f"{variable.name} must be one of .*{variable.allowed[-1]}.*, got '{value}'"
        ):
            variable.read()


@pytest.mark.parametrize("name", ["COMPILED_FA_ENGINE", "COMPILED_FA_COMPILE"])
def test_a_call_refuses_what_means_nothing(monkeypatch, name):
    monkeypatch.setenv(name, "false")
    with pytest.raises(ValueError, match=f"environment variable {name} must be one of"):
        flash_attn_func(q, q, q, softcap=1.0)


def test_compiled_code_does_not_depend_on_the_environment(monkeypatch):
    compilations = CompileCounter()
    compiled = torch.compile(lambda q: flash_attn_func(q, q, q), backend=compilations, fullgraph=True)
    compiled(q)
    monkeypatch.setenv("COMPILED_FA_TEST", "1")
    compiled(q)
    monkeypatch.setenv("COMPILED_FA_ENGINE", "tiled")
    compiled(q)
    assert compilations.frame_count == 1


def test_checks_on_other_devices_ask_for_it(monkeypatch):
    monkeypatch.setenv("COMPILED_FA_CHECK", "true")
    with pytest.raises(ValueError, match="COMPILED_FA_CHECK must be one of"):
        config.checks_values()
