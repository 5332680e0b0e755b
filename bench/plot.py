"""Figures of records: `python -m bench plot [FILE ...]`, of bench/results unless files are named.

Every figure is two SVG files, NAME-light.svg and NAME-dark.svg, for pages that are light and dark. Without arguments it
draws docs/plots anew.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from .figures import QUANTITIES, Drawing, Record, drawings
from .records import ROOT, read
from .themes import THEMES

RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs" / "plots"
QUOTED = ("tflops", "memory")  # the time says the same as TFLOP/s


def machine_of(records: Sequence[Record]) -> str:
    """The machine of all records that are of time or memory; losses compare from one machine to another.

    Raises ValueError where there are several.
    """
    measured = [record for record in records if record["status"] != "trained"] or records
    machines = sorted({f"{record['machine']}, {record['threads']} threads" for record in measured})
    if len(machines) > 1:
        raise ValueError(f"records of one machine at a time, got {'; '.join(machines)}: name the files of one")
    return machines[0]


def save(drawing: Drawing, folder: Path, png: bool) -> list[Path]:
    """The files written: an SVG of each theme, and a PNG. The same records and matplotlib give the same bytes."""
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, theme in THEMES.items():
        with mpl.rc_context(theme.style):
            figure = drawing.draw(theme)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            files.append(folder / f"{drawing.name}-{name}.svg")
            files[-1].write_text("".join(line.lstrip(" ") for line in text.getvalue().splitlines(keepends=True)))
            if png:
                files.append(files[-1].with_suffix(".png"))
                figure.savefig(files[-1], dpi=200)
    return files


def main(arguments: list[str]) -> int:
    """-> exit status: 1 when there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="records; default: bench/results/*.jsonl")
    add("--output", type=Path, default=PLOTS, metavar="FOLDER", help="default: docs/plots")
    add("--quantity", nargs="+", choices=QUANTITIES, default=QUOTED, help="against the length; default: tflops memory")
    add("--png", action="store_true", help="a PNG beside each SVG, too")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("plot needs matplotlib: pip install 'compiled-fa[plots]'")
    paths = options.files or sorted(
        path for path in RESULTS.glob("*.jsonl") if not path.name.startswith(("choice", "classes"))
    )
    if missing := [path for path in paths if not path.is_file()]:
        parser.error(f"no such file: {missing[0]}")
    records = read(paths)
    try:
        found = drawings(records, options.quantity) if records and machine_of(records) else []
    except ValueError as error:
        parser.error(str(error))
    for drawing in found:
        print(*save(drawing, options.output, options.png), sep="\n")
    if not found:
        print("nothing to draw: no case at two lengths or more, and no ratio, among these records", file=sys.stderr)
    return 0 if found else 1
