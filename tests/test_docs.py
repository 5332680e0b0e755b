"""README.md and docs/: code runs, commands exist, links lead somewhere, names and numbers are the code's."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_fa
from bench import plot, suites

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "tools/ptx/README.md", "bench/NOTES.md")]
TEXTS = [*PAGES, *OTHERS]
PLOTS = ROOT / "docs" / "plots"
INSTALL = (
    "pip install -c constraints.txt . && python -m compiled_fa",
    'pip install -c constraints.txt ".[test]" && python -m pytest -n auto --dist loadfile',
)
# What a block may need, by the comment before it: is it here, and the word that shows that the block needs it.
NEEDS = {"CUDA": (torch.cuda.is_available, "cuda")}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page_parameter(pages: list[Path] = TEXTS) -> Any:
    return pytest.mark.parametrize("page", pages, ids=named)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line's number, and what the comment before it says it needs."""

    language: str
    text: str
    line: int
    needs: str | None = None

    def run(self, page: Path, namespace: dict[str, Any]) -> None:
        exec(self.code(page), namespace)

    def code(self, page: Path) -> Any:
        return compile("\n" * self.line + self.text, page, "exec")  # errors name the page's own line


def blocks(page: Path, language: str) -> list[Block]:
    pattern = re.compile(
        r"(?:^<!-- needs (?P<needs>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
    )
    text = page.read_text()
    found = [
        Block(match["language"], match["text"], text.count("\n", 0, match.start("text")), match["needs"])
        for match in pattern.finditer(text)
    ]
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# Code


@page_parameter([page for page in PAGES if blocks(page, "python")])
def test_code_runs(page):
    """The Python blocks of a page, in order, in one namespace."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if block.needs is None:
            block.run(page, namespace)


SPECIAL = [(page, block) for page in PAGES for block in blocks(page, "python") if block.needs is not None]


@pytest.mark.parametrize(("page", "block"), SPECIAL, ids=[f"{named(page)}:{block.line}" for page, block in SPECIAL])
def test_code_that_needs_a_device_runs_where_it_is(page, block):
    block.code(page)
    available, word = NEEDS[block.needs]
    assert word in block.text, f"{named(page)}:{block.line} is marked as needing {block.needs} and does not use it"
    if not available():
        pytest.skip(f"{named(page)}:{block.line} needs {block.needs}")
    block.run(page, {})


def test_every_comment_about_needs_stands_before_a_block():
    comments = sum(page.read_text().count("<!-- needs ") for page in PAGES)
    assert comments == len(SPECIAL)


# Commands


def commands(page: Path) -> list[list[str]]:
    """Words of every python, pip and just command in sh blocks, indented ones and inline code; "..." is no argument."""
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    lines += [line.strip() for line in prose(page).splitlines() if line.startswith("    ")]
    lines += [code for code in inline_code(page) if "..." not in code]
    found = []
    for line in lines:
        for command in line.split(" && "):
            if match := re.match(r"(?:[A-Z_]+=\S+ )*((?:python|pip|just)\b.*)", command):
                found.append(shlex.split(match[1], comments=True))
    return found


COMMANDS = sorted({tuple(words) for page in TEXTS for words in commands(page)})


def test_commands_are_found():
    programs = {" ".join(words[:3]) for words in COMMANDS}
    assert {
        "python -m compiled_fa",
        "python -m bench",
        "python -m pytest",
        "python -m venv",
        "pip install -c",
    } <= programs


def program_of(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """python's words -> those that name the program, and its arguments."""
    return (["-m", words[2]], list(words[3:])) if words[1] == "-m" else ([words[1]], list(words[2:]))


