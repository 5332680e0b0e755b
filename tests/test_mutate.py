"""tools/mutate.py: its changes are those it promises, and it tells which of them tests notice."""

import ast
import subprocess
from pathlib import Path

import pytest

from tools import mutate

ROOT = Path(__file__).resolve().parent.parent


def changes(source):
    return {mutation.applied(source) for mutation in mutate.mutations(Path("some.py"), source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {"(a <= b)"}),
        ("a <= b < c", {"(a < b < c)", "(a <= b <= c)"}),
        ("a is not None", {"(a is None)"}),
        ("a + b", {"(a - b)"}),
        ("a and b", {"(a or b)"}),
        ("a & b", {"(a | b)"}),
        ("a * 3", {"a * (4)", "a * (2)"}),
        ("a[-1]", {"a[-(2)]", "a[-(0)]"}),
        ("0.5 * a", {"(1.5) * a", "(-0.5) * a"}),
        ("not a", {"(a)"}),
        ("max(a, b)", {"(min(a, b))"}),
        ("a.amin()", {"(a.amax())"}),
        ("if a:\n    raise ValueError(b)", {"pass", "if a:\n    pass"}),
        ("_equal(a, b)", {"pass"}),
        ("validation.length(a)", {"pass"}),
        ("é = '…' + a", {"é = ('…' - a)"}),
        ("'1 + 1'\nx: list[3] = f'{1 + 1}'\ndef f(x: Literal[3]) -> Literal[4]: 'not a'", set()),
        ("a * b\nlength(a)\nif a:\n    f()\nelse:\n    raise b", {"a * b\nlength(a)\nif a:\n    f()\nelse:\n    pass"}),
    ],
)
def test_changes(source, expected):
    assert changes(source) == expected


def test_every_change_of_a_file_is_python():
    for changed in changes((ROOT / "compiled_fa" / "scores" / "masks.py").read_text()):
        ast.parse(changed)


def checkout(folder, package, tests):
    (folder / "package.py").write_text(package)
    (folder / "test_package.py").write_text(f"import package\n\n\ndef test_it():\n{tests}")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return ["package.py", "--tests", "test_package.py"]


def test_survivors_are_told(tmp_path, capsys):
    """The second line is tested, but for x == top, where both ways give the same; the checkout stays as it is."""
    package = "def clip(x, top):\n    if x < top:\n        return max(x, 0)\n    return top\n"
    tests = "    assert package.clip(-3, 5) == 0\n    assert package.clip(9, 5) == 5\n"
    assert mutate.main(checkout(tmp_path, package, tests), tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAILED test_package.py::test_it" in printed
    assert printed.endswith("1 of 2 noticed\nsurvives: package.py:2: x < top  ->  (x <= top)\n")
    assert (tmp_path / "package.py").read_text() == package


def test_tests_must_pass_first(tmp_path, capsys):
    assert mutate.main(checkout(tmp_path, "x = 1\n", "    assert False\n"), tmp_path) == 2
    assert "without any change: FAILED test_package.py::test_it" in capsys.readouterr().out


def test_what_never_ends_is_noticed(tmp_path):
    checkout(tmp_path, "x = 1\n", "    __import__('threading').Event().wait()\n")
    assert mutate.noticed(["test_package.py"], tmp_path, 2.0) == "no end within 2 s"
