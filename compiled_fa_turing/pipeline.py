"""Software-pipelined loads without cp.async, from what Triton's own pipeliner makes for Ampere.

Triton pipelines a loop (num_stages=2) with asynchronous copies from global to shared memory, which start at sm_80:

    for i:                                      for i:
        wait for the copies of i                    value = load i+1, to registers        <- hoisted
        local_load, dot ...                         local_load, dot ...
        async_copy i+1, global to shared            local_store value, to shared

The right-hand side is what this module makes of it. The load, with the arithmetic of its address and mask, goes to the
top of the body, where it is in flight during the whole iteration's math; the store to shared memory stands where the
copy stood, after the last use of the buffer. Triton places the barriers afterwards, from the stores and loads it sees.
"""

import re

from compiled_fa_turing.dots import element_of, may_write
from compiled_fa_turing.ir_text import Module, Operation, UnexpectedIRError, single

_COPY = re.compile(
    r"^\s*(?P<token>%[\w$.\-]+) = ttg\.async_copy_global_to_local (?P<pointer>%[^,\s]+), (?P<buffer>%[^,\s]+)"
    r"(?: mask (?P<mask>%\S+))?(?: other (?P<other>%\S+))?"
    r"(?P<policy>(?: cacheModifier = \w+)?(?: evictionPolicy = \w+)?)"  # Triton 3.6 to 3.8
    r"(?: \{(?P<cache_policy>cachePolicy = #tt\.cache_policy<[^<>]*>)?(?:, )?(?:contiguity = \d+ : i32)?\})?"  # 3.9
    r" : (?P<type>tensor<.*>) -> <(?P<memory>.*)>(?: loc\(.*\))?$"
)
_POINTER = re.compile(r"!tt\.ptr<(\w+)>")
_TOKEN_OPERAND = re.compile(r" token %[\w$.\-#]+")
# Operations on shared memory and layouts that Triton's lowering adds to a loop; none writes global memory.
_LOCAL = {
    *("ttg.async_commit_group", "ttg.async_copy_global_to_local", "ttg.async_wait", "ttg.convert_layout"),
    *("ttg.local_alloc", "ttg.local_dealloc", "ttg.local_load", "ttg.memdesc_index", "ttg.memdesc_reinterpret"),
    *("ttg.memdesc_reshape", "ttg.memdesc_subslice", "ttg.memdesc_subview", "ttg.memdesc_trans"),
}
# What may be part of an address: it is moved up with the load. No shared memory, so that no barrier moves with it.
_ADDRESS = {
    *("tt.addptr", "tt.bitcast", "tt.broadcast", "tt.expand_dims", "tt.load", "tt.make_range", "tt.splat", "tt.trans"),
}


def without_async_copies(module: Module) -> None:
    """Rewrites a TTGIR module that Triton has pipelined for Ampere, in place."""
    for operation in module.operations():
        if _is_pipelined(operation):
            unsafe = next((i for i in operation.inside() if i.name not in _LOCAL and may_write(i)), None)
            if unsafe:
                raise UnexpectedIRError(f"in a pipelined loop: {unsafe.line.strip()}")
    for operation in [module.operation, *module.operations()]:
        for region in operation.regions:
            region[:] = _rewrite_block(region, hoist=_is_pipelined(operation))


def _is_pipelined(operation: Operation) -> bool:
    """Whether it is a loop that waits for what its previous iteration copied.

    Copies directly in another block are for the first iteration of a loop that follows. They are not moved: there may
    be stores before them.
    """
    return operation.name == "scf.for" and "!ttg.async.token" in operation.line


def _is_copy(operation: Operation) -> bool:
    return operation.name == "ttg.async_copy_global_to_local"


def _rewrite_block(block: list[Operation | str], hoist: bool) -> list[Operation | str]:
    operations = [item for item in block if isinstance(item, Operation)]
    loads: dict[int, list[Operation]] = {}  # by the copy that they replace
    stores: dict[int, list[Operation]] = {}
    hoisted: set[int] = set()
    top: list[Operation] = []
    for copy in filter(_is_copy, operations):
        loads[id(copy)], stores[id(copy)], chain = _split_copy(copy, operations)
        if hoist and chain is not None:
            hoisted.update(id(operation) for operation in chain)
            top += loads.pop(id(copy))
    top = [operation for operation in operations if id(operation) in hoisted] + top
    rewritten: list[Operation | str] = []
    for item in block:
        if isinstance(item, str):
            rewritten.append(item)
        elif id(item) in stores:
            rewritten += loads.get(id(item), []) + stores[id(item)]
        elif item.name in ("ttg.async_commit_group", "ttg.async_wait"):
            rewritten.append(_poison_token(item))
        elif id(item) not in hoisted:
            if item.name == "ttg.local_load":
                item.line = _TOKEN_OPERAND.sub("", item.line)
            rewritten.append(item)
    labels = [item for item in rewritten if isinstance(item, str)]
    if labels and top:
        raise UnexpectedIRError(f"a block label in a pipelined loop: {labels[0].strip()}")
    return [*top, *rewritten]


def _split_copy(
    copy: Operation, block: list[Operation]
) -> tuple[list[Operation], list[Operation], list[Operation] | None]:
    """One asynchronous copy -> its load, its store, and what the load needs of the block (None if that cannot move)."""
    match = _COPY.match(copy.line)
    if not match:
        raise UnexpectedIRError(f"copy: {copy.line.strip()}")
    token, pointer, mask, other = match["token"], match["pointer"], match["mask"], match["other"]
    value_type = _POINTER.sub(r"\1", match["type"], count=1)
    value = f"%turing_value_{token.strip('%')}"
    load = []
    operands = [pointer]
    if mask:
        operands += [mask, other or f"{value}_other"]
        if not other:  # an asynchronous copy fills with zeros
            zero = "0.000000e+00" if "f" in element_of(value_type) else "0"
            load.append(f"{operands[-1]} = arith.constant dense<{zero}> : {value_type}")
    policy = f" {{{match['cache_policy']}}}" if match["cache_policy"] else match["policy"]
    load.append(f"{value} = tt.load {', '.join(operands)}{policy} : {match['type']}")
    store = f"ttg.local_store {value}, {match['buffer']} : {value_type} -> !ttg.memdesc<{match['memory']}>"

    def operation(text: str) -> Operation:
        return single(f"{copy.indent}{text}{copy.location}")

    needed = [name for name in (pointer, mask, other) if name]
    return (
        [operation(text) for text in load],
        [operation(store), _poison_token(copy)],
        _chain(needed, block),
    )


def _chain(names: list[str], block: list[Operation]) -> list[Operation] | None:
    """The operations of the block that the names need, or None if one of them has to stay where it is."""
    defined_by = {result: operation for operation in block for result in operation.results}
    chain: dict[int, Operation] = {}
    pending = [name.split("#")[0] for name in names]
    while pending:
        operation = defined_by.get(pending.pop())
        if operation is None or id(operation) in chain:  # None: defined outside, or an argument of the loop
            continue
        if operation.regions or not (operation.name in _ADDRESS or operation.name.startswith("arith.")):
            return None
        chain[id(operation)] = operation
        pending += operation.operands
    return list(chain.values())


def _poison_token(operation: Operation) -> Operation:
    """The tokens that order asynchronous copies are carried around the loop; nothing reads these."""
    return single(f"{operation.indent}{operation.results[0]} = ub.poison : !ttg.async.token{operation.location}")
