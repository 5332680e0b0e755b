"""A traced graph of elementwise operators, printed as Triton functions.

The graph's inputs have levels, which say how often they change: a value is of the highest level among those that it is
made of, and is computed once there. So a term that no key takes part in costs nothing a score, wherever it was written.

    level      changes with                 printed as
    HEAD       the sequence and the head    a function of these inputs that returns all values that others need
    ROW        the query                    likewise, given the values of HEAD
    ELEMENT    the key, the score           a function for each output, given the values of HEAD and ROW
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..engine import CannotServeError

aten = torch.ops.aten


class Level(IntEnum):
    HEAD = 0
    ROW = 1
    ELEMENT = 2


_OPERATORS = {
    aten.add.Tensor: "+",
    aten.sub.Tensor: "-",
    aten.mul.Tensor: "*",
    aten.div.Tensor: "/",
    aten.bitwise_and.Tensor: "&",
    aten.bitwise_and.Scalar: "&",
    aten.bitwise_or.Tensor: "|",
    aten.bitwise_or.Scalar: "|",
    aten.bitwise_xor.Tensor: "^",
    aten.bitwise_xor.Scalar: "^",
    aten.logical_and.default: "&",
    aten.logical_or.default: "|",
    aten.__rshift__.Scalar: ">>",
    aten.bitwise_right_shift.Tensor_Scalar: ">>",
    aten.__lshift__.Scalar: "<<",
    aten.bitwise_left_shift.Tensor_Scalar: "<<",
    **{
        operator: sign
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("eq", "=="), ("ne", "!="))
        for operator in (getattr(getattr(aten, name), kind) for kind in ("Tensor", "Scalar"))
    },
}

_FUNCTIONS = {
    aten.abs.default: "tl.abs",
    aten.exp.default: "tl.exp",
    aten.exp2.default: "tl.exp2",
    aten.log.default: "tl.log",
    aten.maximum.default: "tl.maximum",
    aten.minimum.default: "tl.minimum",
    aten.sigmoid.default: "tl.sigmoid",
    aten.sqrt.default: "tl.sqrt",
    aten.tanh.default: "tanh",  # Triton has none of its own; tiles.py has
    aten.where.self: "tl.where",
    aten.where.ScalarOther: "tl.where",
    aten.where.ScalarSelf: "tl.where",
    aten.where.Scalar: "tl.where",
}

_SAME = {aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default, aten.detach.default}

_DTYPES = {
    torch.bool: "tl.int1",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}


class _Function:
    """The lines of one function, each distinct expression once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}

    def name_of(self, expression: str, name: str) -> str:
        if expression not in self._names:
            self._names[expression] = name
            self.lines.append(f"{name} = {expression}")
        return self._names[expression]


