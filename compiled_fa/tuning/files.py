"""Tables in files: what COMPILED_FA_TUNING reads.

    {"version": 3, "name": "...", "sdpa_cpu": {"measured_on": "...", "tiles_forward": {"constant": 1.0, ...}, ...}, ...}

Every field of form.py, no other. JSON, with NEVER written as null, and rules as objects of their weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from .form import NEVER, Rule, SdpaCpu, SplitKV, Tiled, Tuning

VERSION = 4  # of the form: to be raised when a field is added, removed, or means something else

PARTS: dict[str, type[SdpaCpu] | type[SplitKV] | type[Tiled]] = {
    "sdpa_cpu": SdpaCpu,
    "split_kv": SplitKV,
    "tiled": Tiled,
}


def save(table: Tuning, path: Path) -> None:
    """To a file that `load` reads."""
    written = {"version": VERSION, **asdict(table)}
    for part in PARTS:
        written[part] = {name: None if value == NEVER else value for name, value in written[part].items()}
    path.write_text(json.dumps(written, indent=2) + "\n")


def load(path: Path) -> Tuning:
    """Raises ValueError, which names the field, for a file that is malformed or of another version."""
    try:
        read = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        _refuse(path, "JSON", f"{error}")
    if not isinstance(read, dict):
        _refuse(path, "an object", type(read).__name__)
    if read.get("version") != VERSION:
        _refuse(path, f"of version {VERSION}", f"version {read.get('version')!r}")
    _names(path, "", read, {"version", "name", *PARTS})
    if not isinstance(read["name"], str):
        _refuse(path, "a string as name", repr(read["name"]))
    parts: dict[str, Any] = {part: form(**_values(path, part, form, read[part])) for part, form in PARTS.items()}
    return Tuning(name=read["name"], **parts)


def _values(path: Path, part: str, form: Any, read: Any) -> dict[str, Any]:
    if not isinstance(read, dict):
        _refuse(path, f"an object as {part}", repr(read))
    _names(path, f"{part}.", read, {field.name for field in fields(form)})
    values = {}
    for field in fields(form):
        value, name = read[field.name], f"{part}.{field.name}"
        if field.name == "measured_on":
            if value is not None and not isinstance(value, str):
                _refuse(path, f"a string or null as {name}", repr(value))
        elif field.type == "bool":
            if not isinstance(value, bool):
                _refuse(path, f"true or false as {name}", repr(value))
        elif field.type == "Rule":
            value = _rule(path, name, value)
        elif value is None:
            value = NEVER
        elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
            _refuse(path, f"an integer of at least 0, or null, as {name}", repr(value))
        values[field.name] = value
    return values


def _rule(path: Path, name: str, read: Any) -> Rule:
    if not isinstance(read, dict):
        _refuse(path, f"an object as {name}", repr(read))
    _names(path, f"{name}.", read, {field.name for field in fields(Rule)})
    for weight, value in read.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            _refuse(path, f"a finite number as {name}.{weight}", repr(value))
    return Rule(**read)


def _names(path: Path, before: str, read: dict[str, Any], wanted: set[str]) -> None:
    if missing := sorted(wanted - read.keys()):
        _refuse(path, f"a table with {before}{missing[0]}", "none")
    if unknown := sorted(read.keys() - wanted):
        _refuse(path, "a table without other fields", f"{before}{unknown[0]}")


def _refuse(path: Path, wanted: str, got: str) -> NoReturn:
    raise ValueError(f"the tuning file {path} must be {wanted}, got {got}")
