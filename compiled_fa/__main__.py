"""python -m compiled_fa: the environment, the engine, and a check of both; with `report`: in a file to be shared."""

import sys

from .check import owner, report

sys.exit(owner.main(sys.argv[2:]) if sys.argv[1:2] == ["report"] else report.main())
