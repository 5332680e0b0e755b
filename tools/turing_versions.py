"""Runs tests/turing under each Triton version that the project supports, and records the result.

    python tools/turing_versions.py [--environments FOLDER] [--only 3.9.0]

Makes a virtual environment a version (in FOLDER, to be used again, or in a temporary one), with one torch for all, and
writes bench/results/turing_versions.json. A quarter of an hour on two cores.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "turing_versions.json"
TORCH = "2.13.0"
TRITON = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TEST_REQUIREMENTS = ("pytest", "hypothesis", "numpy")

# Runs in each environment: the figures of the fused engine's kernels.
FIGURES = """
import json
from tools.offline import Kernel, in_own_process
from tools.offline.engine_kernels import DIRECTIONS
from tools.offline.figures import measure
if __name__ == "__main__":
    kernels = [Kernel(direction, head_dim, "causal") for direction in DIRECTIONS for head_dim in (64, 128)]
    figures = {f"{k.direction}, {k.head_dim}": in_own_process(measure, k.spec, turing=True).as_dict() for k in kernels}
    print(json.dumps(figures))
"""


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=check)


def environment(folder: pathlib.Path, triton: str) -> pathlib.Path:
    """The Python of a virtual environment with one Triton version."""
    python = folder / triton / "bin" / "python"
    if not python.exists():
        venv.create(folder / triton, with_pip=True)
        run(python, "-m", "pip", "install", "-q", f"torch=={TORCH}", f"triton=={triton}", *TEST_REQUIREMENTS)
    return python


def measure(python: pathlib.Path, folder: pathlib.Path) -> dict[str, object]:
    versions = "import torch, triton; print(torch.__version__, triton.__version__)"
    torch, triton = run(python, "-c", versions).stdout.split()
    report = folder / "report.xml"
    tests = run(python, "-m", "pytest", "tests/turing", f"--junitxml={report}", check=False)
    suite = next(xml.etree.ElementTree.parse(report).iter("testsuite")).attrib
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in xml.etree.ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    script = folder / "figures.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FIGURES}")
    figures = run(python, script, check=False)
    return {
        "torch": torch,
        "triton": triton,
        "python": run(python, "-c", "import platform; print(platform.python_version())").stdout.strip(),
        "tests": int(suite["tests"]),
        "skipped": int(suite["skipped"]),
        "failed": failed,
        "passed": tests.returncode == 0,
        "engine": json.loads(figures.stdout) if figures.returncode == 0 else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=pathlib.Path, help="a folder that keeps the virtual environments")
    parser.add_argument("--only", nargs="+", default=TRITON, metavar="VERSION", help="these Triton versions")
    arguments = parser.parse_args()
    commit = run("git", "rev-parse", "HEAD").stdout.strip()
    changed = bool(run("git", "status", "--porcelain").stdout.strip())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for triton in arguments.only:
            python = environment(arguments.environments or pathlib.Path(temporary), triton)
            rows.append(measure(python, pathlib.Path(temporary)))
            print(json.dumps(rows[-1], indent=1), flush=True)
    result = {
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": "none: compiled for sm_75",
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["passed"] and row["engine"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