class _Printer:
    def __init__(self, graph: fx.Graph, constants: Mapping[str, Tensor], levels: Mapping[str, Level]) -> None:
        self.functions = {level: _Function() for level in Level}
        self.levels: dict[str, Level] = {}  # of printed names
        self._printed: dict[fx.Node, Any] = {}  # a name, or a number
        for node in graph.nodes:
            if node.op == "placeholder":
                name = str(node.target)
                self.levels[name] = levels[name]
                self._printed[node] = name
            elif node.op == "get_attr":
                self._printed[node] = constants[str(node.target)].item()
            elif node.op == "call_function":
                self._printed[node] = self._call(node)

    def value(self, argument: Any) -> Any:
        return self._printed[argument] if isinstance(argument, fx.Node) else argument

    def _level(self, *values: Any) -> Level:
        return max((self.levels[x] for x in values if isinstance(x, str)), default=Level.HEAD)

    def _named(self, expression: str, level: Level, hint: str) -> str:
        name = self.functions[level].name_of(expression, f"{hint.strip('_')}_{len(self.levels)}")
        self.levels.setdefault(name, level)
        return name

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        hint = node.name.rstrip("0123456789_")
        arguments = [self.value(x) for x in node.args if not isinstance(x, list)]
        level = self._level(*arguments)
        written = [literal(x) for x in arguments]
        if target in _SAME:
            return arguments[0]
        if target in (aten.ones_like.default, aten.zeros_like.default) and node.kwargs.get("dtype") == torch.bool:
            return target is aten.ones_like.default
        if target is aten._to_copy.default:
            source: Any = node.args[0]
            dtype: Any = node.kwargs.get("dtype")
            if isinstance(source, fx.Node) and source.meta["val"].dtype == dtype:
                return arguments[0]
            return self._named(f"{written[0]}.to({_DTYPES[dtype]})", level, hint)
        if target in (aten.bitwise_and.Tensor, aten.logical_and.default) and True in arguments:
            return next((x for x in arguments if x is not True), True)
        if target is aten.div.Tensor and level > (of_divisor := self._level(arguments[1])):
            # A quotient a score by what is the same for many scores: their product with its reciprocal.
            reciprocal = self._named(f"1.0 / {written[1]}", of_divisor, "reciprocal")
            return self._named(f"{written[0]} * {reciprocal}", level, hint)
        if (sign := _OPERATORS.get(target)) is not None and not node.kwargs:
            return self._named(f"{written[0]} {sign} {written[1]}", level, hint)
        if (function := _FUNCTIONS.get(target)) is not None:
            return self._named(f"{function}({', '.join(written)})", level, hint)
        if target is aten.rsub.Scalar and len(arguments) == 2:
            return self._named(f"{written[1]} - {written[0]}", level, hint)
        if target is aten.neg.default:
            return self._named(f"-{written[0]}", level, hint)
        if target in (aten.logical_not.default, aten.bitwise_not.default):
            return self._named(f"~{written[0]}", level, hint)
        if target in (aten.clamp.default, aten.clamp.Tensor):
            bounds = [*arguments[1:], *(node.kwargs.get(name) for name in ("min", "max")[len(arguments) - 1 :])]
            value = arguments[0]
            for function, bound in zip(("tl.maximum", "tl.minimum"), bounds, strict=True):
                if bound is not None:
                    value = self._named(f"{function}({value}, {literal(bound)})", level, hint)
            return value
        if target is aten.select.int and arguments[1] == 0:
            return self._named(f"tl.load({written[0]} + {written[2]})", level, hint)
        if target is aten.index.Tensor:
            return self._load(node, hint)
        raise CannotServeError(f"no Triton code is known for {target}, which a score takes")

    def _load(self, node: fx.Node, hint: str) -> str:
        """A tensor's element at indices; its strides are inputs, named after it."""
        tensor, indices = node.args[0], cast(Any, node.args[1])
        name, at = self.value(tensor), [self.value(index) for index in indices]
        if (level := self._level(name, *at)) != Level.HEAD or None in at:
            raise CannotServeError(f"{name} is read for each query or key, which has no Triton code")
        places = " + ".join(f"{literal(x)} * {name}_stride_{dimension}" for dimension, x in enumerate(at))
        return self._named(f"tl.load({name} + {places})", level, hint)


