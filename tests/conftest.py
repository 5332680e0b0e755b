"""Hypothesis profiles; eager steps: tests fuzz the tiles without compiling, and those that compile say so; one table of
tuned numbers, so that engines serve the same calls on every machine; and workers of `-n auto` that share the cores."""

import os
from typing import Any

os.environ.setdefault("COMPILED_FA_COMPILE", "0")
os.environ.setdefault("COMPILED_FA_TUNING", "zen5")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of one worker do not spin on a core that others want

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck

COMMON: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("ci", max_examples=100, **COMMON)
hypothesis.settings.register_profile("thorough", max_examples=2000, **{**COMMON, "derandomize": False})
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker a core, and no more than memory is for: each imports torch and compiles."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


@pytest.fixture
def compiled_steps(monkeypatch):
    """Steps compiled by Inductor, as users have them."""
    from compiled_fa.inductor.steps import eager_reason

    monkeypatch.setenv("COMPILED_FA_COMPILE", "1")
    if reason := eager_reason():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def unread(monkeypatch):
    """As in a process that has not read its table of tuned numbers yet."""
    from compiled_fa import tuning

    monkeypatch.setattr(tuning, "_current", None)
