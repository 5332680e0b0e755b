"""Other numbers than a machine's table for the length of a test."""

from dataclasses import replace

from compiled_fa import tuning


def retune(patch, **changes):
    """By engine: retune(monkeypatch, split_kv={"split_keys": 8})."""
    table = tuning.current()  # read now, if it was not
    changed = {engine: replace(getattr(table, engine), **numbers) for engine, numbers in changes.items()}
    patch.setattr(tuning, "_current", replace(table, **changed))
