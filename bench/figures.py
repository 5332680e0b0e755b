"""The figures that records allow, each a function of a theme.

by_length draws what grows with the length (TFLOP/s, time, memory), training losses of tools/loss_curves.py; the others
draw time of ours / time of a peer, where 1 is the line to be on the left of, or below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import SHORT_DTYPES
from .themes import Theme

Record = dict[str, Any]
Figure = Any  # matplotlib is optional

DIRECTIONS = {"forward": "forward", "forward+backward": "forward + backward"}
# Peers of figures by length, in the order of their legend.
PEERS = ("ours", "naive", "SDPA", "flex", "flash_attn", "xformers", "turing")
# Quantity -> what it is called, the field of a record that it needs, and what that is multiplied by.
QUANTITIES = {
    "time": ("time (ms)", "median_s", 1e3),
    "tflops": ("TFLOP/s", "tflops", 1.0),
    "memory": ("peak memory (MiB)", "peak_bytes", 2**-20),
}
HEAD, FOOT = 0.5, 0.22  # inches for title and legend, and for the circumstances
LINES = ("first", "second", "third", "fourth")

DTYPES = ("float32", "bfloat16")  # of the overview and of short calls
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # on a logarithmic axis of ratios

# What the overview shows, by direction: label, suite, case with the dtype left open, peer.
OVERVIEW: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "forward+backward": (
        ("dense, causal, 2,048 tokens", "dense", "B1 N2048 H8 D64 {} causal", "SDPA"),
        ("the same, 32 query heads on 8", "dense", "B1 N2048 H32/8 D64 {} causal", "SDPA"),
        ("window of 512, 8,192 tokens", "variants", "B1 N8192 H8 D64 {} window 512,0", "SDPA"),
        ("ALiBi, causal, 4,096 tokens", "variants", "B1 N4096 H8 D64 {} causal ALiBi", "SDPA"),
        ("dropout, 2,048 tokens", "variants", "B1 N2048 H8 D64 {} dropout 0.1", "SDPA"),
        ("64 packed sequences; SDPA on padded rows", "varlen", "64 seqs of 105..1004 H8 D64 {} causal", "SDPA padded"),
        ("64 packed sequences; SDPA in a loop", "varlen", "64 seqs of 105..1004 H8 D64 {} causal", "SDPA loop"),
        ("2,000 packed of 1 to 64; SDPA in a loop", "varlen", "2000 seqs of 1..64 H8 D64 {} causal", "SDPA loop"),
    ),
    "forward": (
        ("decoding, 16 caches of 16,384 keys", "decode", "B16 Sq1 Sk16384 H16/4 D64 {}", "SDPA"),
        ("decoding, one cache of 4,096 keys", "decode", "B1 Sq1 Sk4096 H16/4 D64 {}", "SDPA"),
        ("decoding, one cache of 1,024 keys", "decode", "B1 Sq1 Sk1024 H16/4 D64 {}", "SDPA"),
        ("64 tokens, in torch.compile", "short", "B1 N64 H8 D64 {} compiled", "SDPA"),
        ("64 tokens, eager", "short", "B1 N64 H8 D64 {}", "SDPA"),
    ),
}


@dataclass(frozen=True)
class Drawing:
    name: str  # of its file
    draw: Callable[[Theme], Figure]


class Times:
    """Timed records by suite, case, direction and peer."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.found: dict[tuple[str, str, str], dict[str, Record]] = {}
        for record in records:
            if record["status"] == "timed" and "median_s" in record and "cache" not in record:
                key = record["suite"], record["case"], record["direction"]
                self.found.setdefault(key, {})[record["peer"]] = record

    def ratio(self, suite: str, case: str, direction: str, peer: str) -> float | None:
        """Time of ours / time of the peer, where both were timed."""
        by_peer = self.found.get((suite, case, direction), {})
        if "ours" not in by_peer or peer not in by_peer:
            return None
        return float(by_peer["ours"]["median_s"] / by_peer[peer]["median_s"])

    def of_suite(self, suite: str) -> Iterator[tuple[Record, str, dict[str, Record]]]:
        """Case and direction with ours timed: (record of ours, direction, records by peer)."""
        for (name, _, direction), by_peer in self.found.items():
            if name == suite and "ours" in by_peer:
                yield by_peer["ours"], direction, by_peer


