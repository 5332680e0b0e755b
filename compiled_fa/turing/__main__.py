"""python -m compiled_fa.turing: as python -m compiled_fa_turing, which does not import torch."""

import sys

from compiled_fa_turing.__main__ import main

sys.exit(main())
