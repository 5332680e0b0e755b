"""Transposed dot operands, read from the shared buffer that the tile already lies in.

A backward pass multiplies by a tile and by its transpose. Triton puts the tile into shared memory for the one dot, and
takes it through a second buffer, with two barriers, to the layout whose transpose is the operand of the other:

    tile = load                                        tile = load
    buffer = local_alloc tile                          buffer = local_alloc tile
    operand = trans(convert_layout tile)               turned = memdesc_trans buffer
    dot (local_load buffer), dot operand               dot (local_load buffer), dot (local_load turned)

The right-hand side is what this module makes of it: ldmatrix transposes 16-bit elements on the way. Loaded right before
its use (`late`), the operand takes no registers meanwhile, and the buffer lives longer: others cannot have its place.
The idea is Chennesxu's, who has it in the Triton fork triton-turing.
"""

import collections
import re

from compiled_fa_turing.ir_text import Module, Operation, single

_ALLOC = re.compile(
    r"^\s*(?P<buffer>%\S+) = ttg\.local_alloc (?P<value>%\S+) : \(tensor<[^()]*>\) -> "
    r"(?P<type>!ttg\.memdesc<(?P<rows>\d+)x(?P<columns>\d+)xf16, (?P<layout>#shared\d*), #smem>)(?: loc\(.*\))?$"
)
_CONVERT = re.compile(r"^\s*(?P<result>%\S+) = ttg\.convert_layout (?P<value>%\S+) : ")
_TRANS = re.compile(
    r"^\s*(?P<result>%\S+) = tt\.trans (?P<value>%\S+) \{order = array<i32: 1, 0>\} : tensor<.*> -> "
    r"(?P<type>tensor<\d+x\d+xf16, #ttg\.dot_op<\{.*\}>>)(?: loc\(.*\))?$"
)
_SHARED = re.compile(
    r"^(?P<alias>#shared\d*) = (?P<start>#ttg\.swizzled_shared<\{.*, order = \[)(?P<order>0, 1|1, 0)\]\}>$"
)


def from_shared_memory(module: Module, late: bool) -> bool:
    """Rewrites a TTGIR module in place; late: loads operands right before their use. Whether there was one."""
    layouts = {match["alias"]: match for line in module.before if (match := _SHARED.match(line))}
    turned: dict[str, str] = {}
    for operation in [module.operation, *module.operations()]:
        for region in operation.regions:
            region[:] = _rewrite_block(region, layouts, turned, late)
    if turned:
        at = max(i for i, line in enumerate(module.before) if _SHARED.match(line)) + 1
        module.before[at:at] = turned.values()
    return bool(turned)


def _rewrite_block(
    block: list[Operation | str], layouts: dict[str, re.Match[str]], turned: dict[str, str], late: bool
) -> list[Operation | str]:
    uses: collections.Counter[str] = collections.Counter()  # in the block: other blocks may have the same names
    for item in block:
        if isinstance(item, Operation):
            for operation in (item, *item.inside()):
                uses.update(operation.operands)
    buffers: dict[str, re.Match[str]] = {}  # by the tile that lies in it
    converted: dict[str, str] = {}  # what a conversion's only use may be in place of
    waiting: dict[str, list[Operation]] = {}  # by the operand that they make
    rewritten: list[Operation | str] = []
    for item in block:
        if isinstance(item, str):
            rewritten.append(item)
            continue
        if alloc := _ALLOC.match(item.line):
            buffers.setdefault(alloc["value"], alloc)
        if convert := _CONVERT.match(item.line):
            converted[convert["result"]] = convert["value"]
        trans = _TRANS.match(item.line)
        source = converted.get(trans["value"]) if trans else None
        if trans and source in buffers and uses[trans["value"]] == 1 and buffers[source]["layout"] in layouts:
            load = _load(item, trans, buffers[source], layouts, turned)
            if late:
                waiting[trans["result"]] = load
            else:
                rewritten += load
            continue
        for name in [name for name in waiting if item.regions or name in item.operands]:
            rewritten += waiting.pop(name)
        rewritten.append(item)
    unused = {result for result, value in converted.items() if uses[result] == 1 and value in buffers}
    gone = unused - {name for item in rewritten if isinstance(item, Operation) for name in item.operands}
    return [item for item in rewritten if isinstance(item, str) or not gone.intersection(item.results)]


def _load(
    operation: Operation,
    trans: re.Match[str],
    alloc: re.Match[str],
    layouts: dict[str, re.Match[str]],
    turned: dict[str, str],
) -> list[Operation]:
    """What loads the operand from the buffer; the layout of the turned buffer is among the module's then."""
    layout = layouts[alloc["layout"]]
    alias = f"#turing_{layout['alias'].strip('#')}"
    order = ", ".join(reversed(layout["order"].split(", ")))
    turned[alias] = f"{alias} = {layout['start']}{order}]}}>"
    name = f"%turing_turned_{trans['result'].strip('%')}"
    type_ = f"!ttg.memdesc<{alloc['columns']}x{alloc['rows']}xf16, {alias}, #smem>"
    lines = (
        f"{name} = ttg.memdesc_trans {alloc['buffer']} {{order = array<i32: 1, 0>}} : {alloc['type']} -> {type_}",
        f"{trans['result']} = ttg.local_load {name} : {type_} -> {trans['type']}",
    )
    return [single(f"{operation.indent}{line}{operation.location}") for line in lines]
