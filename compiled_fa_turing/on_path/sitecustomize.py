"""In PYTHONPATH of a program that `python -m compiled_fa_turing` runs: the stage, then any other sitecustomize.

Python imports a module of this name when it starts, and only the first one that it finds.
"""

import importlib.machinery
import importlib.util
import os
import sys

import compiled_fa_turing.startup

compiled_fa_turing.startup.if_asked()

_here = os.path.dirname(os.path.abspath(__file__))
_others = [folder for folder in sys.path if os.path.abspath(folder) != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    sys.modules["sitecustomize"] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
