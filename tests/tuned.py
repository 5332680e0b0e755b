"""Other numbers than a machine's table for the length of a test."""

from compiled_fa import tuning


def retune(patch, **changes):
    """By engine: retune(monkeypatch, split_kv={"split_keys": 8})."""
    patch.setattr(tuning, "_current", tuning.changed(**changes))
