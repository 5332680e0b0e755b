"""Decides, on Triton IR (TTIR), what becomes of each dot and each loop of a kernel compiled for Turing.

Turing's tensor cores multiply fp16 (m16n8k8) and int8 (m8n8k16). The Ampere pipeline that the stage borrows would also
give instructions to bf16, tf32 and fp64, which Turing lacks. So the dots are prepared first:

    fp16, int8       left alone: tensor cores
    fp8 (E5M2)       operands widened to fp16, exactly: tensor cores
    bf16             operands widened to fp32, exactly, as Triton's own lowering below sm_80 does: FMA
    fp32             input precision IEEE, which no tensor core has: FMA
    anything else    (fp64, scaled dots, new kinds): the whole kernel is left to Triton

A loop may be pipelined only if nothing in it can write what its loads read, since pipelining moves the loads of one
iteration before the writes of the one before.
"""

import dataclasses
import re

from compiled_fa_turing.ir_text import Module, Operation, UnexpectedIRError, single

TENSOR_CORE = {("f16", "f16", "f16"), ("f16", "f16", "f32"), ("i8", "i8", "i32")}
_WIDENED = {
    ("f8E5M2", "f8E5M2", "f32"): ("tt.fp_to_fp {} : {} -> {}", "f16"),
    ("bf16", "bf16", "f32"): ("arith.extf {} : {} to {}", "f32"),
}

# What a pipelined loop may contain: operations that compute, and loads. Everything else (stores, atomics, calls,
# barriers, prints, operations this list has never heard of) may write memory or order accesses to it.
_PURE_DIALECTS = ("arith.", "math.", "ub.poison")
_PURE = {
    *("scf.condition", "scf.for", "scf.if", "scf.while", "scf.yield"),
    *("tt.addptr", "tt.bitcast", "tt.broadcast", "tt.cat", "tt.clampf", "tt.dot", "tt.expand_dims", "tt.fp_to_fp"),
    *("tt.gather", "tt.get_num_programs", "tt.get_program_id", "tt.histogram", "tt.int_to_ptr", "tt.join", "tt.load"),
    *("tt.make_range", "tt.map_elementwise", "tt.map_elementwise.return", "tt.mulhiui", "tt.precise_divf"),
    *("tt.precise_sqrt", "tt.ptr_to_int", "tt.reduce", "tt.reduce.return", "tt.reshape", "tt.scan", "tt.scan.return"),
    *("tt.splat", "tt.split", "tt.trans", "tt.unsplat"),
}
_PURE_IF_SAID = {"tt.elementwise_inline_asm", "tt.extern_elementwise"}  # these carry `pure = true` or `pure = false`
_VOLATILE = re.compile(r"isVolatile = true|cacheModifier = cv|cache_modifier = cv")
_STAGES = re.compile(r"tt\.num_stages = (?P<stages>\d+) : i32")
_CLOSING = re.compile(r"^(?P<brace>\s*\})(?: \{(?P<attributes>[^{}]*)\})?(?P<location>(?: loc\(.*\))?)$")


def element_of(tensor_type: str) -> str:
    """The f16 of tensor<64x32xf16, #mma>."""
    match = re.match(r"tensor<(?:\d+x)+(\w+)[,>]", tensor_type)
    if not match:
        raise UnexpectedIRError(f"type: {tensor_type}")
    return match[1]


@dataclasses.dataclass(frozen=True)
class Dot:
    """The parts of the line of a tt.dot, with or without layouts in its types."""

    result: str
    a: str
    b: str
    c: str
    precision: str
    attributes: str
    a_type: str
    b_type: str
    d_type: str

    _LINE = re.compile(
        r"^\s*(?P<result>%\S+) = tt\.dot (?P<a>%[^,\s]+), (?P<b>%[^,\s]+), (?P<c>%[^,\s]+)"
        r"(?P<precision>(?:, inputPrecision = \w+)?)(?P<attributes>(?: \{[^{}]*\})?)"
        r" : (?P<a_type>tensor<[^*]*>) \* (?P<b_type>tensor<[^*]*>) -> (?P<d_type>tensor<.*?>)(?: loc\(.*\))?$"
    )

    @classmethod
    def of(cls, operation: Operation) -> "Dot":
        match = cls._LINE.match(operation.line)
        if not match:
            raise UnexpectedIRError(f"dot: {operation.line.strip()}")
        return cls(**match.groupdict())

    @property
    def elements(self) -> tuple[str, str, str]:
        return element_of(self.a_type), element_of(self.b_type), element_of(self.d_type)

    @property
    def on_tensor_cores(self) -> bool:
        """Whether Turing's tensor cores will do it, once its operands are widened."""
        return self.elements in TENSOR_CORE or self.elements == ("f8E5M2", "f8E5M2", "f32")

    def __str__(self) -> str:
        return (
            f"{self.result} = tt.dot {self.a}, {self.b}, {self.c}{self.precision}{self.attributes}"
            f" : {self.a_type} * {self.b_type} -> {self.d_type}"
        )


