"""For processes that are to have the stage from their start: who is asked whether, and what happens when Triton comes.

Two roads lead here. The file that `python -m compiled_fa_turing --enable` puts into an environment (site_hook.py) calls
at_start() in each Python of it. Plugins of vLLM and SGLang, which load us in all their processes, and the programs that
`python -m compiled_fa_turing script.py` runs call if_asked().
"""

import sys

from compiled_fa_turing import config


def at_start() -> None:
    """In an environment that has the stage: enable it with Triton, unless COMPILED_FA_TURING says 0."""
    _enable_unless("0")


def if_asked() -> None:
    """Enable the stage with Triton where COMPILED_FA_TURING says 1."""
    _enable_unless("0", "auto")


def _enable_unless(*values: str) -> None:
    """A process that starts is not stopped by a wrong value, but it says so."""
    try:
        value = config.TURING.read()
    except ValueError as error:
        sys.stderr.write(f"compiled_fa_turing: {error}\n")
        return
    if value not in values:
        from compiled_fa_turing import hook

        hook.enable_with_triton()
