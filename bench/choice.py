"""How good is the choice of engines? Random calls, each by "auto" and by every engine that could serve it, in turns.

The regret of a call is the time of auto / the time of the fastest. Forward and backward may be served by two engines:
a call with gradients is timed by every pair of them that could serve it, through autograd.

The worst of 200 ratios is the one that noise made so, where there is noise. A call that seems to lose much, and was not
timed precisely, is timed anew and for longer, and what it was chosen by does not count.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compiled_fa import ops, tuning, use_engine
from compiled_fa.engines import ENGINES, sdpa_cpu, select, split_kv
from compiled_fa.engines.selection import IN_CONTEXT
from compiled_fa.problem import Direction as Way
from compiled_fa.problem import Problem

from .cases import Case, Direction, Inputs
from .parity import Reference
from .records import described
from .timing import Ratio, Timing, compared

CALLS = 200
TARGETS = {"median": 1.02, "95th percentile": 1.10, "worst": 1.30}
SPREAD = 0.03  # of auto / another, at which a call has been timed enough
DOUBTFUL, LONGER = 1.10, 4  # a regret that is looked at again, for so many times as long
HOPELESS = 0.6  # auto / another: such a one will not be the fastest
MOST_PRODUCTS = 1 << 31  # scores * head_dim of a call: 8.6 GFLOP forward
MOST_KEYS = 1 << 24  # elements of k
LONGEST, LONGEST_CACHE = 4096, 32768
KINDS = ("dense", "packed", "decode", "paged decode")
SHARES = (90, 60, 50, 20)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_SHARES = (2, 2, 1)
# split_kv compiles code for every head_dim, number of rows, dtype and mask, which takes seconds: packed calls and those
# that decode are of a few kinds, (heads_per_key, head_dim).
COMPILED_FOR = ((1, 64), (4, 128), (8, 64))
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class Found:
    """Of one call. routes: which engines auto took, by direction. complaint: what is wrong with a result."""

    case: Case
    direction: Direction
    routes: dict[Way, str]
    timings: dict[str, Timing]
    ratios: dict[str, Ratio]  # auto / engines
    complaint: str | None = None

    @property
    def auto(self) -> str:
        return named(tuple(self.routes.values()))

    @property
    def best(self) -> str:
        """The fastest engines; auto's own where none is faster."""
        fastest = max(self.ratios, key=lambda name: self.ratios[name].median, default=self.auto)
        return fastest if self.regret > 1.0 else self.auto

    @property
    def regret(self) -> float:
        """At least 1: auto is among those that could have served."""
        return max([1.0, *(ratio.median for ratio in self.ratios.values())])


def named(engines: Sequence[str]) -> str:
    """("tiled",) -> tiled; ("split_kv", "tiled") -> split_kv+tiled."""
    return "+".join(engines)


# ------------------------------------------------------------------------------------------------------------ the calls


def calls(count: int, seed: int = 0, most_products: int = MOST_PRODUCTS) -> list[tuple[Case, Direction]]:
    """Random ones, the same for every count that has them."""
    drawn = random.Random(seed)
    return [_call(drawn, most_products) for _ in range(count)]


def _length(drawn: random.Random, first: int, last: int) -> int:
    """Log-uniform."""
    return min(last, int(first * ((last + 1) / first) ** drawn.random()))


