"""The owner's report as a picture: TFLOP/s of each peer, by shape and direction. It needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .speed import Shape, tflops

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    "ours": "#0072b2",
    "ours, int8": "#56b4e9",
    "SDPA": "#e69f00",
    "xformers": "#f0e442",
    "flex, our stage": "#009e73",
    "flex, stock Triton": "#999999",
}


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = report["speed"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure: Any = Figure(figsize=(6 * len(directions), 2 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(directions), squeeze=False)[0]
    for axis, direction in zip(axes, directions, strict=True):
        chosen = [row for row in rows if row["direction"] == direction]
        found = [tflops(row) for row in chosen]
        names = [name for name in COLOURS if any(name in values for values in found)]
        height = 0.8 / max(1, len(names))
        for place, name in enumerate(names):
            at = [row + place * height for row, values in enumerate(found) if name in values]
            widths = [values[name] for values in found if name in values]
            axis.barh(at, widths, height, label=name, color=COLOURS[name])
        axis.set_yticks(
            [row + 0.4 - height / 2 for row in range(len(chosen))], [str(Shape(**row["shape"])) for row in chosen]
        )
        axis.invert_yaxis()
        axis.set_title(direction.replace("+", " + "))
        axis.set_xlabel("TFLOP/s (batch x seqlen x nheads x head_dim)")
    axes[0].legend(loc="best", fontsize=8)
    verdict = "all within their error budget" if report["ok"] else "NOT all within their error budget"
    environment = report["environment"]
    versions = f"torch {environment['torch']}, Triton {environment['Triton']}"
    title = f"compiled_fa {environment['compiled_fa']} on {report['device']['name']}, {versions}\nresults {verdict}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
