"""Records for the eye: ours in milliseconds, and ours / peer: below 1, ours is faster (or smaller)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOT_TIMED = {"refused": "-", "mismatch": "WRONG", "unable": "fails"}
LABEL_WIDTH = 50


def significant(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def header(peers: Sequence[str]) -> str:
    columns = "".join(f"{'/ ' + name:>14}" for name in peers if name != "ours")
    return f"{'case':<{LABEL_WIDTH}}{'dir':>8}{'ours ms':>10}{'IQR':>8}{'TFLOP/s':>9}{'ns/score':>10}{columns}"


def row(records: Sequence[dict[str, Any]]) -> str:
    """The records of one case and direction, one of each peer, in the header's order."""
    by_peer = {record["peer"]: record for record in records}
    first, ours = records[0], by_peer.get("ours", {})
    direction = "fwd" if first["direction"] == "forward" else "fwd+bwd"
    line = f"{first['case']:<{LABEL_WIDTH}}{direction:>8}"
    seconds = ours.get("median_s")
    if seconds is None:
        line += f"{NOT_TIMED.get(ours.get('status', 'refused'), '-'):>10}{'':>27}"
    else:
        per_score = seconds * 1e9 / max(1, first["useful_scores"])
        line += f"{significant(seconds * 1e3):>10}{significant(ours['iqr_s'] * 1e3):>8}"
        line += f"{significant(ours['tflops']):>9}{per_score:>10.4f}"
    for name, record in by_peer.items():
        if name == "ours":
            continue
        other = record.get("median_s")
        if other is None:
            line += f"{NOT_TIMED[record['status']]:>14}"
        else:
            line += f"{seconds / other:>14.2f}" if seconds is not None else f"{significant(other * 1e3) + ' ms':>14}"
    return line


def notes(records: Sequence[dict[str, Any]]) -> list[str]:
    """Why peers were not timed: what was wrong case by case, what was refused once a reason."""
    lines: list[str] = []
    refused: dict[tuple[str, str], None] = {}  # in place of a set, for its order
    for record in records:
        if record["status"] == "refused":
            refused[record["peer"], record["reason"]] = None
        elif record["status"] != "timed":
            lines.append(
                f"{record['status']}: {record['peer']}, {record['case']}, {record['direction']}: {record['reason']}"
            )
    if refused:
        lines.append("-: " + "; ".join(f"{peer}: {reason}" for peer, reason in refused))
    return lines


def serve_row(records: Sequence[dict[str, Any]]) -> str:
    """Tokens per second, and ours / peer of the time, as above."""
    by_peer = {record["peer"]: record for record in records}
    line, ours = f"{records[0]['case']:<{LABEL_WIDTH + 10}}", by_peer["ours"].get("median_s")
    for name, record in by_peer.items():
        if record["status"] != "timed":
            line += f"  {name}: {NOT_TIMED[record['status']]} {record['reason']}"
        elif name == "ours":
            line += f"{record['tokens_per_s']:>14.0f}"
        else:
            line += f"{ours / record['median_s']:>14.2f}" if ours is not None else f"{'-':>14}"
    return line


SERVE_HEADER = f"{'case':<{LABEL_WIDTH + 10}}{'ours tokens/s':>14}{'/ SDPA padded':>14}"


MODEL_PEERS = ("ours sdpa", "ours padded", "SDPA", "naive")


def models_row(records: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of a step of ours, and of it / each other road's."""
    by_peer = {record["peer"]: record for record in records}
    direction = "fwd" if records[0]["direction"] == "forward" else "fwd+bwd"
    line = f"{records[0]['case']:<{LABEL_WIDTH + 10}}{direction:>8}"
    ours = by_peer["ours"].get("median_s")
    line += f"{significant(ours * 1e3) if ours is not None else NOT_TIMED[by_peer['ours']['status']]:>10}"
    for name in MODEL_PEERS:
        record = by_peer.get(name)
        if record is None:
            line += f"{'':>14}"
        elif record["status"] != "timed":
            line += f"{NOT_TIMED[record['status']]:>14}"
        else:
            line += f"{ours / record['median_s']:>14.2f}" if ours is not None else f"{'-':>14}"
    return line


MODELS_HEADER = f"{'case':<{LABEL_WIDTH + 10}}{'dir':>8}{'ours ms':>10}" + "".join(
    f"{f'/ {name}':>14}" for name in MODEL_PEERS
)


def memory_row(record: dict[str, Any]) -> str:
    direction = "fwd" if record["direction"] == "forward" else "fwd+bwd"
    line = f"{record['case']:<{LABEL_WIDTH}}{direction:>8}{record['peer']:>8}"
    if record["status"] != "timed":
        return f"{line}  {NOT_TIMED[record['status']]} {record['reason']}"
    sizes = [record[name] / 2**20 for name in ("peak_bytes", "results_bytes", "extra_bytes")]
    return line + "".join(f"{significant(size):>12}" for size in sizes) + f"{record['extra_bytes_per_token']:>14.0f}"


MEMORY_HEADER = (
    f"{'case':<{LABEL_WIDTH}}{'dir':>8}{'peer':>8}{'peak MiB':>12}{'results':>12}{'the rest':>12}{'bytes/token':>14}"
)


def latency_row(record: dict[str, Any]) -> str:
    direction = "fwd" if record["direction"] == "forward" else "fwd+bwd"
    line = f"{record['case']:<{LABEL_WIDTH}}{direction:>8}{record['peer']:>8}{record['mode']:>12}"
    if record["status"] != "timed":
        return f"{line}  {NOT_TIMED[record['status']]} {record['reason']}"
    launches = "-" if record["launches"] is None else str(record["launches"])
    times = "".join(f"{significant(record[name]):>12}" for name in ("issued_us", "finished_us"))
    return f"{line}{times}{launches:>10}"


LATENCY_HEADER = (
    f"{'case':<{LABEL_WIDTH}}{'dir':>8}{'peer':>8}{'called':>12}{'issued µs':>12}{'finished':>12}{'launches':>10}"
)


def first_use_row(record: dict[str, Any]) -> str:
    line = f"{record['case']:<{LABEL_WIDTH}}{record['peer']:>8}{record['cache']:>6}"
    if record["status"] != "timed":
        return f"{line}  {NOT_TIMED[record['status']]} {record['reason']}"
    return line + "".join(
        f"{record[name]:>12.2f}" for name in ("median_s", "import_torch_s", "import_s", "first_call_s")
    )


FIRST_USE_HEADER = (
    f"{'case':<{LABEL_WIDTH}}{'peer':>8}{'cache':>6}{'total s':>12}{'torch':>12}{'package':>12}{'first call':>12}"
)
