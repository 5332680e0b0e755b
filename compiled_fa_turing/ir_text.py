"""Reads the text that Triton prints for a module: one operation a line, regions in braces.

Triton's Python bindings can walk a module, but cannot move an operation, name its operands or print them, so the
rewriting in this package is done on the printed text. The parser knows only the shapes of line that it has to;
anything else raises UnexpectedIRError, and the caller then leaves the kernel alone. What it returns prints back to the
same text, and the rewritten text goes through MLIR's own parser and verifier, which reject a use before its definition
or a wrong type.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

NAME = re.compile(r"%[\w$.\-]+")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_RESULTS = re.compile(r"(?P<results>%[\w$.\-]+(?::\d+)?(?:, %[\w$.\-]+(?::\d+)?)*) = ")
_OPERATION = re.compile(r'"?(?P<name>[a-z_]\w*(?:\.[a-z_]\w*)+|module)"?(?=[\s({<]|$)')
_LOCATION = re.compile(r" loc\((?:#loc\d*|unknown|callsite\(.*\)|fused.*|\"\".*)\)$")


class UnexpectedIRError(Exception):
    """The text is not of a shape that this package knows, or would not be safe to rewrite."""


@dataclasses.dataclass
class Operation:
    """One operation: its line, and for each of its regions the contents and the line that closes it.

    A region is a list of operations and of the lines that label its blocks; `closings[i]` ends `regions[i]`.
    """

    name: str
    line: str
    results: tuple[str, ...]
    regions: list[list["Operation | str"]] = dataclasses.field(default_factory=list)
    closings: list[str] = dataclasses.field(default_factory=list)

    @property
    def indent(self) -> str:
        return self.line[: len(self.line) - len(self.line.lstrip())]

    @property
    def location(self) -> str:
        """The location at the end of the line (" loc(#loc7)"), or nothing."""
        match = _LOCATION.search(self.line)
        return match[0] if match else ""

    @property
    def operands(self) -> tuple[str, ...]:
        """Names on the operation's own line that are not its results; what its regions use is not among them."""
        return tuple(name for name in NAME.findall(_STRING.sub("", self.line)) if name not in self.results)

    def inside(self) -> Iterator["Operation"]:
        """Every operation in its regions, however deep."""
        for region in self.regions:
            for item in region:
                if isinstance(item, Operation):
                    yield item
                    yield from item.inside()

    def lines(self) -> Iterator[str]:
        yield self.line
        for region, closing in zip(self.regions, self.closings, strict=True):
            for item in region:
                if isinstance(item, Operation):
                    yield from item.lines()
                else:
                    yield item
            yield closing

    def rewrite_regions(self, rewrite: Callable[["Operation"], "list[Operation]"]) -> None:
        """Replaces every operation inside by what `rewrite` makes of it, innermost first."""
        for region in self.regions:
            rewritten: list[Operation | str] = []
            for item in region:
                if isinstance(item, Operation):
                    item.rewrite_regions(rewrite)
                    rewritten += rewrite(item)
                else:
                    rewritten.append(item)
            region[:] = rewritten


@dataclasses.dataclass
class Module:
    """A whole printed module: alias lines (#blocked = ..., #loc1 = ...) around one `module` operation."""

    before: list[str]
    operation: Operation
    after: list[str]

    def __str__(self) -> str:
        return "\n".join([*self.before, *self.operation.lines(), *self.after])

    def operations(self) -> Iterator[Operation]:
        yield from self.operation.inside()


def single(line: str) -> Operation:
    """The operation on one line that opens no region."""
    operation = _operation(line)
    if _opened(line):
        raise UnexpectedIRError(f"expected an operation of one line: {line.strip()}")
    return operation


def parse(text: str) -> Module:
    lines = text.rstrip("\n").split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith("module")), None)
    if start is None:
        raise UnexpectedIRError("no module")
    operation, end = _parse_operation(lines, start)
    before, after = lines[:start], lines[end:]
    for line in before + after:
        if line and not line.startswith("#"):
            raise UnexpectedIRError(f"outside the module: {line}")
    return Module(before, operation, after)


def _opened(line: str) -> int:
    """How many more braces the line opens than it closes, strings aside."""
    bare = _STRING.sub('""', line)
    return bare.count("{") - bare.count("}")


def _operation(line: str) -> Operation:
    text = line.strip()
    match = _RESULTS.match(text)
    results = tuple(NAME.findall(match["results"])) if match else ()
    # "%a:2" is one name for two results; NAME leaves the ":2" out and uses write "%a#1".
    name = _OPERATION.match(text, match.end() if match else 0)
    if not name:
        raise UnexpectedIRError(f"no operation: {text}")
    return Operation(name["name"], line, results)


def _parse_operation(lines: list[str], at: int) -> tuple[Operation, int]:
    operation = _operation(lines[at])
    opened = _opened(lines[at])
    at += 1
    if opened == 0:
        return operation, at
    if opened != 1 or not lines[at - 1].endswith("{"):
        raise UnexpectedIRError(f"braces: {operation.line.strip()}")
    while True:
        region: list[Operation | str] = []
        while at < len(lines) and not lines[at].lstrip().startswith("}"):
            if lines[at].lstrip().startswith("^"):
                if _opened(lines[at]):
                    raise UnexpectedIRError(f"braces: {lines[at].strip()}")
                region.append(lines[at])
                at += 1
            else:
                inner, at = _parse_operation(lines, at)
                region.append(inner)
        if at == len(lines):
            raise UnexpectedIRError(f"never closed: {operation.line.strip()}")
        closing = lines[at]
        operation.regions.append(region)
        operation.closings.append(closing)
        at += 1
        opened = _opened(closing)
        if opened == -1:
            return operation, at
        if opened != 0 or not closing.endswith("{"):  # "} else {" opens the next region
            raise UnexpectedIRError(f"braces: {closing.strip()}")