def help_of(
    program: list[str],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What the program says to --help, in this process: torch is imported already."""
    sub = ["plot"] if program[-1] == "bench" and arguments[:1] == ["plot"] else []
    monkeypatch.setattr(sys, "argv", [program[-1], *sub, "--help"])
    if program[0] == "-m":
        run = functools.partial(runpy.run_module, program[1], alter_sys=True)
    else:
        monkeypatch.syspath_prepend((ROOT / program[0]).parent)
        run = functools.partial(runpy.run_path, str(ROOT / program[0]))
    with pytest.raises(SystemExit) as status:
        run(run_name="__main__")
    assert status.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "python"], ids=" ".join)
def test_python_command_and_its_options_exist(words, monkeypatch, capsys):
    program, arguments = program_of(words)
    options = [word for word in arguments if word.startswith("--")]
    if program == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in arguments if "/" in word)
        return
    if program in (["-m", "venv"], ["-c"]):
        return
    if program[0] == "-m":
        assert importlib.util.find_spec(program[1]) is not None
    else:
        assert (ROOT / program[0]).is_file()
    if program[0].startswith("examples/"):
        assert not arguments  # they have no options
        return
    if program[-1] == "bench":
        names = [word for word in arguments if word.isalpha() and word.islower()]
        assert set(names) <= {*suites.RACES, "latency", "models", "serve", "memory", "compile", "choice", "plot"}
    told = help_of(program, arguments, monkeypatch, capsys)
    missing = [option for option in options if not re.search(rf"{option.partition('=')[0]}\b", told)]
    assert not missing, f"{' '.join(program)} has no {missing}"


def test_other_commands_exist():
    project, recipes = (ROOT / "pyproject.toml").read_text(), (ROOT / "justfile").read_text()
    for words in COMMANDS:
        if words[0] == "just" and len(words) > 1:
            assert re.search(rf"^{words[1]}\b.*:", recipes, re.M), words
        for extra in re.findall(r"\[([\w,]+)\]", words[-1]) if words[0] == "pip" else []:
            assert all(re.search(rf"^{name} = \[", project, re.M) for name in extra.split(",")), words


def test_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("pip install")] == list(INSTALL)


# Links and names


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@page_parameter()
def test_links_lead_somewhere(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), f"{target}: no such heading"


def test_links_are_found_and_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        names = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text())
        waiting += [p for name in names if (p := (page.parent / name).resolve()) not in reached]
    assert reached >= set(PAGES) - {ROOT / "docs" / "README.md"}


@page_parameter()
def test_paths_exist(page):
    for code in inline_code(page):
        if re.fullmatch(r"(compiled_fa|compiled_fa_turing|bench|tools|tests|docs|examples)/[\w/.-]*", code):
            assert (ROOT / code).exists(), code


@page_parameter()
def test_python_names_exist(page):
    for name in re.findall(r"torch\.ops\.compiled_fa\.([a-z]\w+)", page.read_text()):
        assert hasattr(torch.ops.compiled_fa, name), name
    for name in re.findall(r"(?<!ops\.)\bcompiled_fa\.([a-z]\w+)", page.read_text()):
        assert hasattr(compiled_fa, name) or importlib.util.find_spec(f"compiled_fa.{name}"), name


def rows(page: Path, first: str) -> list[list[str]]:
    """The cells of the table whose first heading is `first`."""
    lines = iter(page.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_engines_are_those_of_the_code():
    from compiled_fa import config

    table = [re.findall(r"`(\w+)`", row[0])[0] for row in rows(ROOT / "docs" / "ops.md", "engine")]
    assert ("auto", *table) == config.ENGINES  # in the order of preference
    for page in TEXTS:
        for name in re.findall(r"\bthe `?(\w+)`? engine\b", page.read_text()):
            assert name in table, f"{named(page)}: {name}"


def test_environment_variables_are_those_of_the_code():
    from compiled_fa import config

    documented = {row[0].strip("`"): tuple(re.findall(r"`(\w+)`", row[1]))
                  for row in rows(ROOT / "docs" / "environment.md", "variable")}  # fmt: skip
    assert documented == {variable.name: variable.allowed for variable in config.VARIABLES}
    pattern = re.compile(r"COMPILED_FA_[A-Z]+")
    files = [file for name in ("compiled_fa", "compiled_fa_turing") for file in (ROOT / name).rglob("*.py")]
    in_code = {name for file in files for name in pattern.findall(file.read_text())}
    assert in_code == set(documented)
    for page in TEXTS:
        assert set(pattern.findall(page.read_text())) <= set(documented), named(page)


def test_versions_agree():
    found = {
        "pyproject.toml": re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M),
        "CITATION.cff": re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M),
        "CHANGELOG.md": re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[:1],
    }
    assert found == {name: [compiled_fa.__version__] for name in found}


# Numbers and plots


@functools.cache
def seconds() -> dict[tuple[str, str, str], dict[str, float]]:
    """(suite, case, direction) -> peer -> median, of bench/results."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for file in (ROOT / "bench" / "results").glob("*.jsonl"):
        for record in map(json.loads, file.read_text().splitlines()):
            if record.get("status") == "timed" and "median_s" in record:
                key = record["suite"], record["case"], record["direction"]
                found.setdefault(key, {})[record["peer"]] = record["median_s"]
    return found


def ratios(suite: str, cases: list[str], directions: tuple[str, ...], peer: str, ours: str = "ours") -> list[float]:
    """Time of ours / time of the peer of each case in each direction, where both were timed."""
    timed = (seconds().get((suite, case, way), {}) for case in cases for way in directions)
    return [found[ours] / found[peer] for found in timed if {ours, peer} <= found.keys()]


FORWARD, TRAINING = "forward", "forward+backward"
BOTH = (FORWARD, TRAINING)
HALVES = ("fp32", "bf16")


def listed(suite: str, cases: list[str], directions: tuple[str, ...], peer: str, separator: str = "; ") -> str:
    return separator.join(f"{ratio:.2f}" for ratio in ratios(suite, cases, directions, peer))


def dense_table() -> list[list[str]]:
    def span(cases: list[str], direction: str) -> str:
        found = ratios("dense", cases, (direction,), "SDPA")
        return f"{min(found):.2f} to {max(found):.2f}"

    shapes = {"head_dim 64": "H8 D64", "head_dim 128": "H8 D128", "32 query heads on 8": "H32/8 D64"}
    table = []
    for dtype in ("fp32", "bf16", "fp16"):
        for label, shape in shapes.items():
            plain = [f"B1 N{n} {shape} {dtype}" for n in (512, 1024, 2048, 4096, 8192)]
            causal = [f"{case} causal" for case in plain]
            table.append([f"{dtype}, {label}", *(span(cases, way) for way in BOTH for cases in (plain, causal))])
    return table


def variants_table() -> list[list[str]]:
    lines = {
        "window 512, N 8192": ("N8192 H8 D64 {} window 512,0", FORWARD),
        "ALiBi, N 4096": ("N4096 H8 D64 {} ALiBi", FORWARD),
        "softcap, N 4096": ("N4096 H8 D64 {} softcap 30", FORWARD),
        "ALiBi, causal": ("N4096 H8 D64 {} causal ALiBi", FORWARD),
        "softcap, causal": ("N4096 H8 D64 {} causal softcap 30", FORWARD),
        "dropout 0.1, N 2048": ("N2048 H8 D64 {} dropout 0.1", FORWARD),
        "the same, forward + backward": ("N2048 H8 D64 {} dropout 0.1", TRAINING),
    }
    table = []
    for label, (case, direction) in lines.items():
        cases = [f"B1 {case.format(dtype)}" for dtype in HALVES]
        cells = [listed("variants", cases, (direction,), peer) for peer in ("SDPA", "naive", "flex")]
        table.append([label, *(cell if ";" in cell else "" for cell in cells)])  # a refusal in one dtype: neither
    return table


def varlen_table() -> list[list[str]]:
    table = []
    for label, case in (("64 sequences of 105 to 1004", "64 seqs of 105..1004"),
                        ("2,000 sequences of 1 to 64", "2000 seqs of 1..64")):  # fmt: skip
        for dtype in HALVES:
            for causal in ("", " causal"):
                cases = [f"{case} H8 D64 {dtype}{causal}"]
                first = f"{label}, fp32" if not causal and dtype == "fp32" else "the same"
                name = first + (", bf16" if dtype == "bf16" else "") + (", causal" if causal else "")
                table.append([name, *(listed("varlen", cases, BOTH, peer) for peer in ("SDPA loop", "SDPA padded"))])
    return table


def short_table() -> list[list[str]]:
    lines = {
        "eager, forward": ("", FORWARD),
        "inside torch.compile, forward": (" compiled", FORWARD),
        "the same, forward + backward": (" compiled", TRAINING),
        "in a compiled layer with its projections, forward": (" compiled layer", FORWARD),
        "the same again, forward + backward": (" compiled layer", TRAINING),
    }
    table = []
    for label, (where, direction) in lines.items():
        cases = [[f"B1 N{n} H8 D64 {dtype}{where}" for dtype in HALVES] for n in (64, 128, 256)]
        table.append([label, *(listed("short", pair, (direction,), "SDPA") for pair in cases)])
    return table


def decode_table() -> list[list[str]]:
    def cell(keys: int, pages: str, ours: str, peer: str) -> str:
        cases = {dtype: [f"B{b} Sq1 Sk{keys} H16/4 D64 {dtype}{pages}" for b in (1, 4, 16)] for dtype in HALVES}
        found = (ratios("decode", cases[dtype], (FORWARD,), peer, ours) for dtype in HALVES)
        return "; ".join(", ".join(f"{ratio:.2f}" for ratio in of_dtype) for of_dtype in found)

    columns = (
        ("", "ours", "SDPA"),
        ("", "ours cache", "SDPA"),
        ("", "ours append", "SDPA"),
        (" pages of 256", "ours cache", "ours one piece"),
    )
    return [
        [f"{keys:,}", "1, 4, 16", *(cell(keys, *column) for column in columns)] for keys in (1024, 4096, 16384, 65536)
    ]


def serve_table() -> list[list[str]]:
    cases = [f"24 requests on 8 rows, 4 layers of H16/4 D64 {dtype}, pages of 64" for dtype in HALVES]
    label = "24 requests on 8 rows, 64 to 768 tokens and 16 to 128 more, 4 layers of 16 heads on 4, pages of 64"
    return [[label, listed("serve", cases, (FORWARD,), "SDPA padded")]]


def classes_table() -> list[list[str]]:
    """Its first two columns: there are no records of the other classes."""

    def cells(*cases: str, peer: str = "SDPA", ways: tuple[str, ...] = (FORWARD,)) -> str:
        return listed("classes", list(cases), ways, peer)

    some, many = "16 seqs of 105..1004 H8 D64", "2000 seqs of 1..64 H8 D64"
    plain, causal = "B1 N2048 H8 D64", "B1 N4096 H8 D64 {} causal"
    window, dropout = "B1 N8192 H8 D64 {} window 512,0", "B1 N2048 H8 D64 {} dropout 0.1"

    def halves(case: str) -> tuple[str, ...]:
        return tuple(case.format(dtype) for dtype in HALVES)

    return [
        ["128 tokens: fp32; bf16", cells(*halves("B1 N128 H8 D64 {}"))],
        ["2,048 tokens, fp32: forward; with gradients", cells(f"{plain} fp32", ways=BOTH)],
        ["4,096 causal, fp32: forward; with gradients", cells(causal.format("fp32"), ways=BOTH)],
        ["2,048 tokens, bf16: forward; with gradients", cells(f"{plain} bf16", ways=BOTH)],
        ["4,096 causal, bf16: forward; with gradients", cells(causal.format("bf16"), ways=BOTH)],
        ["2,048, bf16, heads of 128; 32 heads on 8", cells("B1 N2048 H8 D128 bf16", "B1 N2048 H32/8 D64 bf16")],
        ["16 sequences of 105 to 1,004, fp32; bf16", cells(*halves(f"{some} {{}}"), peer="SDPA padded")],
        ["the same, / a loop of calls", cells(*halves(f"{some} {{}}"), peer="SDPA loop")],
        ["2,000 sequences of 1 to 64, fp32; bf16", cells(*halves(f"{many} {{}}"), peer="SDPA padded")],
        ["window of 512 of 8,192, fp32; bf16", cells(*halves(window))],
        ["dropout with gradients, fp32; bf16", cells(*halves(dropout), ways=(TRAINING,))],
        *(
            [name, cells(*halves(f"B1 Sq1 Sk{keys} H32/8 D128 {{}}"))]
            for keys, name in (
                (256, "one query, 32 heads on 8 of 128, 256 keys: fp32; bf16"),
                (4096, "the same, 4,096 keys"),
            )
        ),
    ]


def models_table() -> list[list[str]]:
    lines = {
        "Llama of transformers, 1,024 tokens, 16 heads on 4": "Llama layer B1 N1024 H16/4 D64 {} causal",
        "the same, 32 sequences of 26 to 251, packed": "Llama layer, 32 seqs of 26..251 H16/4 D64 {} causal",
        "ViT-B/16 block, 8 images of 197 tokens": "ViT block B8 N197 H12 D64 {}",
        "Stable Diffusion's block, 4,096 and 77 tokens": "UNet attention block B2 N4096 H8 D40 {}",
    }
    columns = [(way, peer) for way in BOTH for peer in ("SDPA", "naive")]
    return [
        [label, *(listed("models", [case.format(dtype) for dtype in HALVES], (way,), peer) for way, peer in columns)]
        for label, case in lines.items()
    ]


BENCHMARKS = ROOT / "docs" / "benchmarks.md"
TABLES = {"Dense": dense_table, "Masks and scores": variants_table, "Packed sequences": varlen_table,
          "Short calls": short_table, "Decoding": decode_table, "Serving": serve_table, "Classes of CPU": classes_table,
          "Inside models": models_table}  # fmt: skip


@pytest.mark.parametrize("section", TABLES)
def test_numbers_are_those_of_the_records(section):
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", BENCHMARKS.read_text(), re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    wanted = TABLES[section]()
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert [cells[: len(wanted[0])] for cells in found] == wanted


def test_every_table_of_numbers_is_checked():
    assert BENCHMARKS.read_text().count("\n| --- |") == len(TABLES)


def test_plots_are_those_of_the_records(tmp_path, capsys):
    """The same files; and the same bytes, where the matplotlib that drew them is here."""
    mpl = pytest.importorskip("matplotlib")
    assert plot.main(["--output", str(tmp_path)]) == 0
    drawn, committed = ({p.name: p.read_text() for p in folder.iterdir()} for folder in (tmp_path, PLOTS))
    assert drawn.keys() == committed.keys()
    assert all(len(text) < 60_000 for text in committed.values())
    if f"Matplotlib v{mpl.__version__}," in committed["overview-light.svg"]:
        stale = [name for name in drawn if drawn[name] != committed[name]]
        assert not stale, f"draw them anew: python -m bench plot: {stale}"


def test_every_plot_is_shown_in_both_themes():
    shown = {Path(name).name for page in PAGES for name in re.findall(r'(?:src|srcset)="([^"]+)"', page.read_text())}
    assert shown == {path.name for path in PLOTS.iterdir()}
