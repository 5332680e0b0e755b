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

# Runs in each environment: the figures of flex_attention's kernels, with num_stages=2.
FIGURES = """
import json
from functools import partial
from tests.turing.in_child import flex_kernel
from tools.offline import flex_graphs, in_own_process
if __name__ == "__main__":
    builds = {
        "forward, head_dim 64, 64x64, 4 warps": partial(flex_graphs.forward, 64, 64, 64, 4, 2),
        "forward, head_dim 128, 128x32, 8 warps": partial(flex_graphs.forward, 128, 128, 32, 8, 2),
        "backward, head_dim 64, 32,64,64,32, 4 warps": partial(flex_graphs.backward, 64, 32, 64, 64, 32, 4, 2),
        "backward, head_dim 128, 32,64,64,32, 8 warps": partial(flex_graphs.backward, 128, 32, 64, 64, 32, 8, 2),
    }
    print(json.dumps({name: in_own_process(flex_kernel, build)["turing"] for name, build in builds.items()}))
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
        "flex_attention": json.loads(figures.stdout) if figures.returncode == 0 else None,
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
    return 0 if all(row["passed"] and row["flex_attention"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
