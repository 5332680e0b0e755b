"""Do tests notice? Changes the package in one place at a time, runs tests, and tells which changes none of them saw.

    python -m tools.mutate compiled_fa/validation.py compiled_fa/scores --tests tests/test_bad_input.py --count 10

A change is small: another comparison, a sign, an `and` for an `or`, a number one off, a `not` or a check left out, min
for max. Places are drawn at random (--seed) from the files and folders named. Everything happens in a copy of the files
that git knows or would add; the checkout is never written to. A survivor is a test that is missing, or a change that
changes nothing: somebody has to look.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What may stand in the place of an operator: of a comparison, and of others.
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
EXTREMES = {"min": "max", "amin": "amax", "minimum": "maximum"}
EXTREMES |= {greatest: least for least, greatest in EXTREMES.items()}
CHECKS = ("refuse", "check", "validat", "equal")  # beginnings of names, after underscores


@dataclass(frozen=True)
class Mutation:
    """Bytes start to stop of a file, replaced. before, after: for people."""

    file: Path
    line: int
    start: int
    stop: int
    before: str
    after: str

    def applied(self, source: str) -> str:
        encoded = source.encode()
        return (encoded[: self.start] + self.after.encode() + encoded[self.stop :]).decode()

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}:{self.line}: {before}  ->  {after}"


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below one, without annotations and without what is inside f-strings, whose places Python does not tell."""
    if isinstance(node, ast.JoinedStr):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _code(child)


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_check(statement: ast.stmt) -> bool:
    """Does it raise, or call what refuses?"""
    if isinstance(statement, ast.Raise):
        return True
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
        return False
    function = statement.value.func
    of_validation = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "validation"
    return of_validation or _called(statement.value).lstrip("_").startswith(CHECKS)


def _changed(node: ast.AST) -> list[str]:
    """What may stand in the node's place."""
    if isinstance(node, ast.stmt):
        only_checks = isinstance(node, ast.If) and not node.orelse and all(map(_is_check, node.body))
        return ["pass"] if only_checks or _is_check(node) else []
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [f"({ast.literal_eval(ast.unparse(node)) + step!r})" for step in (1, -1)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [f"({ast.unparse(node.operand)})"]
    return [f"({ast.unparse(other)})" for other in _others(node)]


def _others(node: ast.AST) -> Iterator[ast.expr]:
    """The expression with another operator, or the other extreme."""
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            ops = [*node.ops[:at], COMPARISONS[type(operator)](), *node.ops[at + 1 :]]
            yield ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield ast.BinOp(node.left, BINARY[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Call) and (other := EXTREMES.get(_called(node))):
        function = ast.Attribute(node.func.value, other) if isinstance(node.func, ast.Attribute) else ast.Name(other)
        yield ast.Call(function, node.args, node.keywords)


def mutations(file: Path, source: str) -> list[Mutation]:
    """All that there are in a file."""
    lines = source.encode().splitlines(keepends=True)
    first = [0]
    for line in lines:
        first.append(first[-1] + len(line))
    found = []
    for node in _code(ast.parse(source)):
        if not isinstance(node, ast.expr | ast.stmt):
            continue
        start = first[node.lineno - 1] + node.col_offset
        stop = first[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        before = source.encode()[start:stop].decode()
        found += [Mutation(file, node.lineno, start, stop, before, after) for after in _changed(node)]
    return found


def drawn(places: Sequence[Path], root: Path, count: int, seed: int) -> list[Mutation]:
    """So many mutations of Python files in these places, each on a line of its own: a line is drawn, then a change."""
    by_line: dict[tuple[Path, int], list[Mutation]] = {}
    for place in places:
        for path in sorted((root / place).rglob("*.py")) if (root / place).is_dir() else [root / place]:
            for mutation in mutations(path.relative_to(root), path.read_text()):
                by_line.setdefault((mutation.file, mutation.line), []).append(mutation)
    generator = random.Random(seed)
    lines = generator.sample(sorted(by_line), min(count, len(by_line)))
    return [generator.choice(by_line[line]) for line in lines]


def copied(root: Path, target: Path) -> None:
    """The files of a checkout that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def noticed(tests: Sequence[str], tree: Path, timeout: float) -> str | None:
    """What noticed, a test or the clock; None: all tests pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # bytecode is told apart by seconds, too long here
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no end within {timeout:.0f} s"
    if process.returncode == 0:
        return None
    failed = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" - ")[0] if failed else f"pytest ended with status {process.returncode}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """-> exit status: 1 where a mutation survives, 2 where tests fail without any."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("places", nargs="+", type=Path, help="Python files, or folders of them")
    add("--tests", nargs="+", required=True, metavar="TEST", help="what pytest is to run")
    add("--count", type=int, default=10, help="how many changes (default: 10)")
    add("--seed", type=int, default=0, help="of the choice of places (default: 0)")
    add("--timeout", type=float, default=900.0, help="seconds for a run of the tests (default: 900)")
    options = parser.parse_args(arguments)
    chosen = drawn(options.places, root, options.count, options.seed)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copied(root, tree)
        if (failure := noticed(options.tests, tree, options.timeout)) is not None:
            print(f"without any change: {failure}")
            return 2
        for number, mutation in enumerate(chosen, 1):
            path, start = tree / mutation.file, time.monotonic()
            source = path.read_text()
            try:
                path.write_text(mutation.applied(source))
                by = noticed(options.tests, tree, options.timeout)
            finally:
                path.write_text(source)
            took = f"{time.monotonic() - start:.0f} s"
            print(f"[{number}/{len(chosen)}, {took}] {mutation}\n    {by or 'SURVIVES'}", flush=True)
            if by is None:
                survivors.append(mutation)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} noticed")
    print(*(f"survives: {mutation}" for mutation in survivors), sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
