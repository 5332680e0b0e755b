"""python -m compiled_fa.run: a program whose flash_attn is this package, and all processes that it starts.

    python -m compiled_fa.run script.py args...
    python -m compiled_fa.run -m module args...

is `python script.py args...` with a folder in PYTHONPATH, in which flash_attn lies: so child and spawned processes find
it too, whatever starts them, unless they are told to ignore PYTHONPATH (python -E, -I).

    python -m compiled_fa.run --sdpa [--report] script.py args...

lets F.scaled_dot_product_attention run on our ops, too: in the program's own process and those forked from it, not in
those that it spawns. --report says at the end what was served.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from compiled_fa_turing.program import become, command

from . import config
from .drop_in import present


def main(arguments: list[str] | None = None) -> int:
    """Does not return where a process can become another program (not on Windows)."""
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa.run",
        usage="%(prog)s [-h] [--profile {2.7.4,2.6.3}] [--sdpa [--report]] (script.py | -m module) [args ...]",
        description="Run a program whose flash_attn is this package; in all processes that it starts, too.",
    )
    parser.add_argument("--profile", choices=present.PROFILES, default=present.PROFILES[0], help="the version it sees")
    parser.add_argument(
        "--sdpa", action="store_true", help="F.scaled_dot_product_attention by our ops where they serve"
    )
    parser.add_argument(
        "--report", action="store_true", help="with --sdpa: say at the end what was served, and why not"
    )
    parser.add_argument("-m", dest="module", help="a module to run, as python -m does")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a script, and the program's arguments")
    given = sys.argv[1:] if arguments is None else arguments
    # argparse would look for its own options behind the module's name.
    split = given.index("-m") + 2 if "-m" in given and _options_only(given[: given.index("-m")]) else len(given)
    asked = parser.parse_args(given[:split])
    program = ["-m", asked.module, *given[split:]] if asked.module else asked.program
    if not program:
        parser.error("a script or -m module is wanted")
    if asked.report and not asked.sdpa:
        parser.error("--report is of --sdpa")
    found = present.on_path()
    if found is not None and not found.ours:
        print(f"compiled_fa.run: there is a real {found}: uninstall it, or run the program without us", file=sys.stderr)
        return 1
    if sys.flags.ignore_environment:
        print("compiled_fa.run: this python ignores PYTHONPATH, by which flash_attn is found (-E, -I)", file=sys.stderr)
        return 1
    config.add_to_python_path(str(present.folder(asked.profile)))
    if asked.sdpa:
        program = ["-m", "compiled_fa.run_with_sdpa", *(["--report"] if asked.report else []), *program]
    return become(command(program))


def _options_only(arguments: Sequence[str]) -> bool:
    """Is there no script among them?"""
    values = [at + 1 for at, argument in enumerate(arguments) if argument == "--profile"]
    return all(argument.startswith("-") or at in values for at, argument in enumerate(arguments))


if __name__ == "__main__":
    sys.exit(main())