def _call(drawn: random.Random, most_products: int) -> tuple[Case, Direction]:
    (kind,) = drawn.choices(KINDS, SHARES)
    (dtype,) = drawn.choices(DTYPES, DTYPE_SHARES)
    heads_per_key, head_dim = drawn.choice(COMPILED_FOR)
    nheads_k, causal = drawn.choice((1, 2, 4, 8, 16)), drawn.random() < 0.5
    options: dict[str, Any] = {"seed": drawn.randrange(1 << 16)}
    if kind == "dense":
        heads_per_key, head_dim = drawn.choice((1, 1, 1, 2, 4, 8)), drawn.choice(HEAD_DIMS)
        seqlen_k = _length(drawn, 1, LONGEST)
        seqlen_q = _length(drawn, 1, LONGEST) if drawn.random() < 0.2 else seqlen_k
        lengths = [(seqlen_q, seqlen_k)] * _length(drawn, 1, 32)
        feature = drawn.random()
        if feature < 0.1:
            options["window_size"] = (_length(drawn, 8, 1024), 0 if causal else _length(drawn, 8, 1024))
        elif feature < 0.2:
            options["softcap"] = 30.0
        options["dense"] = True
    elif kind == "packed":
        longest = _length(drawn, 8, LONGEST)
        lengths = [(n, n) for n in (drawn.randint(1, longest) for _ in range(_length(drawn, 2, 1024)))]
        if drawn.random() < 0.1:
            options["window_size"] = (_length(drawn, 8, 256), 0)
    else:
        queries, longest = drawn.choice((1, 1, 1, 2, 4)), _length(drawn, 64, LONGEST_CACHE)
        batch = _length(drawn, 1, 32)
        if kind == "decode" and drawn.random() < 0.7:
            lengths, options["dense"] = [(queries, longest)] * batch, True
        else:
            lengths = [(queries, drawn.randint(max(queries, longest // 4), longest)) for _ in range(batch)]
        if kind == "paged decode":
            options["page_size"] = drawn.choice((16, 64, 256))
        causal = causal and queries > 1
    lengths, nheads_k = _bounded(lengths, nheads_k, heads_per_key, head_dim, most_products)
    options |= {"nheads_k": nheads_k, "heads_per_key": heads_per_key, "head_dim": head_dim}
    case = Case(tuple(lengths), dtype=dtype, causal=causal, **options)
    decodes = "decode" in kind
    return case, "forward" if decodes or drawn.random() < 0.5 else "forward+backward"


def _bounded(
    lengths: list[tuple[int, int]], nheads_k: int, heads_per_key: int, head_dim: int, most_products: int
) -> tuple[list[tuple[int, int]], int]:
    """As many sequences and heads as a call may have; of one that is too long by itself, a half of its lengths."""

    def too_much() -> bool:
        products = nheads_k * heads_per_key * head_dim * sum(q * k for q, k in lengths)
        return products > most_products or nheads_k * head_dim * sum(k for _, k in lengths) > MOST_KEYS

    while too_much():
        if nheads_k > 2 or (nheads_k > 1 and len(lengths) == 1):
            nheads_k //= 2
        elif len(lengths) > 1:
            lengths = lengths[: len(lengths) // 2]
        else:
            lengths = [(-(-q // 2), -(-k // 2)) for q, k in lengths]
    return lengths, nheads_k


# ------------------------------------------------------------------------------------------------------------ measuring


def ways(direction: Direction) -> tuple[Way, ...]:
    return ("forward",) if direction == "forward" else ("forward", "backward")


def able(problem: Problem, direction: Direction) -> list[tuple[str, ...]]:
    """The engines that could serve a call, one for each direction: every combination."""
    found: list[tuple[str, ...]] = [()]
    for way in ways(direction):
        names = [e.name for e in ENGINES if e.unsupported_reason(problem.q.device, problem, way) is None]
        found = [(*before, name) for before in found for name in names]
    return found


def op_of(inputs: Inputs) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """q, k and v in their layout, and what calls the op with them, by the engines in force when it is called."""
    options = *inputs.options, IN_CONTEXT
    if not inputs.varlen:
        leaves: tuple[Tensor, ...] = tuple(inputs.laid_out(x) for x in (inputs.q, inputs.k, inputs.v))
        return leaves, lambda q, k, v: ops.attention(q, k, v, *options)[0]
    leaves, block_table = (inputs.q, inputs.k, inputs.v), None
    if inputs.case.page_size:
        k, v, block_table = inputs.pages()
        leaves = inputs.q, k, v
    return leaves, lambda q, k, v: ops.varlen_attention(q, k, v, *inputs.packing, block_table, *options)[0]


def computing(inputs: Inputs, direction: Direction) -> Callable[[tuple[str, ...]], tuple[Tensor, ...]]:
    """-> what computes (out,) or (out, dq, dk, dv) by the engines of each direction."""
    leaves, attend = op_of(inputs)
    leaves = tuple(x.detach().requires_grad_(direction != "forward") for x in leaves)
    dout = inputs.laid_out(inputs.dout)

    def computed(engines: tuple[str, ...]) -> tuple[Tensor, ...]:
        if direction == "forward":
            with torch.no_grad(), use_engine(engines[0]):
                return (attend(*leaves),)
        with use_engine(engines[0]):
            out = attend(*leaves)
        with use_engine(engines[1]):
            return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return computed


def measure(case: Case, direction: Direction, seconds: float, rounds: int | None = None) -> Found:
    """One call, by auto and by all that could serve it. Results are held against float64 first: that compiles, too.

    seconds, rounds: as timing.compared.
    """
    inputs = Inputs.of(case)
    problem, computed = inputs.problem(), computing(inputs, direction)
    routes = {way: select(problem, way).engine.name for way in ways(direction)}
    choices = {"auto": ("auto",) * len(routes), **{named(engines): engines for engines in able(problem, direction)}}
    reference = Reference(inputs, direction)
    for name, engines in choices.items():
        packed = tuple(x if inputs.varlen else x.flatten(0, 1) for x in computed(engines))
        if (complaint := reference.complaint(packed, 1.0)) is not None:
            return Found(case, direction, routes, {}, {}, f"{name}: {complaint}")
    runs: dict[str, Callable[[], object]] = {name: partial(computed, engines) for name, engines in choices.items()}
    found = Found(case, direction, routes, *compared(runs, inputs.device, seconds, SPREAD, rounds, HOPELESS))
    if rounds is None and found.regret > DOUBTFUL and found.ratios[found.best].spread > SPREAD:
        again = compared(runs, inputs.device, LONGER * seconds, SPREAD, hopeless=HOPELESS)
        found = Found(case, direction, routes, *again)
    return found


# -------------------------------------------------------------------------------------------------------------- telling


def _value(part: object, name: str, problem: Problem) -> float:
    rule: tuning.Rule = getattr(part, name)
    return rule.value(problem.features)


def deciding(found: Found) -> dict[str, float]:
    """The table's rules, "part.field", which took another engine than the fastest; and their values at this call."""
    table = tuning.current()
    decided: dict[str, float] = {}
    problem = Inputs.of(found.case).problem()
    for (way, chosen), best in zip(found.routes.items(), found.best.split("+"), strict=True):
        if chosen == best:
            continue
        if "split_kv" in (chosen, best):
            name = split_kv.rule(problem, best if chosen == "split_kv" else chosen)
            decided |= {} if name is None else {f"split_kv.{name}": _value(table.split_kv, name, problem)}
        else:
            name = sdpa_cpu.rule(problem, way)
            decided |= {} if name is None else {f"sdpa_cpu.{name}": _value(table.sdpa_cpu, name, problem)}
    return decided


def record_of(found: Found) -> dict[str, Any]:
    record = described(found.case, found.direction) | {"peer": "ours", "auto": found.auto}
    if found.complaint is not None:
        return {**record, "status": "mismatch", "reason": found.complaint}
    engines: dict[str, dict[str, float]] = {}
    for name, timing in found.timings.items():
        engines[name] = {"median_s": timing.median, "iqr_s": timing.iqr}
        if ratio := found.ratios.get(name):
            engines[name] |= {"auto_over_it": ratio.median, "spread": ratio.spread, "rounds": ratio.rounds}
    regret = {"best": found.best, "regret": found.regret, "decided_by": deciding(found)}
    return {**record, "status": "chosen", **regret, "engines": engines}


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest of the values that this part of them does not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * part - 1e-9) - 1)]


def summary(regrets: Sequence[float]) -> dict[str, float]:
    """By name, as TARGETS."""
    return {"median": statistics.median(regrets), "95th percentile": percentile(regrets, 0.95), "worst": max(regrets)}


def _decided(record: dict[str, Any]) -> str:
    if record["best"] == record["auto"]:
        return "nothing: auto took the fastest, and what is left is its own time, or noise"
    return ", ".join(f"{name} {value:+.2f}" for name, value in record["decided_by"].items()) or "no rule"


HEADER = f"{'case':<60}{'dir':>8}  {'auto takes':<19}{'regret':>6}  time / auto's, by name"


def row(record: dict[str, Any]) -> str:
    line = f"{record['case']:<60}{'fwd' if record['direction'] == 'forward' else 'fwd+bwd':>8}  {record['auto']:<19}"
    if record["status"] == "mismatch":
        return f"{line} WRONG {record['reason']}"
    ratios = {name: times["auto_over_it"] for name, times in record["engines"].items() if name != "auto"}
    return f"{line}{record['regret']:>6.2f}  " + ", ".join(f"{name} {1 / ratio:.2f}" for name, ratio in ratios.items())


def told(records: Sequence[dict[str, Any]], worst: int = 5) -> list[str]:
    """Lines: median, 95th percentile and worst beside the targets, and the worst calls by name."""
    right = [record for record in records if record["status"] == "chosen"]
    if not right:
        return []
    lines = [f"regret = time of auto / time of the fastest, {len(right)} calls"]
    for name, value in summary([record["regret"] for record in right]).items():
        missed = "" if value <= TARGETS[name] else ": MISSED"
        lines.append(f"  {name:<16}{value:>7.3f}  target {TARGETS[name]:.2f}{missed}")
    lines.append("the worst:")
    for record in sorted(right, key=lambda record: -record["regret"])[:worst]:
        spread = record["engines"].get(record["best"], {}).get("spread", 0.0)
        lines += [
            f"  {record['regret']:.2f} (spread {spread:.0%})  {record['case']}, {record['direction']}: "
            f"auto took {record['auto']}, fastest {record['best']}",
            f"        decided by: {_decided(record)}",
        ]
    return lines
