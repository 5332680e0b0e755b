"""python -m compiled_fa.drop_in: flash_attn for a whole environment."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import wheel
from .present import PROFILES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa.drop_in",
        description="Make this package flash_attn for a whole environment: for pip, type checkers, every process.",
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--install", action="store_true", help="pip install a wheel named flash-attn that leads here")
    action.add_argument("--status", action="store_true", help="what there is; exit code 0: ours, 1: not")
    action.add_argument("--wheel", metavar="FOLDER", type=Path, help="only write the wheel, for an installer of yours")
    parser.add_argument("--profile", choices=PROFILES, default=PROFILES[0], help="the version that it passes for")
    asked = parser.parse_args(arguments)
    try:
        if asked.status:
            ours, words = wheel.status()
            print(words)
            return 0 if ours else 1
        if asked.wheel:
            asked.wheel.mkdir(parents=True, exist_ok=True)
            print(wheel.build(asked.wheel, asked.profile))
            return 0
        print(f"installed: {wheel.install(asked.profile)}; pip uninstall flash-attn removes it")
    except RuntimeError as error:
        print(f"compiled_fa.drop_in: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
