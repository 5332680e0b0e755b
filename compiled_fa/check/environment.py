"""What this machine has, and which engine will serve it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from .. import caches, engines
from ..inductor.graphs import compiler
from ..inductor.steps import eager_reason
from ..tuning import described


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _engines(asked_for: str, device: torch.device) -> str:
    """Those that serve the device, each what the ones before it leave, and why others do not."""
    if asked_for != "auto":
        return f"{asked_for} (asked for by name)"
    refusals = {engine.name: engine.unsupported_reason(device) for engine in engines.ENGINES}
    serving = ", then ".join(name for name, reason in refusals.items() if reason is None)
    others = "; ".join(f"not {name}: {reason}" for name, reason in refusals.items() if reason is not None)
    return f"{serving} ({others})" if others else serving


def describe(device: torch.device, engine: str) -> dict[str, str]:
    """Labels and values, in the order of the report."""
    cuda = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if cuda else f"{platform.processor() or platform.machine()}"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none (not a CUDA device)"
    return {
        "compiled_fa": _version("compiled-fa"),
        "Python": sys.version.split()[0],
        "torch": torch.__version__,
        "Triton": _version("triton"),
        "C++ compiler": compiler() or "none found",
        "device": f"{device} ({hardware}), {torch.get_num_threads()} threads",
        "compute capability": capability,
        "engine": _engines(engine, device),
        "compiled steps": (eager_reason() or "yes, by Inductor") if device.type == "cpu" else "no, plain ops",
        "tuning": described(),
        "caches": caches.contents(),
    }
