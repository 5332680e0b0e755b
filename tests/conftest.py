"""Hypothesis profiles; eager steps: tests fuzz the tiles without compiling, and those that compile say so; and one
table of tuned numbers, so that engines serve the same calls on every machine."""

import os
from typing import Any

os.environ.setdefault("COMPILED_FA_COMPILE", "0")
os.environ.setdefault("COMPILED_FA_TUNING", "zen5")

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
