# `just` lists these; each is the command that the README or CONTRIBUTING.md names.

python := "python"

default:
    @just --list

# what people install
install:
    pip install -c constraints.txt .

# what those who work on it install, with hooks for git
develop:
    pip install -c constraints.txt -e ".[dev]"
    pre-commit install

# which engine serves this machine, and is it right
check *arguments:
    {{python}} -m compiled_fa {{arguments}}

# all tests, or those named
test *arguments:
    {{python}} -m pytest -n auto --dist loadfile {{arguments}}

# all three must be clean
lint:
    ruff check .
    ruff format --check .
    mypy

# what CI does, from a clean checkout
ci:
    .ci/run

# measure: `just bench dense --quick`
bench *arguments:
    {{python}} -m bench {{arguments}}

# draw docs/plots anew, and hold the docs against the code
docs:
    {{python}} -m bench plot
    {{python}} -m pytest tests/test_docs.py tests/test_examples.py
