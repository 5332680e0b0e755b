"""Runs a few instructions on 32 threads and reads back what they left, for the tests of single instructions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from hypothesis import settings

from tools.ptx import launch
from tools.ptx.parser import SIZES
from tools.ptx.registers import DTYPES

HEADER = ".version 8.8\n.target sm_75\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"


examples = settings(deadline=None, max_examples=25)  # each runs 32 threads, so 32 cases


def module(body: str, parameters: int, *, registers: str = "", num_threads: int = 32) -> str:
    """A kernel `k` of so many pointers; %tid32 and %tid64 hold the thread's number, %in0, ... the pointers."""
    names = ", ".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.b64 %in{i}, [k_param_{i}];" for i in range(parameters))
    return f"""{HEADER}
.visible .entry k({names})
.reqntid {num_threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<64>;
    .reg .b64 %d<64>, %in<16>;
    .reg .b32 %tid32;
    .reg .b64 %tid64, %at;
    {registers}
    mov.u32 %tid32, %tid.x;
    cvt.u64.u32 %tid64, %tid32;
    {loads}
    {body}
    ret;
}}
"""


def _move(direction: str, name: str, kind: str, index: int) -> str:
    """Loads or stores a thread's element of a buffer. Predicates travel as 0 or 1 in 32 bits."""
    size = 4 if kind == "pred" else SIZES[kind]
    place = f"mad.lo.s64 %at, %tid64, {size}, %in{index};\n"
    bits = f"b{8 * size}"
    if direction == "load":
        load = f"ld.global.{bits} {'%r63' if kind == 'pred' else name}, [%at];"
        return place + load + (f"setp.ne.b32 {name}, %r63, 0;" if kind == "pred" else "")
    if kind == "pred":
        return place + f"selp.b32 %r63, 1, 0, {name}; st.global.b32 [%at], %r63;"
    return place + f"st.global.{bits} [%at], {name};"


def execute(
    text: str, inputs: Mapping[str, tuple[str, np.ndarray]], outputs: Mapping[str, str], *, shared_bytes: int = 0
) -> dict[str, np.ndarray]:
    """Runs `text` with registers set from arrays of 32 elements: name -> (PTX type, values); name -> type to read.

    f16x2 arrays hold 64 halves. Register families: %p predicates, %h 16 bits, %r 32 bits, %d 64 bits.
    """
    arrays: dict[str, np.ndarray] = {}
    body = []
    for i, (name, (kind, values)) in enumerate(inputs.items()):
        dtype = np.uint32 if kind == "pred" else DTYPES[kind]
        arrays[name] = np.ascontiguousarray(values, dtype)
        assert arrays[name].size == (64 if kind == "f16x2" else 32)
        body.append(_move("load", name, kind, i))
    body.append(text)
    for i, (name, kind) in enumerate(outputs.items(), start=len(inputs)):
        arrays[f"out {name}"] = np.zeros(64 if kind == "f16x2" else 32, np.uint32 if kind == "pred" else DTYPES[kind])
        body.append(_move("store", name, kind, i))
    launch(module("\n".join(body), len(arrays)), (1,), arrays, shared_bytes=shared_bytes)
    return {name: arrays[f"out {name}"] for name in outputs}


def bits(values: np.ndarray) -> list[int]:
    patterns: list[int] = values.view(f"u{values.dtype.itemsize}").tolist()
    return patterns
