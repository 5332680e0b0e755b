"""python -m compiled_fa.compat path/to/project: which names of flash_attn a project imports, and are they served?

Sources are read, not run: imports, what is called through them, and the arguments of these calls. A line for each:

    model.py:12: flash_attn.flash_attn_func: served
    model.py:40: flash_attn.modules.mha.MHA(dwconv=): refused: must be False: ...

The exit code is 0 where all is served, if with a limit, 1 where something is refused, and 2 where nothing can be read
or a path is not there.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from .drop_in import limits, refused
from .drop_in.present import NAME, PROFILES

Verdict = Literal["served", "served with a limit", "refused"]
SERVED: Verdict = "served"
LIMITED: Verdict = "served with a limit"
REFUSED: Verdict = "refused"

FOREIGN = tuple(name for name in refused.ELSEWHERE if "." not in name)
PASSED_OVER = {"node_modules", "site-packages", "build", "dist", "__pycache__"}
# Results that a name had up to flash_attn 2.6, where code takes so many.
OLD_RESULTS = {
    "flash_attn.bert_padding.unpad_input": 4,
    "flash_attn.flash_attn_interface._flash_attn_forward": 8,
    "flash_attn.flash_attn_interface._flash_attn_varlen_forward": 8,
}
OLD = f"{{}} results, as up to flash_attn 2.6: profile {PROFILES[1]} gives them"


@dataclass(frozen=True, order=True)
class Finding:
    """What a line of a file asks for. what: a name, or a name with an argument."""

    file: str
    line: int
    what: str
    verdict: Verdict
    why: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}: {self.verdict}{self.why and f': {self.why}'}"


def offered(module: str) -> ModuleType | None:
    """What we offer as this module of flash_attn, by its own place: nobody is shown a flash_attn."""
    try:
        return importlib.import_module(f"{__package__}.drop_in.v{PROFILES[0].replace('.', '_')}.{module}")
    except ImportError:
        return None


def of_name(dotted: str) -> tuple[Verdict, str]:
    """Is a name of flash_attn served, "flash_attn.modules.mha.MHA", or a module? -> a verdict, and why."""
    for elsewhere, why in refused.ELSEWHERE.items():
        if dotted == elsewhere or dotted.startswith(elsewhere + "."):
            return REFUSED, why
    dotted = _canonical(dotted)
    if offered(dotted) is not None:
        return SERVED, ""
    module, _, name = dotted.rpartition(".")
    found = offered(module)
    if found is None:
        return REFUSED, refused.MODULES.get(dotted) or refused.MODULES.get(module, "flash_attn 2.8 has no such module")
    if name == "__version__" or name in getattr(found, "__all__", ()):
        return (LIMITED, limits.NAMES[dotted]) if dotted in limits.NAMES else (SERVED, "")
    return REFUSED, refused.NAMES.get(module, {}).get(name, "flash_attn 2.8 has no such name")


def of_argument(dotted: str, argument: str, value: ast.expr | None) -> tuple[Verdict, str]:
    """Is an argument of a served name served? value: what is passed; None: it cannot be told."""
    limit = limits.ARGUMENTS.get(_canonical(dotted), {}).get(argument)
    if limit is None:
        return SERVED, ""
    if isinstance(value, ast.Constant) and (value.value == limit.harmless or value.value is None):
        return SERVED, ""
    return (REFUSED if limit.refused and isinstance(value, ast.Constant) else LIMITED), limit.words


def read(source: str, file: str) -> list[Finding]:
    """What a file asks of flash_attn. Raises SyntaxError or ValueError where it is not Python."""
    reader = _Reader(file)
    reader.visit(ast.parse(source, file))
    return sorted(set(reader.findings))


def files_of(path: Path) -> Iterator[Path]:
    """The sources of a project, or a file; not those of environments and builds within it."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*.py")):
        folders = file.relative_to(path).parts[:-1]
        if not any(name in PASSED_OVER or name.startswith(".") for name in folders):
            yield file


def _canonical(dotted: str) -> str:
    """The functions are in two places."""
    parts = dotted.split(".")
    if parts[:2] == [NAME, "flash_attn_interface"] and len(parts) == 3 and parts[2].startswith("flash_attn_"):
        return dotted if parts[2] in ("flash_attn_gpu", "flash_attn_cuda") else f"{NAME}.{parts[2]}"
    return dotted


