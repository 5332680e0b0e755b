"""Measure this machine, and write a table of tuned numbers for it.

    python -m tools.tune --output mine.json
    COMPILED_FA_TUNING=mine.json python -m compiled_fa         # says that it is in force

For each number that chooses an engine, or that cuts tiles, one way to serve a call is timed beside the other, in turns,
until the ratio is known to 5 %. What cannot be known so well in the time that there is stays as it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Inputs
from bench.records import cpu_model
from compiled_fa import ops, tuning
from compiled_fa.inductor.steps import eager_reason
from compiled_fa.tuning import NEVER, Tuning
from compiled_fa.tuning.classes import cpu_class
from compiled_fa.tuning.files import PARTS, save
from tools.tuning_search import Found, Pick, Rim, Run, Step, settle_all, told

LENGTH = 2048  # at which tiles are cut
WIDTH = 4 * 64  # of the key heads of what split_kv is timed with
BF16 = torch.bfloat16


def _together(*runs: Run) -> Run:
    def run() -> None:
        for one in runs:
            one()

    return run


def _forward(case: Case, engine: str) -> Run:
    inputs = Inputs.of(case)
    leaves = [inputs.laid_out(x) for x in (inputs.q, inputs.k, inputs.v)]
    if inputs.varlen:
        return partial(ops.varlen_attention, *leaves, *inputs.packing, None, *inputs.options, engine)
    return partial(ops.attention, *leaves, *inputs.options, engine)


def _backward(case: Case, engine: str) -> Run:
    """Of a dense case, without its forward."""
    inputs = Inputs.of(case)
    leaves = [inputs.laid_out(x) for x in (inputs.q, inputs.k, inputs.v)]
    results = ops.attention(*leaves, *inputs.options, engine)
    return partial(
        ops.attention_backward, inputs.laid_out(inputs.dout), None, *results, *leaves, *inputs.options, engine
    )


def _both(case: Case, engine: str) -> Run:
    return _together(_forward(case, engine), _backward(case, engine))


# --------------------------------------------------------------------------------------------- a size -> a pair of ways


def _gradients(causal: bool, dtype: torch.dtype, length: int) -> tuple[Run, Run]:
    case = Case.uniform(length, causal=causal, dtype=dtype)
    return _backward(case, "tiled"), _backward(case, "sdpa_cpu")


def _in_bf16(keys: int) -> tuple[Run, Run]:
    cases = [Case.uniform(keys, causal=causal, dtype=BF16) for causal in (False, True)]
    tiled, sdpa = (_together(*(_forward(case, engine) for case in cases)) for engine in ("tiled", "sdpa_cpu"))
    return tiled, sdpa


def _few_queries(queries: int, keys: int) -> tuple[Run, Run]:
    """Of so many heads on one key head that split_kv does not serve them."""
    case = Case(((queries, keys),), dense=True, nheads_k=1, heads_per_key=32)
    return _forward(case, "tiled"), _forward(case, "sdpa_cpu")


def _cache(elements: int, dtype: torch.dtype) -> Case:
    """One query on short caches of so many elements of keys: below what counts as many keys."""
    rows = elements // WIDTH
    batch = -(-rows // 512)
    return Case(((1, rows // batch),) * batch, dense=True, nheads_k=4, heads_per_key=4, dtype=dtype)


def _decoding(dtypes: tuple[torch.dtype, ...], instead_of: str, elements: int) -> tuple[Run, Run]:
    cases = [_cache(elements, dtype) for dtype in dtypes]
    split, other = (_together(*(_forward(case, engine) for case in cases)) for engine in ("split_kv", instead_of))
    return split, other


def _packed(elements: int, dtype: torch.dtype) -> Case:
    """Sequences of 1 to 64 tokens, of so many elements of q."""
    lengths: list[int] = []
    left = elements // WIDTH
    while left:
        lengths.append(min(left, 1 + 37 * len(lengths) % 64))
        left -= lengths[-1]
    return Case.packed(lengths, nheads_k=4, dtype=dtype)


def _short(instead_of: str, elements: int) -> tuple[Run, Run]:
    cases = [_packed(elements, dtype) for dtype in (torch.float32, BF16)]
    split, other = (_together(*(_forward(case, engine) for case in cases)) for engine in ("split_kv", instead_of))
    return split, other


def steps(table: Tuning) -> list[Step]:
    """What is measured, in an order in which each needs only those before it."""
    whole, causal = Case.uniform(LENGTH, nheads_k=4), Case.uniform(LENGTH, nheads_k=4, causal=True)
    half = Case.uniform(LENGTH, nheads_k=4, dtype=BF16)
    found: list[Step] = [
        Pick("sdpa_cpu.widens_bf16", "bf16 forward + backward, 512 tokens", (0, 1),
             partial(_both, Case.uniform(512, nheads_k=4, dtype=BF16), "sdpa_cpu")),
        Pick("tiled.tile", f"forward + backward, {LENGTH} tokens", (256, 512, 1024), partial(_both, whole, "tiled")),
        Pick("tiled.banded_tile", f"causal, {LENGTH} tokens", (128, 256, 512), partial(_both, causal, "tiled")),
        Pick("tiled.score_bytes_a_core", f"forward + backward, {LENGTH} tokens", (1 << 19, 1 << 20, 1 << 21),
             partial(_both, whole, "tiled")),
    ]  # fmt: skip
    if table.tiled.bf16_from_scores != NEVER:  # else its products are in fp32
        found.append(
            Pick("tiled.bf16_tile_queries", f"bf16, {LENGTH} tokens", (512, 1024, 2048), partial(_both, half, "tiled"))
        )
    tokens, beside = (64, 128, 256, 512, 1024), "tiles / PyTorch's kernel"
    found += [
        Rim("sdpa_cpu.bf16_tiles_from_keys", f"{beside}, bf16 forward:", tokens, _in_bf16),
        Rim("sdpa_cpu.backward_tiles_from_queries", f"{beside}, backward:", tokens,
            partial(_gradients, False, torch.float32)),
        Rim("sdpa_cpu.causal_backward_tiles_from_queries", f"{beside}, causal backward:", tokens,
            partial(_gradients, True, torch.float32)),
        Rim("sdpa_cpu.bf16_backward_tiles_from_queries", f"{beside}, bf16 backward:", tokens,
            partial(_gradients, False, BF16)),
        Rim("sdpa_cpu.bf16_causal_backward_tiles_from_queries", f"{beside}, bf16 causal backward:", tokens,
            partial(_gradients, True, BF16)),
        Rim("sdpa_cpu.few_queries_tiles_from_keys", f"{beside}, 1 query of 32 heads on a head of keys:",
            (1024, 4096, 16384, 65536), partial(_few_queries, 1)),
        Rim("sdpa_cpu.few_queries", f"{beside}, queries of 32 heads on 16384 keys of a head:",
            (1, 2, 4, 8, 16), lambda queries: _few_queries(queries, 16384), up_to=True),
    ]  # fmt: skip
    caches, packed = [tuple(1 << power for power in powers) for powers in ((14, 16, 18, 20, 22), (15, 17, 19, 21))]
    found += [
        Rim("split_kv.decode_from_elements", "split_kv / tiles, elements of keys:", caches,
            partial(_decoding, (torch.float32, BF16), "tiled")),
        Rim("split_kv.decode_from_elements_beside_sdpa_16bit", "split_kv / PyTorch's kernel, bf16 keys:", caches,
            partial(_decoding, (BF16,), "sdpa_cpu")),
        Rim("split_kv.decode_from_elements_beside_sdpa", "split_kv / PyTorch's kernel, fp32 keys:", caches,
            partial(_decoding, (torch.float32,), "sdpa_cpu")),
        Rim("split_kv.short_from_elements", "split_kv / tiles, elements of q:", packed, partial(_short, "tiled")),
        Rim("split_kv.short_from_elements_beside_sdpa", "split_kv / PyTorch's kernel, elements of q:", packed,
            partial(_short, "sdpa_cpu")),
    ]  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------------- the table


def here() -> str:
    """This machine and the day, as a table names it."""
    threads = torch.get_num_threads()
    return f"{threads} cores of {cpu_model()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, by tools.tune"


def signed(table: Tuning, before: Tuning, found: list[Found], place: str) -> Tuning:
    """The table with a name, and in measured_on what was measured here and where the rest is from."""
    parts: dict[str, Any] = {}
    for part, form in PARTS.items():
        settled = [result.name.partition(".")[2] for result in found if result.settled and result.name.startswith(part)]
        numbers, old = getattr(table, part), getattr(before, part).measured_on
        if settled:
            rest = "" if len(settled) == len(fields(form)) - 1 else f"; the rest: {old or 'not measured'}"
            numbers = replace(numbers, measured_on=f"{place}: {', '.join(settled)}{rest}")
        parts[part] = numbers
    return replace(table, name=f"{before.name}, tuned here", **parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description="Measures this machine and writes a table of tuned numbers, which COMPILED_FA_TUNING=FILE takes.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="it takes no longer, or hardly (default: 10)")
    parser.add_argument("--output", type=Path, default=Path("tuning.json"), metavar="FILE", help="default: tuning.json")
    parser.add_argument("--match", default="", metavar="TEXT", help="only numbers whose names contain this")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """-> exit status: 1 where nothing could be measured, and nothing was written."""
    options = _parser().parse_args(arguments)
    if (reason := eager_reason()) is not None:
        print(f"nothing to measure: engines on this CPU do not run compiled, as people have them: {reason}")
        return 1
    before = tuning.current()
    print(f"{here()}; class {cpu_class()}, table {before.name}", flush=True)
    chosen = [step for step in steps(before) if options.match in step.name]
    with torch.no_grad():
        table, found = settle_all(chosen, before, 60.0 * options.minutes, lambda result: print(result, flush=True))
    if not any(result.settled for result in found):
        print("nothing was measured: no file is written")
        return 1
    save(signed(table, before, found, here()), options.output)
    changes = [result for result in found if result.new != result.old]
    kept = [result for result in found if not result.settled]
    print(
        f"\n{len(changes)} of {len(found)} numbers changed against the table {before.name}, {len(kept)} not measured:"
    )
    for result in changes:
        print(f"  {result.name} {told(result.old)} -> {told(result.new)}")
    print(f"COMPILED_FA_TUNING={options.output} puts {options.output} in force")
    return 0


if __name__ == "__main__":
    sys.exit(main())
