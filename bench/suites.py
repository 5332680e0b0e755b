"""The suites: which cases, in which directions, against whom. Every case comes small too, for --quick.

The cases are those of which docs/benchmarks.md and bench/NOTES.md speak: their ratios can be read off the tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import Case, Direction

FORWARD: tuple[Direction, ...] = ("forward",)
BOTH: tuple[Direction, ...] = ("forward", "forward+backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPU_PACKAGES = ("flash_attn", "xformers", "turing")
SDPA_BACKENDS = ("SDPA flash", "SDPA efficient", "SDPA cuDNN", "SDPA math")
DENSE_PEERS = ("ours", "naive", "SDPA", "flex", *GPU_PACKAGES)
VARLEN_PEERS = ("ours", "SDPA padded", "SDPA loop", "nested", "flex", *GPU_PACKAGES)
DECODE_PEERS = (
    "ours", "ours dense", "ours cache", "ours one piece", "ours append", "SDPA", "copy", "flex", *GPU_PACKAGES
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    case: Case
    peers: tuple[str, ...] = DENSE_PEERS
    directions: tuple[Direction, ...] = BOTH
    apart: bool = False  # each peer with tensors of its own


def _options(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of the choices, the last changing fastest."""
    found: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        found = [{**options, name: value} for options in found for value in values]
    return found


def dense(quick: bool) -> list[Entry]:
    """Dtypes, head_dims and lengths, causal or not; and 32 query heads on 8 key heads."""
    lengths = (64, 160) if quick else (512, 1024, 2048, 4096, 8192)
    dtypes = DTYPES[:2] if quick else DTYPES
    shapes = _options(dtype=dtypes, head_dim=(64,) if quick else (64, 128), causal=(False, True))
    entries = [Entry(Case.uniform(length, **options)) for options in shapes for length in lengths]
    grouped = _options(dtype=dtypes[:1] if quick else dtypes, causal=(False, True))
    for options in grouped:
        for length in lengths[:1] if quick else (1024, 2048, 4096):
            entries.append(Entry(Case.uniform(length, nheads_k=8, heads_per_key=4, **options)))
    return entries


def varlen(quick: bool) -> list[Entry]:
    """64 sequences of 64 to 1024 tokens; 2,000 of 1 to 64."""
    drawn = random.Random(0)
    some = [drawn.randint(5, 80) if quick else drawn.randint(64, 1024) for _ in range(5 if quick else 64)]
    many = [drawn.randint(1, 64) for _ in range(12 if quick else 2000)]
    options = _options(dtype=DTYPES[:1] if quick else DTYPES, causal=(False, True))
    return [Entry(Case.packed(lengths, **o), VARLEN_PEERS) for lengths in (some, many) for o in options]


def variants(quick: bool) -> list[Entry]:
    """Window, ALiBi, softcap, dropout: where SDPA needs a mask, or has nothing."""
    long, medium, short = (192, 128, 96) if quick else (8192, 4096, 2048)
    window = 16 if quick else 512
    entries = []
    for dtype in DTYPES[:1] if quick else DTYPES:
        entries.append(Entry(Case.uniform(long, dtype=dtype, window_size=(window, 0))))
        for causal in (False, True):
            entries.append(Entry(Case.uniform(medium, dtype=dtype, causal=causal, slopes="paper")))
            entries.append(Entry(Case.uniform(medium, dtype=dtype, causal=causal, softcap=30.0)))
        entries.append(Entry(Case.uniform(short, dtype=dtype, dropout_p=0.1)))
    return entries


