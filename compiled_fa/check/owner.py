"""`python -m compiled_fa report`: a file and a picture, to be shared, of what this machine does with this package."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import engines
from ..testing import Inputs
from . import picture, speed
from .cases import CASES
from .environment import describe
from .report import check, table

FORMAT = 1  # of the file
OTHERS = ("xformers", "flash-attn", "numpy")


def described(device: torch.device) -> dict[str, Any]:
    """The hardware and system, without the name of the machine or of who uses it."""
    found: dict[str, Any] = {"name": platform.processor() or platform.machine(), "system": platform.system()}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def installed() -> dict[str, str]:
    """Versions of what is compared with, where it is there."""
    found = {}
    for name in OTHERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def checks(names: list[str], device: torch.device, dtype: torch.dtype, engine: str) -> list[dict[str, Any]]:
    """The self-check's rows; a case that raises is a row that says so."""
    rows = []
    for number, name in enumerate(names, 1):
        print(f"checking {number} of {len(names)}: {name}", file=sys.stderr, flush=True)
        try:
            inputs = replace(Inputs.of(replace(CASES[name], dtype=dtype), device), dlse=None)
            rows.append(check(name, inputs, engine))
        except Exception as error:  # whatever a card or its driver makes of it: to be reported
            rows.append({"case": name, "error": speed.told(error), "ok": False})
    return rows


def speeds(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    shapes = speed.ON_CUDA if device.type == "cuda" else speed.ON_CPU
    rows = []
    for number, shape in enumerate(shapes, 1):
        print(f"measuring {number} of {len(shapes)}: {shape}", file=sys.stderr, flush=True)
        rows += [speed.measure(shape, gradients, device, dtype) for gradients in (False, True)]
    return rows


def speed_table(rows: list[dict[str, Any]]) -> str:
    """TFLOP/s; below, why some have none."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = [f"{'TFLOP/s: shape':<34}{'direction':<18}" + "".join(f"{name:>20}" for name in names)]
    reasons = []
    for row in rows:
        shape, found = str(speed.Shape(**row["shape"])), speed.tflops(row)
        cells = "".join(f"{found[name]:>20.3g}" if name in found else f"{'-':>20}" for name in names)
        lines.append(f"{shape:<34}{row['direction']:<18}{cells}")
        reasons += [f"{name}, {shape}, {row['direction']}: {value}"
                    for name, value in row["seconds"].items() if isinstance(value, str)]  # fmt: skip
    return "\n".join([*lines, *reasons])


def main(arguments: list[str]) -> int:
    """-> exit status: 1 when a case is out of its error budget, or raised."""
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa report",
        description="Check this machine, measure it, and write one JSON file and one picture to share; some minutes on "
        "a GPU. No names of machines, people or folders are in them, but for the C++ compiler's.",
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (here)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where it is")
    parser.add_argument("--case", action="append", choices=list(CASES), help="check these; repeat for several (all)")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"--folder must be a folder, got {options.folder}")
    device, engine = torch.device(options.device), engines.requested()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    rows = checks([name for name in CASES if not options.case or name in options.case], device, dtype, engine)
    report: dict[str, Any] = {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": described(device),
        "environment": describe(device, engine),
        "installed": installed(),
        "dtype": str(dtype),
        "ok": all(row["ok"] for row in rows),
        "checks": rows,
        "speed": speeds(device, dtype),
    }
    print("\n".join(f"{label:<20}{value}" for label, value in report["environment"].items()), end="\n\n")
    print(table([row for row in rows if "error" not in row]))
    print(*(f"{row['case']}: {row['error']}" for row in rows if "error" in row), sep="\n")
    print(speed_table(report["speed"]), end="\n\n")
    name = re.sub(r"\W+", "-", report["device"]["name"].lower()).strip("-")
    file = options.folder / f"compiled_fa-{name}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    if picture.can_draw():
        picture.draw(report, file.with_suffix(".png"))
        print(f"wrote {file.with_suffix('.png')}")
    else:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
    return 0 if report["ok"] else 1
