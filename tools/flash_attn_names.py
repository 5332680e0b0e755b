"""python -m tools.flash_attn_names: the tables of docs/flash_attn.md, from what the code offers, limits and refuses.

python -m tools.flash_attn_names --write      put them there
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from compiled_fa import compat
from compiled_fa.drop_in import limits, present, refused

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flash_attn.md"
START, END = "<!-- {}: made by python -m tools.flash_attn_names -->", "<!-- end -->"


def modules() -> list[str]:
    """Modules of flash_attn that are offered."""
    top = present.folder(present.PROFILES[0])
    parts = [file.relative_to(top).with_suffix("").parts for file in top.rglob("*.py")]
    return sorted(".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts)


def offered(module: str) -> list[str]:
    found = compat.offered(module)
    return list(getattr(found, "__all__", ()))


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names, key=lambda name: (name.startswith("_"), name.lower())))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def names_table() -> list[str]:
    """A row for the names of a module of which the same is to be said."""
    rows = [_row("module", "names", "state", "what is to be known"), _row(*["---"] * 4)]
    for module in modules():
        said: dict[tuple[compat.Verdict, str], list[str]] = {}
        for name in offered(module):
            said.setdefault(compat.of_name(f"{module}.{name}"), []).append(name)
        for name, why in refused.NAMES.get(module, {}).items():
            said.setdefault((compat.REFUSED, why), []).append(name)
        order = [compat.SERVED, compat.LIMITED, compat.REFUSED]
        for (state, why), names in sorted(said.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
            rows.append(_row(f"`{module}`", _names(names), state, why))
    why_modules: dict[str, list[str]] = {}
    for module, why in (refused.MODULES | refused.ELSEWHERE).items():
        why_modules.setdefault(why, []).append(module)
    rows += [_row(_names(names), "all", compat.REFUSED, why) for why, names in sorted(why_modules.items())]
    return rows


def arguments_table() -> list[str]:
    """A row for arguments of which the same is to be said."""
    said: dict[tuple[str, str], list[str]] = {}
    for dotted, arguments in limits.ARGUMENTS.items():
        for argument, limit in arguments.items():
            said.setdefault((argument, limit.words), []).append(dotted.rpartition(".")[2])
    rows = [_row("argument", "of", "what is to be known"), _row(*["---"] * 3)]
    return rows + [
        _row(f"`{argument}`", _names(set(names)), words) for (argument, words), names in sorted(said.items())
    ]


def with_tables(page: str) -> str:
    """A page, its tables made anew."""
    for name, rows in (("names", names_table()), ("arguments", arguments_table())):
        start = START.format(name)
        before, _, rest = page.partition(start)
        page = "\n".join([before + start, *rows, END + rest.partition(END)[2]])
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.flash_attn_names", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write them into docs/flash_attn.md")
    asked = parser.parse_args(arguments)
    if asked.write:
        PAGE.write_text(with_tables(PAGE.read_text()))
    else:
        print("\n".join([*names_table(), "", *arguments_table()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