def decode(quick: bool) -> list[Entry]:
    """One query a sequence, 16 query heads on 4 key heads, its cache in one piece or in pages; each peer has its own,
    as a model's layers have.

    `ours cache` is flash_attn_with_kvcache in place of flash_attn_func, `ours one piece` that of a cache that is not in
    pages, and `ours append` writes the last key first.
    `copy` is the time in which a large copy moves as many bytes as k and v have: at 60 % of its bandwidth, ours / copy
    is 1.67.
    """
    entries = []
    for dtype in DTYPES[:1] if quick else DTYPES[:2]:
        for cache in (100,) if quick else (1024, 4096, 16384, 65536):
            for batch in (2,) if quick else (1, 4, 16):
                case = Case(((1, cache),) * batch, dense=True, nheads_k=4, heads_per_key=4, dtype=dtype)
                for page_size in (0, 32 if quick else 256):
                    entries.append(Entry(replace(case, page_size=page_size), DECODE_PEERS, FORWARD, apart=True))
    return entries


def short(quick: bool) -> list[Entry]:
    """Lengths where the call costs more than the arithmetic: eager, compiled, and in a compiled layer of a model."""
    entries = []
    for where in ({}, {"compiled": True}, {"compiled": True, "layer": True}):
        for options in _options(dtype=DTYPES[:1] if quick else DTYPES):
            for length in (33,) if quick else (64, 128, 256):
                for batch in (1,) if quick else (1, 8):
                    case = Case.uniform(length, batch, **where, **options)
                    entries.append(Entry(case, directions=BOTH if case.compiled else FORWARD))
    return entries


def scale(quick: bool) -> list[Entry]:
    """One causal head: the time of a useful score must not grow with the length."""
    lengths = (64, 256) if quick else (4096, 16384, 65536)
    return [Entry(Case.uniform(n, nheads_k=1, causal=True), ("ours", "SDPA", *GPU_PACKAGES)) for n in lengths]