class _Reader(ast.NodeVisitor):
    """Follows names of flash_attn through a file. Two things of one name in one file are one to it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.findings: list[Finding] = []
        self.means: dict[str, str] = {}  # a name of the file -> the name of flash_attn that it stands for

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            top = alias.name.split(".")[0]
            if top == NAME or top in FOREIGN:
                self._name(node, alias.name)
                self.means[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None or node.module.split(".")[0] not in (NAME, *FOREIGN):
            return
        for alias in node.names:
            if alias.name == "*":
                self._name(node, node.module)
                found = offered(node.module)
                self.means |= {name: f"{node.module}.{name}" for name in getattr(found, "__all__", ())}
                continue
            dotted = f"{node.module}.{alias.name}"
            self._name(node, dotted)
            self.means[alias.asname or alias.name] = dotted

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = self._dotted(node)
        if dotted is None:
            self.generic_visit(node)
        elif _is_name(dotted):
            self._name(node, dotted)

    def visit_Assign(self, node: ast.Assign) -> None:
        call, target = node.value, node.targets[0]
        if isinstance(call, ast.Call) and isinstance(target, (ast.Tuple, ast.List)):
            dotted = self._dotted(call.func)
            starred = any(isinstance(part, ast.Starred) for part in target.elts)
            wanted = OLD_RESULTS.get(dotted or "")
            if wanted is not None and len(target.elts) == wanted and not starred:
                self._add(node, f"{dotted}()", LIMITED, OLD.format(wanted))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        dotted = self._dotted(node.func)
        if dotted is not None and of_name(dotted)[0] != REFUSED:
            self._arguments(node, dotted)
        self.generic_visit(node)

    def _arguments(self, node: ast.Call, dotted: str) -> None:
        parameters = _parameters(dotted)
        if parameters is None:
            return
        given: list[tuple[str | None, ast.expr]] = [(keyword.arg, keyword.value) for keyword in node.keywords]
        for at, value in enumerate(node.args):
            if isinstance(value, ast.Starred):
                break  # what comes after it may be any
            given.append((parameters[at] if at < len(parameters) else f"argument {at + 1}", value))
        for argument, value in given:
            if argument is None:
                self._add(value, f"{dotted}(**)", SERVED, "its arguments cannot be told from here")
            elif argument not in parameters:
                self._add(value, f"{dotted}({argument}=)", REFUSED, "flash_attn 2.8 has no such argument")
            else:
                self._add(value, f"{dotted}({argument}=)", *of_argument(dotted, argument, value))

    def _name(self, node: ast.AST, dotted: str) -> None:
        self._add(node, dotted, *of_name(dotted))

    def _add(self, node: Any, what: str, verdict: Verdict, why: str = "") -> None:
        self.findings.append(Finding(self.file, node.lineno, what, verdict, why))

    def _dotted(self, node: ast.expr) -> str | None:
        """flash_attn's name that an expression stands for."""
        if isinstance(node, ast.Name):
            return self.means.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None


def _is_name(dotted: str) -> bool:
    """A name of a module, and not an attribute of a thing that is in one."""
    module = dotted.rpartition(".")[0]
    return offered(module) is not None or of_name(module)[0] == REFUSED


def _parameters(dotted: str) -> list[str] | None:
    """Names of the arguments of a served function or class, in order; None: it is neither."""
    module, _, name = _canonical(dotted).rpartition(".")
    thing = getattr(offered(module), name, None)
    if thing is None or not callable(thing) or dotted == "flash_attn.bert_padding.rearrange":
        return None
    return list(inspect.signature(thing).parameters)


def report(findings: Iterable[Finding]) -> tuple[list[str], bool]:
    """(Lines for people, and is all of it served?) Arguments without a word to say are counted only."""
    findings = list(findings)
    told = [str(finding) for finding in findings if finding.why or not finding.what.endswith(")")]
    count = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (SERVED, LIMITED, REFUSED)}
    summary = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
    told.append(f"names and arguments: {summary}" if findings else "no name of flash_attn is imported")
    return told, not count[REFUSED]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa.compat",
        description="List what a project's sources ask of flash_attn, and whether this package serves it.",
    )
    parser.add_argument("path", type=Path, nargs="+", help="a project's folder, or a file")
    asked = parser.parse_args(arguments)
    findings: list[Finding] = []
    read_any = False
    missing = [path for path in asked.path if not path.exists()]
    for path in missing:
        print(f"{path}: there is no such file or folder", file=sys.stderr)
    if missing:
        return 2
    for path in asked.path:
        for file in files_of(path):
            try:
                findings += read(file.read_text(encoding="utf-8", errors="replace"), str(file))
                read_any = True
            except (SyntaxError, ValueError) as error:  # up to Python 3.11 zero bytes are a ValueError
                print(f"{file}: cannot be read: {error}", file=sys.stderr)
    if not read_any:
        print("compiled_fa.compat: there is no Python source that can be read", file=sys.stderr)
        return 2
    told, served = report(findings)
    print("\n".join(told))
    return 0 if served else 1


if __name__ == "__main__":
    sys.exit(main())