def drawings(records: Sequence[Record], quantities: Sequence[str]) -> list[Drawing]:
    """Every figure that these records, all of one machine, allow."""
    times = Times(records)
    where = _circumstances([record for record in records if record["status"] != "trained"] or records)
    found = [drawing for quantity in quantities for drawing in _by_length(records, quantity, where)]
    for drawing in (_overview, _variants, _varlen, _decode, _short):
        found += drawing(times, where)
    return found + _training(records)


def _circumstances(records: Sequence[Record]) -> str:
    first = records[0]
    torches = sorted({record["torch"] for record in records})
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    return f"{first['machine']}, {threads}, torch {', '.join(torches)}"


def _figure(title: str, where: str, size: tuple[float, float], theme: Theme) -> Figure:
    """Title above, circumstances below; between them room for a legend and the panels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = size[0], size[1] + HEAD + FOOT
    between = ConstrainedLayoutEngine(rect=(0, FOOT / height, 1, 1 - (HEAD + FOOT) / height), hspace=0.04)
    figure = Figure(figsize=(width, height), layout=between)
    figure.text(0.012, 1 - 0.06 / height, title, va="top", fontsize=11, fontweight="bold")
    figure.text(0.99, 0.05 / height, where, ha="right", va="bottom", fontsize=7, color=theme.muted)
    return figure


def _legend(figure: Figure) -> None:
    """One for all panels, under the title."""
    by_label: dict[str, Any] = {}
    for axis in figure.axes:
        by_label |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    legend = figure.legend(
        by_label.values(), by_label, loc="upper left", bbox_to_anchor=(0.008, 1 - 0.26 / figure.get_figheight()),
        ncols=len(by_label), frameon=False, borderaxespad=0.0, borderpad=0.2, columnspacing=1.6, handletextpad=0.5,
    )  # fmt: skip
    legend.set_in_layout(False)


def _decimal(value: float, place: int) -> str:
    """Labels of a logarithmic axis: 1, 2 and 5 times a power of 10, written out."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _logarithmic(axis: Any) -> None:
    axis.set_major_formatter(_decimal)
    axis.set_minor_formatter(_decimal)


