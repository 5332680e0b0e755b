"""python -m compiled_fa_turing (or compiled_fa.turing): Turing's tensor cores for an environment, or one program."""

from __future__ import annotations

import argparse
import sys

from compiled_fa_turing import config, hook, program, site_hook


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa_turing",
        usage="%(prog)s [-h] (--enable | --disable | --status | script.py [args ...] | -m module [args ...])",
        description="Turing's tensor cores for every Triton kernel that an environment, or a program with all the "
        "processes it starts, compiles for a T4, RTX 20xx or Quadro RTX.",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--enable", action="store_true", help="for every Python of this environment, from now on")
    action.add_argument("--disable", action="store_true", help="undo --enable")
    action.add_argument("--status", action="store_true", help="what there is; exit code 0: enabled, 1: not")
    action.add_argument("-m", dest="module", metavar="MODULE", help="a module to run, as python -m does")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a script, and the program's arguments")
    given = sys.argv[1:] if arguments is None else arguments
    # argparse would look for its own options behind the module's name.
    own = given[:2] if given[:1] == ["-m"] else given
    asked = parser.parse_args(own)
    line = given if asked.module else asked.program
    switch = asked.enable or asked.disable or asked.status
    if bool(line) == bool(switch):
        parser.error("one of --enable, --disable, --status, a script, or -m module is wanted")
    try:
        if line:
            return program.run_with_turing(line)
        if asked.enable:
            print(f"enabled for every Python of this environment: {site_hook.install()}")
        elif asked.disable:
            print(f"removed {site_hook.path()}" if site_hook.remove() else f"there was no {site_hook.path()}")
        else:
            return _status()
    except (OSError, RuntimeError, ValueError) as error:
        print(f"compiled_fa_turing: {error}", file=sys.stderr)
        return 1
    return 0


def _status() -> int:
    """Raises ValueError for an environment variable that means nothing."""
    installed, value = site_hook.is_installed(), config.TURING.read()
    on = installed and value != "0"
    print(f"this environment: {f'enabled by {site_hook.path()}' if installed else 'not enabled'}")
    print(f"{config.TURING.name}: {value}")
    if hook.has_tensor_cores():
        print("Triton: before 3.3, which has Turing's tensor cores itself")
    else:
        print(f"Triton: {hook.missing() or 'has all that is needed'}")
    return 0 if on else 1


if __name__ == "__main__":
    sys.exit(main())
