"""python -m compiled_fa: the environment, the engine, and a check of both."""

import sys

from .check.report import main

sys.exit(main())
