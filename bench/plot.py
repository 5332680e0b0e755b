"""Figures of records: `python -m bench plot [FILE ...]`, time, TFLOP/s and memory against sequence length.

One figure for each head_dim, causal or not, and quantity; in it a panel for each direction and dtype, a line for each
peer, and for time a band from a quarter to three quarters of the rounds' spread. Every figure is a PNG and an SVG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import SHORT_DTYPES
from .records import ROOT, read

Record = dict[str, Any]

RESULTS = ROOT / "bench" / "results"
# Okabe and Ito's colours, which the colour-blind can tell apart; ours is the one that stands out.
COLOURS = {
    "ours": "#D55E00",
    "naive": "#999999",
    "SDPA": "#0072B2",
    "flex": "#009E73",
    "flash_attn": "#CC79A7",
    "xformers": "#E69F00",
    "turing": "#56B4E9",
}
DIRECTIONS = ("forward", "forward+backward")
# Quantity -> what it is called, and the field of a record that it needs.
QUANTITIES = {
    "time": ("time (ms)", "median_s"),
    "tflops": ("TFLOP/s", "tflops"),
    "memory": ("peak memory (MiB)", "peak_bytes"),
}
UNITS = {"time": 1e3, "tflops": 1.0, "memory": 2**-20}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",  # text stays text
}


def _plain(record: Record) -> bool:
    """Dense self-attention with as many key heads as query heads and no feature but causal: comparable by length."""
    shape, options = record.get("shape"), record.get("options", {})
    if record["status"] != "timed" or shape is None or "cache" in record:
        return False
    features = ("varlen", "softcap", "alibi", "dropout_p", "page_size", "compiled", "layer")
    return (
        not any(options.get(name) for name in features)
        and tuple(options["window_size"]) == (-1, -1)
        and shape["max_seqlen_q"] == shape["max_seqlen_k"]
        and shape["nheads"] == shape["nheads_k"]
    )


def families(records: Iterable[Record], quantity: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records that one figure compares: of a suite, machine, batch, number of heads, head_dim, causal or not."""
    field = QUANTITIES[quantity][1]
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if not _plain(record) or record.get(field) is None:
            continue
        shape = record["shape"]
        key = (record["suite"], record["machine"], shape["batch"], shape["nheads"], shape["head_dim"])
        found.setdefault((*key, record["options"]["causal"]), []).append(record)
    lengths = {key: {record["shape"]["max_seqlen_q"] for record in family} for key, family in found.items()}
    return {key: family for key, family in found.items() if len(lengths[key]) > 1}


def _panel(axis: Any, records: list[Record], quantity: str) -> None:
    field, unit = QUANTITIES[quantity][1], UNITS[quantity]
    peers = [peer for peer in COLOURS if any(record["peer"] == peer for record in records)]
    for peer in peers:
        by_length = {r["shape"]["max_seqlen_q"]: r for r in records if r["peer"] == peer}
        lengths = sorted(by_length)
        values = [by_length[length][field] * unit for length in lengths]
        front = {"zorder": 3, "linewidth": 2.0} if peer == "ours" else {}
        axis.plot(lengths, values, marker="o", color=COLOURS[peer], label=peer, **front)
        if quantity == "time":
            half = [by_length[length]["iqr_s"] / 2 * unit for length in lengths]
            low, high = ([v + sign * h for v, h in zip(values, half, strict=True)] for sign in (-1, 1))
            axis.fill_between(lengths, low, high, color=COLOURS[peer], alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    ticks = sorted({record["shape"]["max_seqlen_q"] for record in records})
    axis.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axis.minorticks_off()
    if quantity == "tflops":
        axis.set_ylim(bottom=0)
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_decimal)
        axis.yaxis.set_minor_formatter(_decimal)


def _decimal(value: float, place: int) -> str:
    """Labels of a logarithmic axis: 1, 2 and 5 times a power of 10, written out."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def draw(records: list[Record], quantity: str, title: str, path: Path) -> list[Path]:
    """One figure of records of one family -> the files written."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    directions = [name for name in DIRECTIONS if any(record["direction"] == name for record in records)]
    dtypes = [name for name in SHORT_DTYPES if any(record["dtype"] == name for record in records)]
    with mpl.rc_context(STYLE):
        size = 0.8 + 2.4 * len(dtypes), 0.9 + 2.1 * len(directions)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(directions), len(dtypes), squeeze=False, sharex=True)
        for row, direction in enumerate(directions):
            for column, dtype in enumerate(dtypes):
                axis = axes[row][column]
                chosen = [r for r in records if r["direction"] == direction and r["dtype"] == dtype]
                if not chosen:
                    axis.set_axis_off()
                    continue
                _panel(axis, chosen, quantity)
                axis.set_title(f"{direction}, {SHORT_DTYPES[dtype]}", fontsize=8)
            axes[row][0].set_ylabel(QUANTITIES[quantity][0])
        for axis in axes[-1]:
            axis.set_xlabel("sequence length")
        by_label = {}
        for axis in axes.flat:
            by_label |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=len(by_label), frameon=False)
        figure.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_name(path.name + kind) for kind in (".png", ".svg")]
        for file in files:
            figure.savefig(file, dpi=250)
    return files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records; default: bench/results/*.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS / "figures", metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        parser.error("plot needs matplotlib: pip install 'compiled-fa[plots]'")
    paths = options.files or sorted(RESULTS.glob("*.jsonl"))
    if missing := [path for path in paths if not path.is_file()]:
        parser.error(f"no such file: {missing[0]}")
    records = read(paths)
    written = []
    for quantity in QUANTITIES:
        for (suite, machine, batch, nheads, head_dim, causal), family in families(records, quantity).items():
            first = family[0]
            shape = f"batch {batch}, {nheads} heads of {head_dim}{', causal' if causal else ''}"
            threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
            title = f"{shape}\n{machine}, {threads}\ntorch {first['torch']}, {first['commit']}"
            name = f"{suite}_B{batch}_H{nheads}_D{head_dim}{'_causal' if causal else ''}_{quantity}"
            written += draw(family, quantity, title, options.output / name)
    for file in written:
        print(file)
    if not written:
        print("nothing to draw: no dense case at two lengths or more among these records", file=sys.stderr)
    return 0 if written else 1
