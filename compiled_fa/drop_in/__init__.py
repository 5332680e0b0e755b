"""flash_attn, served by this package: code that says `import flash_attn` runs unmodified.

    compiled_fa.drop_in.install()                       in a program, before it imports who asks for flash_attn
    python -m compiled_fa.run script.py args...         for a program and all that it starts
    python -m compiled_fa.drop_in --install             for an environment: a distribution named flash-attn

All three serve one folder, v2_7_4/, in which flash_attn lies as an importable package beside its metadata; v2_6_3/ has
what differs in the profile of that name. The files say what is offered, and import it from where it is.

    finder.py    the way into a program, and what is said about names that are not offered
    present.py   what is called flash_attn here already
    wheel.py     the distribution
    late.py      clients that were imported before
    refused.py   the names that are not offered, and why
    extension.py flash_attn_gpu
"""

from .finder import install, uninstall
from .present import PROFILES

__all__ = ["PROFILES", "install", "uninstall"]
