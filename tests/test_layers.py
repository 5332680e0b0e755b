"""Imports go downwards only, and engines never import each other: the house as a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import compiled_fa

ROOT = Path(compiled_fa.__file__).parent

# From the ground up. A module may import those below its own line, and those of its own package.
LAYERS = [
    {
        "messages",
        "flattening",
        "config",
        "memory",
        "registration",
        "rotation",
        "seed",
        "timing",
        "signatures",
        "turing",
        "without_numpy",
    },
    {"caches", "forward_mode", "tuning"},
    {"inductor", "scores", "straight"},
    {"problem"},
    {"validation", "cache_call"},
    {"cache_validation"},
    {"rotary"},
    {"engines.engine", "engines.nvidia"},
    {"engines.fused", "engines.triton", "engines.split_kv", "engines.sdpa_cpu", "engines.tiled"},
    {"engines.selection"},
    {"engines"},
    {"batching", "tangent"},
    {"ops", "probabilities", "cache_ops"},
    {"flops", "sharding"},
    {"arguments", "padding"},
    {"interface", "forward_backward", "int8"},
    {"kvcache", "with_bias"},
    {"context_parallel", "modules", "scaled_dot_product", "xformers_api"},
    {"losses"},
    {"warmup", "testing"},
    {""},  # the package itself: what people import
    {"drop_in", "integrations"},
    {"check", "compat", "run", "run_with_sdpa"},
    {"__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
TURING = ROOT.parent / "compiled_fa_turing"
TURING_LAYERS = [
    {"config", "late", "target"},
    {"inductor", "ir_text", "triton_private"},
    {"dots", "transposed"},
    {"pipeline"},
    {"stage"},
    {"hook"},
    {"__init__"},
    {"site_hook", "startup"},
    {"program"},
    {"__main__", "sitecustomize"},
]
TURING_MODULES = sorted(TURING.rglob("*.py"))
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def unit_of(dotted: str) -> str:
    """The part of the house that a module of compiled_fa belongs to: the longest that LAYERS names."""
    parts = dotted.split(".") if dotted else []
    names = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next(name for name in names if name in HEIGHT)


def imported(path: Path) -> list[str]:
    """Modules of compiled_fa, without its name, that a file imports, wherever in it."""
    package = [*path.parent.parts]
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module is not None and node.module.split(".")[0] == "compiled_fa":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:  # a name of a package may be a module of it
                inner = [*base, alias.name]
                is_module = (ROOT / Path(*inner)).is_dir() or (ROOT / Path(*inner)).with_suffix(".py").exists()
                found.append(".".join(inner if is_module else base))
        elif isinstance(node, ast.Import):
            found += [name.name[12:] for name in node.names if name.name.split(".")[0] == "compiled_fa"]
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_downwards(path):
    parts = path.with_suffix("").parts
    mine = unit_of(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    for other in imported(path):
        theirs = unit_of(other)
        allowed = theirs == mine or HEIGHT[theirs] < HEIGHT[mine]
        assert allowed, f"{path} ({mine or 'compiled_fa'}) imports {other}, which is not below it"


def test_every_module_has_its_place():
    for path in MODULES:
        top = path.parts[0].removesuffix(".py")
        assert top == "__init__" or unit_of(top) == top, f"{path}: LAYERS does not say where {top} stands"


@pytest.mark.parametrize("path", TURING_MODULES, ids=lambda path: path.name)
def test_the_turing_stage_stands_alone(path):
    """It imports neither us nor torch, but for a function that only a compile worker of torch's calls."""
    tree = ast.parse(path.read_text())
    height = {name: height for height, layer in enumerate(TURING_LAYERS) for name in layer}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            names = [f"{whole}.{alias.name}" for alias in node.names] if whole == TURING.name else [whole]
            assert not node.level
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            assert root != "compiled_fa"
            assert root != "torch" or (path.stem == "inductor" and node not in tree.body)
            if root == TURING.name and (TURING / f"{rest}.py").exists():
                assert height[rest] < height[path.stem], f"{path.name} imports {rest}, which is not below it"


def test_only_config_reads_the_environment():
    for path in (*(ROOT / module for module in MODULES), *TURING_MODULES):
        if path.name != "config.py":
            assert "os.environ" not in path.read_text(), f"{path} reads the environment"
