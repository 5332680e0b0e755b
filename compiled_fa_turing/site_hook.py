"""A file in site-packages that gives every Python of an environment the stage, however it is started.

A .pth file's line that begins with "import" is executed when Python starts (docs.python.org/3/library/site.html). So
spawned and forkserver children, torchrun's workers and Inductor's have it as their parents do, and no sitecustomize
that is there is hidden.
"""

import pathlib
import site
import sysconfig

NAME = "compiled_fa_turing.pth"
# With the package gone, every Python would complain about a file that is still there.
LINE = 'import sys; exec("try: import compiled_fa_turing.startup as s\\nexcept ImportError: pass\\nelse: s.at_start()")'


def path() -> pathlib.Path:
    """Where the file of this environment is, or would be."""
    return pathlib.Path(sysconfig.get_path("purelib")) / NAME


def is_installed() -> bool:
    return path().is_file()


def install() -> pathlib.Path:
    """Raises OSError where this environment must not be written to."""
    path().write_text(LINE + "\n", encoding="ascii")
    return path()


def remove() -> bool:
    """Was there one? Raises OSError where this environment must not be written to."""
    was_there = is_installed()
    path().unlink(missing_ok=True)
    return was_there


def folders() -> list[str]:
    """Where installed packages are found by every Python of this environment."""
    found = [*site.getsitepackages(), site.getusersitepackages()] if site.ENABLE_USER_SITE else site.getsitepackages()
    return [str(pathlib.Path(folder).resolve()) for folder in found]