def _of_ratios(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis between the limits."""
    steps = [step for step in STEPS if low <= step <= high]
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_ticks(steps, [f"{step:g}" for step in steps])
    axis.set_ticks([], minor=True)


def _lengths(axis: Any, lengths: Iterable[int]) -> None:
    """A logarithmic x axis with these lengths on it."""
    ticks = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axis.minorticks_off()


# Against the length.


def _plain(record: Record) -> bool:
    """Dense self-attention with no feature but causal: comparable by length."""
    shape, options = record.get("shape"), record.get("options", {})
    if record["status"] != "timed" or shape is None or "cache" in record:
        return False
    features = ("varlen", "softcap", "alibi", "dropout_p", "page_size", "compiled", "layer")
    return (
        not any(options.get(name) for name in features)
        and tuple(options["window_size"]) == (-1, -1)
        and shape["max_seqlen_q"] == shape["max_seqlen_k"]
    )


def _by_length(records: Sequence[Record], quantity: str, where: str) -> list[Drawing]:
    """A figure of each suite, batch, heads and head_dim with two lengths or more."""
    families: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if not _plain(record) or record.get(QUANTITIES[quantity][1]) is None or record["suite"] == "short":
            continue
        shape = record["shape"]
        key = record["suite"], *(shape[name] for name in ("batch", "nheads", "nheads_k", "head_dim"))
        families.setdefault(key, []).append(record)
    found = []
    for (suite, batch, nheads, nheads_k, head_dim), family in families.items():
        if len({record["shape"]["max_seqlen_q"] for record in family}) < 2:
            continue
        grouped = nheads_k != nheads
        heads = f"{nheads} head{'s' * (nheads > 1)} of {head_dim}{f' on {nheads_k}' if grouped else ''}"
        name = f"{suite}_B{batch}_H{nheads}{f'-{nheads_k}' if grouped else ''}_D{head_dim}_{quantity}"
        title = f"{QUANTITIES[quantity][0]}, batch {batch}, {heads}"

        def draw(theme: Theme, family: list[Record] = family, title: str = title) -> Figure:
            return _draw_by_length(family, quantity, title, where, theme)

        found.append(Drawing(name, draw))
    return found


def _draw_by_length(records: list[Record], quantity: str, title: str, where: str, theme: Theme) -> Figure:
    """A panel for each direction and dtype, a line for each peer; causal ones are dashed."""
    directions = [name for name in DIRECTIONS if any(record["direction"] == name for record in records)]
    dtypes = [name for name in SHORT_DTYPES if any(record["dtype"] == name for record in records)]
    panels = [[(direction, dtype) for dtype in dtypes] for direction in directions]
    if len(dtypes) == 1:  # side by side
        panels = [[panel for row in panels for panel in row]]
    figure = _figure(title, where, (max(1.0 + 2.2 * len(panels[0]), 5.4), 0.3 + 1.9 * len(panels)), theme)
    axes = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharex=True)
    for row, own_axes in zip(panels, axes, strict=True):
        for (direction, dtype), axis in zip(row, own_axes, strict=True):
            chosen = [r for r in records if r["direction"] == direction and r["dtype"] == dtype]
            if not chosen:
                axis.set_axis_off()
                continue
            _panel_by_length(axis, chosen, quantity, theme)
            axis.set_title(f"{DIRECTIONS[direction]}, {SHORT_DTYPES[dtype]}")
        own_axes[0].set_ylabel(QUANTITIES[quantity][0])
    _lengths(axes[0][0], (record["shape"]["max_seqlen_q"] for record in records))
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    _legend(figure)
    return figure


def _panel_by_length(axis: Any, records: list[Record], quantity: str, theme: Theme) -> None:
    _, field, unit = QUANTITIES[quantity]
    for peer in PEERS:
        for causal in (False, True):
            own = [r for r in records if r["peer"] == peer and r["options"]["causal"] == causal]
            by_length = {record["shape"]["max_seqlen_q"]: record for record in own}
            if not by_length:
                continue
            lengths = sorted(by_length)
            style = {"color": theme.series[peer], "linestyle": (0, (3, 1.5)) if causal else "-"}
            front = {"zorder": 3, "linewidth": 2.2} if peer == "ours" else {}
            label = f"{peer}{', causal' if causal else ''}"
            values = [by_length[n][field] * unit for n in lengths]
            axis.plot(lengths, values, marker="o", label=label, **style, **front)
            if quantity == "time":  # a quarter to three quarters of the rounds' spread
                half = [by_length[n]["iqr_s"] / 2 * unit for n in lengths]
                low, high = ([v + sign * h for v, h in zip(values, half, strict=True)] for sign in (-1, 1))
                axis.fill_between(lengths, low, high, color=theme.series[peer], alpha=0.2, linewidth=0)
    if quantity == "tflops":
        axis.set_ylim(0, 1.08 * max(record[field] for record in records))
    else:
        axis.set_yscale("log")
        _logarithmic(axis.yaxis)


# Ratios.


@dataclass(frozen=True)
class Row:
    """A line of a figure of ratios: series -> ratio; without any, a heading."""

    label: str
    ratios: dict[str, float]


def _draw_rows(axis: Any, rows: Sequence[Row], names: dict[str, str], theme: Theme) -> None:
    """Ratios as dots on stems from 1. names: series -> its name in the legend."""
    height = 0.68 / max(1, len(names))
    axis.axvline(1.0, color=theme.muted, linewidth=1.2, zorder=1.9)
    for place, (series, name) in enumerate(names.items()):
        offset = (place - (len(names) - 1) / 2) * height
        points = [(at + offset, row.ratios[series]) for at, row in enumerate(rows) if series in row.ratios]
        if not points:
            continue
        at, ratios = zip(*points, strict=True)
        color = theme.series[series]
        axis.hlines(at, 1.0, ratios, color=color, linewidth=1.6, alpha=0.55)
        axis.plot(ratios, at, "o", color=color, label=name)
        for y, ratio in points:
            faster = ratio <= 1.0
            axis.annotate(
                f"{ratio:.2f}", (ratio, y), xytext=(-5 if faster else 5, 0), textcoords="offset points", fontsize=7.5,
                ha="right" if faster else "left", va="center", color=color,
            )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)


def _widen(axes: Iterable[Any], rows: Iterable[Row]) -> None:
    """The same x limits for all panels, with room for the numbers beside the dots."""
    ratios = [ratio for row in rows for ratio in row.ratios.values()]
    for axis in axes:
        _of_ratios(axis.xaxis, min(ratios) / 1.9, max(*ratios, 1.0) * 1.7)


def _overview(times: Times, where: str) -> list[Drawing]:
    rows = []
    for direction, lines in OVERVIEW.items():
        own = []
        for label, suite, case, peer in lines:
            ratios = {name: times.ratio(suite, case.format(SHORT_DTYPES[name]), direction, peer) for name in DTYPES}
            known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
            own += [Row(label, known)] if known else []
        rows += [Row(DIRECTIONS[direction], {}), *own] if own else []
    if not rows:
        return []

    def draw(theme: Theme) -> Figure:
        figure = _figure("Beside PyTorch's own attention, on a CPU", where, (7.6, 0.5 + 0.29 * len(rows)), theme)
        axis = figure.subplots()
        _draw_rows(axis, rows, {name: SHORT_DTYPES[name] for name in DTYPES}, theme)
        for row, label in zip(rows, axis.get_yticklabels(), strict=True):
            label.set_fontweight("normal" if row.ratios else "bold")
        _widen([axis], rows)
        axis.set_xlabel("time of compiled_fa / time of SDPA: left of 1 compiled_fa is faster")
        _legend(figure)
        return figure

    return [Drawing("overview", draw)]


def _rows_by_peer(
    times: Times, suite: str, peers: dict[str, str], label: Callable[[Record], str]
) -> dict[tuple[str, str], list[Row]]:
    """(dtype, direction) -> rows of a suite's cases, a series for each peer."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for ours, direction, by_peer in times.of_suite(suite):
        ratios = {peer: ours["median_s"] / by_peer[peer]["median_s"] for peer in peers if peer in by_peer}
        if ratios:
            panels.setdefault((ours["dtype"], direction), []).append(Row(label(ours), ratios))
    return panels


def _draw_panels(
    panels: dict[tuple[str, str], list[Row]], peers: dict[str, str], title: str, where: str, theme: Theme
) -> Figure:
    """A column for each dtype, a row for each direction."""
    dtypes = [dtype for dtype in SHORT_DTYPES if any(key[0] == dtype for key in panels)]
    directions = [way for way in DIRECTIONS if any(key[1] == way for key in panels)]
    labels = list(dict.fromkeys(row.label for rows in panels.values() for row in rows))
    height = 0.4 + len(directions) * (0.3 + 0.13 * len(labels) * (1 + len(peers)))
    figure = _figure(title, where, (2.2 + 2.9 * len(dtypes), height), theme)
    axes = figure.subplots(len(directions), len(dtypes), squeeze=False, sharex=True, sharey=True)
    for i, direction in enumerate(directions):
        for j, dtype in enumerate(dtypes):
            by_label = {row.label: row for row in panels.get((dtype, direction), [])}
            rows = [by_label.get(label, Row(label, {})) for label in labels]
            _draw_rows(axes[i][j], rows, peers, theme)
            axes[i][j].set_title(f"{DIRECTIONS[direction]}, {SHORT_DTYPES[dtype]}")
    _widen(axes.flat, (row for rows in panels.values() for row in rows))
    for axis in axes[-1]:
        axis.set_xlabel("time / the peer's: left of 1 it is faster")
    _legend(figure)
    return figure


def _by_peer(name: str, title: str, peers: dict[str, str], label: Callable[[Record], str]) -> Callable[..., Any]:
    def figure(times: Times, where: str) -> list[Drawing]:
        panels = _rows_by_peer(times, name, peers, label)
        if not panels:
            return []
        return [Drawing(name, lambda theme: _draw_panels(panels, peers, title, where, theme))]

    return figure


def _variant_label(record: Record) -> str:
    options, tokens = record["options"], f"{record['shape']['max_seqlen_k']:,} tokens"
    window = options["window_size"][0]
    parts = [
        f"window {window}" if window >= 0 else "",
        "ALiBi" if options["alibi"] else "",
        f"softcap {options['softcap']:g}" if options["softcap"] else "",
        f"dropout {options['dropout_p']:g}" if options["dropout_p"] else "",
        "causal" if options["causal"] else "",
    ]
    return f"{', '.join(filter(None, parts))}\n{tokens}"


def _varlen_label(record: Record) -> str:
    sequences = record["case"].partition(" H")[0].replace("seqs", "sequences").replace("..", " to ")
    return f"{sequences}{', causal' if record['options']['causal'] else ''}"


_variants = _by_peer(
    "variants", "Masks and scores that SDPA needs a tensor for, or has not", {
        "SDPA": "/ SDPA", "naive": "/ naive attention", "flex": "/ compiled flex_attention",
    }, _variant_label,
)  # fmt: skip
_varlen = _by_peer(
    "varlen", "Packed sequences", {"SDPA loop": "/ SDPA in a loop", "SDPA padded": "/ SDPA on padded rows"},
    _varlen_label,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of ratios against a length: {length: ratio}."""

    label: str
    ratios: dict[int, float]


def _draw_lines(panels: Sequence[Sequence[tuple[str, list[Line]]]], labels: tuple[str, str], title: str, where: str,
                theme: Theme) -> Figure:  # fmt: skip
    """panels: rows of (title, lines); labels: of x and y."""
    names = list(dict.fromkeys(line.label for row in panels for _, lines in row for line in lines))
    size = 1.0 + 2.4 * max(len(row) for row in panels), 0.3 + 1.9 * len(panels)
    figure = _figure(title, where, (max(size[0], 5.4), size[1]), theme)
    axes = figure.subplots(len(panels), max(len(row) for row in panels), squeeze=False, sharex=True, sharey="row")
    for i, row in enumerate(panels):
        for j, (panel_title, lines) in enumerate(row):
            axis = axes[i][j]
            axis.axhline(1.0, color=theme.muted, linewidth=1.2, zorder=1.9)
            for line in lines:
                lengths = sorted(line.ratios)
                color = theme.series[LINES[names.index(line.label) % len(LINES)]]
                axis.plot(lengths, [line.ratios[n] for n in lengths], marker="o", color=color, label=line.label)
            axis.set_title(panel_title)
        ratios = [ratio for _, lines in row for line in lines for ratio in line.ratios.values()]
        if max(ratios) < 8 * min(ratios):
            axes[i][0].set_ylim(0, 1.1 * max(*ratios, 1.0))
        else:
            _of_ratios(axes[i][0].yaxis, min(ratios) / 1.2, max(*ratios, 1.0) * 1.2)
        axes[i][0].set_ylabel(labels[1])
    _lengths(axes[0][0], (n for row in panels for _, lines in row for line in lines for n in line.ratios))
    for axis in axes[-1]:
        axis.set_xlabel(labels[0])
    _legend(figure)
    return figure


def _decode(times: Times, where: str) -> list[Drawing]:
    def lines(dtype: str, paged: bool, peer: str) -> list[Line]:
        found: dict[int, dict[int, float]] = {}
        for ours, _, by_peer in times.of_suite("decode"):
            if ours["dtype"] == dtype and bool(ours["options"]["page_size"]) == paged and peer in by_peer:
                ratio = ours["median_s"] / by_peer[peer]["median_s"]
                found.setdefault(ours["shape"]["batch"], {})[ours["shape"]["max_seqlen_k"]] = ratio
        return [Line(f"batch {batch}", found[batch]) for batch in sorted(found)]

    panels = []
    for text, paged, peer in (("one piece / SDPA", False, "SDPA"), ("pages / one piece", True, "ours dense")):
        row = [(f"{text}, {SHORT_DTYPES[dtype]}", lines(dtype, paged, peer)) for dtype in SHORT_DTYPES]
        panels.append([(title, found) for title, found in row if found])
    panels = [row for row in panels if row]
    if not panels:
        return []
    title = "Decoding: one query a sequence, caches cold"
    axes = "keys of a sequence", "time / time"
    return [Drawing("decode", lambda theme: _draw_lines(panels, axes, title, where, theme))]


def _short(times: Times, where: str) -> list[Drawing]:
    def lines(dtype: str, direction: str) -> list[Line]:
        found: dict[str, dict[int, float]] = {}
        for ours, way, by_peer in times.of_suite("short"):
            shape, options = ours["shape"], ours["options"]
            if (ours["dtype"], way, shape["batch"]) != (dtype, direction, 1) or "SDPA" not in by_peer:
                continue
            kind = "in a compiled layer" if options["layer"] else "compiled" if options["compiled"] else "eager"
            found.setdefault(kind, {})[shape["max_seqlen_k"]] = ours["median_s"] / by_peer["SDPA"]["median_s"]
        return [Line(kind, ratios) for kind, ratios in found.items()]

    panels = []
    for direction in DIRECTIONS:
        row = [(f"{DIRECTIONS[direction]}, {SHORT_DTYPES[dtype]}", lines(dtype, direction)) for dtype in DTYPES]
        panels.append([(title, found) for title, found in row if found])
    panels = [row for row in panels if row]
    if not panels:
        return []
    title = "Short calls, batch 1: what a call costs beside SDPA's"
    axes = "sequence length", "time / SDPA's"
    return [Drawing("short", lambda theme: _draw_lines(panels, axes, title, where, theme))]


# Losses.


def _training(records: Sequence[Record]) -> list[Drawing]:
    """A figure of each trainer: its losses step by step, with eager attention under ours."""
    trainers: dict[str, list[Record]] = {}
    for record in records:
        if record["suite"] == "training":
            trainers.setdefault(record["trainer"], []).append(record)

    def drawing(name: str, curves: list[Record]) -> Drawing:
        return Drawing(f"training_{name}", lambda theme: _draw_losses(curves, theme))

    return [drawing(name, curves) for name, curves in trainers.items()]


def _draw_losses(curves: list[Record], theme: Theme) -> Figure:
    losses = {record["peer"]: record["losses"] for record in curves}
    figure = _figure(f"{curves[0]['case']}: loss", _circumstances(curves), (5.4, 2.4), theme)
    axis = figure.subplots()
    for peer, style in (("naive", {"linewidth": 4.0, "alpha": 0.55}), ("ours", {"linewidth": 1.2})):
        label = {"naive": "eager attention", "ours": "compiled_fa"}[peer]
        axis.plot(range(1, len(losses[peer]) + 1), losses[peer], color=theme.series[peer], label=label, **style)
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["naive"], strict=True))
    axis.set_xlabel(f"step; the curves are at most {apart:.1e} apart")
    axis.set_ylabel("nats a byte")
    _legend(figure)
    return figure
