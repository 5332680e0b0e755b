"""Clients that were imported before flash_attn was there to be found.

transformers asks when it needs to know, and remembers the answer: that is cleared. diffusers asks when it is imported;
it is told as long as it has not acted on the answer. Others have made up their mind.

Private API: caches and two variables in transformers.utils.import_utils and diffusers.utils.import_utils, tried with
transformers 5.24 and diffusers 0.42.
"""

from __future__ import annotations

import sys
import warnings

# Modules in which a client has made up its mind.
DECIDED = ("diffusers.models.attention_dispatch", "xformers.ops.fmha.flash", "yunchang.globals")


def tell_clients(version: str | None) -> None:
    """flash_attn of this version can be found from now on; None: it no longer can."""
    _transformers()
    told = _diffusers(version)
    decided = [name for name in DECIDED if name in sys.modules and name.split(".")[0] not in told]
    if decided and version is not None:
        warnings.warn(
            f"{', '.join(decided)} looked for flash_attn when imported, and did not find it: call "
            "compiled_fa.drop_in.install() before that import, or start the program by python -m compiled_fa.run",
            RuntimeWarning,
            stacklevel=3,
        )


def _transformers() -> None:
    module = sys.modules.get("transformers.utils.import_utils")
    for value in list(vars(module).values()) if module is not None else []:
        clear = getattr(value, "cache_clear", None)
        if callable(clear) and getattr(value, "__module__", None) == "transformers.utils.import_utils":
            clear()


def _diffusers(version: str | None) -> tuple[str, ...]:
    """Told, where it is not too late."""
    module = sys.modules.get("diffusers.utils.import_utils")
    if module is None or DECIDED[0] in sys.modules or not hasattr(module, "_flash_attn_available"):
        return ()
    vars(module).update(_flash_attn_available=version is not None, _flash_attn_version=version or "N/A")
    return ("diffusers",)