def literal(value: Any) -> str:
    """A name as it is, or a number as Triton reads it."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return value if isinstance(value, str) else repr(value)


Inputs = Mapping[
    str, tuple[Tensor, Level]
]  # an example to trace with, by the name of a parameter, and how often it changes


def levelled(
    trace: Callable[..., Mapping[str, Tensor]],
    inputs: Inputs,
    parameters: Mapping[str, Sequence[str]],
    more: Sequence[str] = (),
) -> str:
    """The functions of all levels, and one for each result of `trace`, a function of tensors in the order of inputs.

        of_head(<HEAD inputs>, <more>) -> head_values
        of_rows(<ROW inputs>, head_values) -> row_values
        <result>(<parameters>, head_values, row_values)

    parameters: the ELEMENT inputs of each result. more: HEAD parameters that are no tensors of the trace: strides of
    those that are read at indices.
    """
    printer, results = _traced(trace, inputs)
    needed = {name: _needed(printer.functions[Level.ELEMENT].lines, result) for name, result in results.items()}
    wanted: set[str] = set().union(*(words for _, words in needed.values()))
    rows_lines, in_rows = _needed(printer.functions[Level.ROW].lines, *wanted)
    rows = [name for name, level in printer.levels.items() if level == Level.ROW and name in wanted]
    head = [name for name, level in printer.levels.items() if level == Level.HEAD and name in wanted | in_rows]
    head_lines, _ = _needed(printer.functions[Level.HEAD].lines, *head)
    of = {level: [name for name, (_, its) in inputs.items() if its == level] for level in Level}
    functions = [
        _function("of_head", [*of[Level.HEAD], *more], head_lines, _tuple(head)),
        _function(
            "of_rows",
            [*of[Level.ROW], "head_values"],
            [*_unpacked("head_values", head, in_rows), *rows_lines],
            _tuple(rows),
        ),
    ]
    for name, result in results.items():
        lines, words = needed[name]
        taken = [*_unpacked("head_values", head, words), *_unpacked("row_values", rows, words)]
        taking = [*parameters[name], "head_values", "row_values"]
        functions.append(_function(name, taking, [*taken, *lines], literal(result)))
    return "\n\n".join(functions)


def function(name: str, trace: Callable[..., Mapping[str, Tensor]], inputs: Mapping[str, Tensor]) -> str:
    """One function of these parameters, which returns what `trace` does, as a tuple."""
    printer, results = _traced(trace, {of: (example, Level.HEAD) for of, example in inputs.items()})
    lines, _ = _needed(printer.functions[Level.HEAD].lines, *results.values())
    return _function(name, list(inputs), lines, _tuple([literal(x) for x in results.values()]))


def _traced(trace: Callable[..., Mapping[str, Tensor]], inputs: Inputs) -> tuple[_Printer, dict[str, Any]]:
    """With all that can be printed, and the names or numbers of the results."""
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import

    # A tracer knows tensors by identity: each input is one of its own.
    traced = make_fx(trace)(*(example.clone() for example, _ in inputs.values()))
    traced.graph.eliminate_dead_code()
    placeholders = (node for node in traced.graph.nodes if node.op == "placeholder")
    for node, name in zip(placeholders, inputs, strict=True):
        node.target = name
    constants = {name: tensor for name, tensor in vars(traced).items() if isinstance(tensor, Tensor)}
    printer = _Printer(traced.graph, constants, {name: level for name, (_, level) in inputs.items()})
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    return printer, {name: printer.value(node) for name, node in output.args[0].items()}


def _needed(lines: Iterable[str], *results: Any) -> tuple[list[str], set[str]]:
    """Of lines `name = expression`, those that results take, in their order, and all words in them and in results."""
    words = {str(result) for result in results}
    kept = []
    for line in reversed(list(lines)):
        name, _, expression = line.partition(" = ")
        if name in words:
            kept.append(line)
            words |= set("".join(c if c.isalnum() or c == "_" else " " for c in expression).split())
    return kept[::-1], words


def _unpacked(of: str, names: Sequence[str], wanted: Iterable[str]) -> list[str]:
    return [f"{name} = {of}[{at}]" for at, name in enumerate(names) if name in wanted]


def _tuple(names: Sequence[str]) -> str:
    """Of two at least: Triton takes a tuple of none or one for what it is not."""
    return f"({', '.join([*names, *['0'] * (2 - len(names))])})"


def _function(name: str, parameters: Sequence[str], lines: Sequence[str], result: str) -> str:
    body = "\n".join(f"    {line}" for line in [*lines, f"return {result}"])
    return f"@triton.jit\ndef {name}({', '.join(parameters)}):\n{body}\n"