def may_be_prefetched(module: Module) -> bool:
    """Whether Triton's prefetch pass may have the kernel: no dot's operands are of single bytes.

    The pass loads a part of the next iteration's operands from shared memory before this one's dot, and carries it
    around the loop. LLVM carries it element by element, a register each: int8 takes four times the registers that it
    has, next to an accumulator that leaves no room, and instructions to take it apart and put it together again.
    """
    operations = (operation for operation in module.operations() if operation.name == "tt.dot")
    return all(Dot.of(operation).elements != ("i8", "i8", "i32") for operation in operations)


def may_write(operation: Operation) -> bool:
    """Whether the operation, its regions aside, may write memory or keep loads from moving over it."""
    if operation.name in _PURE_IF_SAID:
        return "pure = true" not in operation.line
    if operation.name == "tt.load":
        return bool(_VOLATILE.search(operation.line))
    return operation.name not in _PURE and not operation.name.startswith(_PURE_DIALECTS)


def prepare(module: Module, most_stages: int) -> bool:
    """Rewrites a TTIR module for the stage, in place; False if it has no dot for Turing's tensor cores.

    No loop keeps a number of stages of its own above `most_stages`, and loops that cannot be pipelined get 1.

    Raises UnexpectedIRError for a kernel that is better left to Triton altogether.
    """
    operations = list(module.operations())
    dots = [Dot.of(operation) for operation in operations if operation.name == "tt.dot"]
    if not any(dot.on_tensor_cores for dot in dots):
        return False
    for operation in operations:
        if operation.name == "tt.dot_scaled":
            raise UnexpectedIRError("a scaled dot")
        if any(result.startswith("%turing_") for result in operation.results):
            raise UnexpectedIRError(f"a value has a name of ours: {operation.line.strip()}")
    module.operation.rewrite_regions(_prepare_dot)
    for operation in module.operations():
        if operation.name == "scf.for":
            unsafe = any(may_write(inner) for inner in operation.inside())
            _limit_stages(operation, 1 if unsafe else most_stages)
    return True


def _prepare_dot(operation: Operation) -> list[Operation]:
    if operation.name != "tt.dot":
        return [operation]
    dot = Dot.of(operation)
    if dot.elements in TENSOR_CORE:
        return [operation]
    before = []
    if dot.elements != ("f32", "f32", "f32"):
        if dot.elements not in _WIDENED:
            raise UnexpectedIRError(f"a dot of {' and '.join(dot.elements[:2])} into {dot.elements[2]}")
        convert, wide = _WIDENED[dot.elements]
        values = [f"%turing_{side}_{dot.result.strip('%')}" for side in "ab"]
        types = [t.replace(f"x{element_of(t)}>", f"x{wide}>") for t in (dot.a_type, dot.b_type)]
        for value, narrow, narrow_type, wide_type in zip(
            values, (dot.a, dot.b), (dot.a_type, dot.b_type), types, strict=True
        ):
            line = f"{operation.indent}{value} = {convert.format(narrow, narrow_type, wide_type)}{operation.location}"
            before.append(single(line))
        dot = dataclasses.replace(dot, a=values[0], b=values[1], a_type=types[0], b_type=types[1])
    dot = dataclasses.replace(dot, precision="")  # nothing is IEEE
    return [*before, single(f"{operation.indent}{dot}{operation.location}")]


def _limit_stages(loop: Operation, most: int) -> None:
    """Lowers a loop's own number of stages to `most`. A loop's attributes stand after its closing brace.

    A loop that has no number gets one only to forbid pipelining: of a loop that has one, Triton pipelines every load;
    of another, only the loads that feed dots. And loops that ask to be flattened stay nested, as they do without the
    stage: one loop of both would have the outer one's stores in it.
    """
    match = _CLOSING.match(loop.closings[-1])
    if not match:
        raise UnexpectedIRError(f"end of a loop: {loop.closings[-1].strip()}")
    kept = []
    number = 1 if most == 1 else None
    for attribute in filter(None, (match["attributes"] or "").split(", ")):
        if stages := _STAGES.fullmatch(attribute):
            number = min(int(stages["stages"]), most)
        elif attribute != "tt.flatten":
            kept.append(attribute)
    if number is not None:
        kept.append(f"tt.num_stages = {number} : i32")
    attributes = f" {{{', '.join(kept)}}}" if kept else ""
    loop.closings[-1] = f"{match['brace']}{attributes}{match['location']}"
