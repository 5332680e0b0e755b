"""python -m compiled_fa.run_with_sdpa: what `python -m compiled_fa.run --sdpa` becomes; its process runs the program.

python -m compiled_fa.run_with_sdpa [--report] (script.py | -m module) args...
"""

from __future__ import annotations

import os
import runpy
import sys

from .scaled_dot_product import enable_sdpa


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    report = given[0] == "--report"
    program = given[report:]
    calls = enable_sdpa()
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        if report:
            print(f"scaled_dot_product_attention: {calls}", file=sys.stderr)


if __name__ == "__main__":
    main()