def published(quick: bool) -> list[Entry]:
    """The shapes of flash-attention's README, for a GPU: hidden size 2048, 16k tokens, 512 to 16k a sequence."""
    lengths = (64, 128) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    tokens, hidden = (128, 128) if quick else (16384, 2048)
    entries = []
    for options in _options(head_dim=(64, 128), causal=(False, True)):
        heads = hidden // options["head_dim"]
        for n in lengths:
            case = Case.uniform(n, tokens // n, nheads_k=heads, dtype=torch.float16, **options)
            entries.append(Entry(case, (*DENSE_PEERS[:4], *SDPA_BACKENDS, *GPU_PACKAGES)))
    return entries


def tiles(quick: bool) -> list[Entry]:
    """Ours by the tiled engine, for a GPU without a fused kernel: long calls, causal, with a window, packed."""
    lengths = (64, 160) if quick else (1024, 4096, 16384)
    drawn = random.Random(0)
    packed = [drawn.randint(5, 80) if quick else drawn.randint(105, 1004) for _ in range(5 if quick else 64)]
    dtypes = DTYPES[:1] if quick else (torch.float16, torch.float32)
    peers = ("ours", "noflash", "SDPA math", "SDPA efficient")
    masks: list[dict[str, Any]] = [{}, {"causal": True}, {"window_size": (16 if quick else 512, 0)}]
    entries = []
    for dtype in dtypes:
        entries += [Entry(Case.uniform(n, nheads_k=16, dtype=dtype, **mask), peers) for mask in masks for n in lengths]
        of_packed = ("ours", "SDPA padded", "SDPA loop")
        entries += [Entry(Case.packed(packed, dtype=dtype, **mask), of_packed) for mask in masks[:2]]
    return entries


def kernels(quick: bool) -> list[Entry]:
    """For a GPU: kernels of our own beside flex_attention's, in our engine and by itself, and PyTorch's own. Where they
    are not slower, forward and backward, they should serve (compiled_fa/engines/fused/attention.py, `defers`)."""
    long = 192 if quick else 4096
    drawn = random.Random(0)
    packed = [drawn.randint(5, 80) if quick else drawn.randint(105, 1004) for _ in range(5 if quick else 64)]
    many = [drawn.randint(1, 64) for _ in range(12 if quick else 2000)]
    of_ours = ("ours", "ours fused", "ours triton")
    entries = []
    for options in _options(head_dim=(64,) if quick else (64, 128), nheads_k=(8,) if quick else (16,)):
        options["dtype"] = torch.float16
        for masked in ({"causal": True}, {"causal": True, "window_size": (long // 4, 0)}, {"dropout_p": 0.1}):
            case = Case.uniform(long, 1 if quick else 2, **options, **masked)
            entries.append(Entry(case, (*of_ours, "SDPA", "SDPA flash", "flex")))
        for lengths in (packed, many):
            case = Case.packed(lengths, causal=True, **options)
            entries.append(Entry(case, (*of_ours, "nested", "flex", "flash_attn")))
    return entries


def memory(quick: bool) -> list[Entry]:
    """Peaks beside inputs. The last case, one head at 262,144, is the scale that a score matrix forbids."""
    lengths = (512, 1024) if quick else (1024, 2048, 4096, 8192, 16384, 32768)
    peers = ("ours", "naive", "SDPA")
    entries = [Entry(Case.uniform(n, causal=True), peers) for n in lengths]
    if not quick:
        entries.append(Entry(Case.uniform(262144, nheads_k=1, causal=True), ("ours",), BOTH[1:]))
    return entries


def classes(quick: bool) -> list[Entry]:
    """What classes of CPU are compared by: a case of each kind that one of them is, or was, slow at."""
    bf16, long, some = torch.bfloat16, 192 if quick else 4096, 96 if quick else 2048
    beside = ("ours", "SDPA")
    entries = []
    for dtype in (torch.float32, bf16):
        entries += [Entry(Case.uniform(33 if quick else 128, dtype=dtype), beside, FORWARD)]
        entries += [Entry(Case.uniform(some, dtype=dtype), beside)]
        entries += [Entry(Case.uniform(long, dtype=dtype, causal=True), beside)]
    entries += [Entry(Case.uniform(some, dtype=bf16, head_dim=128), beside, FORWARD)]
    entries += [Entry(Case.uniform(some, dtype=bf16, heads_per_key=4), beside, FORWARD)]
    drawn = random.Random(0)
    packed = [drawn.randint(5, 80) if quick else drawn.randint(64, 1024) for _ in range(5 if quick else 16)]
    many = [drawn.randint(1, 64) for _ in range(12 if quick else 2000)]
    for dtype in (torch.float32, bf16):
        for lengths in (packed, many):
            entries += [Entry(Case.packed(lengths, dtype=dtype), ("ours", "SDPA padded", "SDPA loop"), FORWARD)]
        window = Case.uniform(2 * long, dtype=dtype, window_size=(16 if quick else 512, 0))
        entries += [Entry(window, beside, FORWARD)]
        entries += [Entry(Case.uniform(some, dtype=dtype, dropout_p=0.1), beside, BOTH[1:])]
        for keys in (50,) if quick else (256, 4096):
            decoding = Case(((1, keys),), dense=True, nheads_k=8, heads_per_key=4, head_dim=128, dtype=dtype)
            entries += [Entry(decoding, beside, FORWARD)]
    return entries


ENGINES = {"tiles": "tiled"}  # that which a suite measures; all others: the one that is chosen


def latency(quick: bool) -> list[Entry]:
    """Calls so short that the host's time is what is left: one sequence, packed sequences, dropout."""
    length = 33 if quick else 128
    plain = [Case.uniform(length, dtype=torch.float16, causal=True)]
    if not quick:
        plain.append(Case.uniform(length, dtype=torch.float16, dropout_p=0.1))
    packed = Case.packed([length, length // 2, length // 3], dtype=torch.float16, causal=True)
    return [*(Entry(case, ("ours", "SDPA", "flex")) for case in plain), Entry(packed, ("ours", "nested", "flex"))]


RACES: dict[str, Callable[[bool], list[Entry]]] = {
    "dense": dense,
    "varlen": varlen,
    "variants": variants,
    "decode": decode,
    "short": short,
    "classes": classes,
    "scale": scale,
    "published": published,
    "tiles": tiles,
    "kernels": kernels,
}
