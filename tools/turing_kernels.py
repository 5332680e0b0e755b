"""What the Turing stage makes of any Triton kernel, and what that would do on a Tesla T4: nothing here needs a GPU.

    python -m tools.turing_kernels script.py [arguments]     every kernel that the script launches
    python -m tools.turing_kernels --kernel matmul --signature "*fp16:16, *fp16:16, *fp32:16, i32:16, 64" file.py
                                                             one kernel, for arguments of these types

A script runs on the CPU and believes in a T4; tensors on "cuda" are on the CPU, and kernels are noted in place of
launched, so that its outputs are not there: what it checks afterwards fails, and is told. A signature is written as for
triton.tools.compile: a type an argument, ":16" where it is divisible by 16, and the values of constants (64, 0.5, True,
tl.float32).

Each kernel is compiled for sm_75 with the stage and by stock Triton. The table: HMMA, IMMA: instructions on tensor
cores (fp16, int8); FFMA: scalar multiply-adds; spills: loads and stores of local memory; registers a thread; shared
memory a block, of which there are 64 KB; blocks an SM; and of the loop that takes most cycles, the unit that bounds it,
and the share of the time in which its tensor cores are busy if all latency is hidden.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from tools.offline.compile import Compiled, compile_ast
from tools.offline.figures import FEWEST_DOT_INSTRUCTIONS, SHARED, blocks_per_sm
from tools.offline.launches import Launch, launches_of
from tools.offline.machine_code import UNITS, inner_loops

COLUMNS = (
    "kernel",
    "warps, stages",
    "by",
    "HMMA / IMMA / FFMA",
    "spills",
    "registers",
    "shared",
    "blocks/SM",
    "bound by, tensor cores busy",
)


@dataclasses.dataclass(frozen=True)
class Code:
    """bound_by, tensor_share: of the loop that takes most cycles; None and 0 where there is none"""

    hmma: int
    imma: int
    ffma: int
    spills: int
    registers: int
    shared: int
    blocks_per_sm: int
    bound_by: str | None
    tensor_share: float


LONGEST_ERROR = 120  # characters
Result = Code | str  # or why there is none


def code_of(compiled: Compiled) -> Code:
    loops = inner_loops(compiled.sass)
    with_dots = [loop for loop in loops if loop.dot_instructions >= FEWEST_DOT_INSTRUCTIONS]
    bounds = max((loop.bounds for loop in with_dots or loops), key=lambda units: max(units.values()), default=None)
    return Code(
        hmma=compiled.hmma,
        imma=compiled.imma,
        ffma=compiled.ffma,
        spills=compiled.spills,
        registers=compiled.registers,
        shared=compiled.shared,
        blocks_per_sm=blocks_per_sm(compiled.registers, compiled.shared, compiled.num_warps),
        bound_by=max(UNITS, key=bounds.__getitem__) if bounds else None,
        tensor_share=bounds["tensor"] / max(bounds.values()) if bounds else 0.0,
    )


def compiled_apart(launch: Launch, turing: bool, seconds: float | None = None) -> Result:
    """In a forked process: Triton's compiler ends the process that it is in where it fails inside LLVM.

    seconds: after which it is given up
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_compile_into, args=(theirs, launch, turing))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            result: Result = ours.recv()
        else:
            process.kill()
            result = f"not compiled after {seconds:.0f} s"
    except EOFError:
        process.join()
        result = f"the compiler ended with exit code {process.exitcode}"
    process.join()
    return result


def _compile_into(pipe: Any, launch: Launch, turing: bool) -> None:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        os.dup2(file.fileno(), 2)  # where LLVM writes what is wrong, and the whole module
        try:
            pipe.send(code_of(compile_ast(launch.source, turing, launch.options)))
        except Exception as error:  # a compiler's, of any type: to be shown in the kernel's row
            file.seek(0)
            told = [line.partition("error: ")[2].strip() for line in file if "error: " in line]
            lines = told[:1] or str(error).strip().splitlines()[-1:]
            pipe.send(f"{type(error).__name__}: {''.join(lines)}"[:LONGEST_ERROR])


def launch_of(file: pathlib.Path, kernel: str, signature: str, options: Mapping[str, Any]) -> Launch:
    """Raises ValueError for a kernel that the file does not have, or a signature that is not one of it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"file must be a Python file, got {str(file)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    function = getattr(module, kernel, None)
    while isinstance(function, (triton.runtime.Autotuner, triton.runtime.Heuristics)):
        function = function.fn
    if not isinstance(function, triton.JITFunction):
        kernels = [name for name, value in vars(module).items() if hasattr(value, "arg_names")]
        raise ValueError(f"kernel must be one of {kernels}, which {file} has, got {kernel!r}")
    words = [word.strip() for word in signature.split(",")]
    if len(words) != len(function.arg_names):
        raise ValueError(
            f"signature must have a type for each of {function.arg_names}, got {len(words)}: {signature!r}"
        )
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for at, (name, word) in enumerate(zip(function.arg_names, words, strict=True)):
        known, value = _constant(word)
        kind, _, divisor = word.partition(":")
        if known:
            types[name], constants[name] = "constexpr", value
        elif divisor in ("", "16"):
            types[name] = kind
            if divisor:
                attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            raise ValueError(f"signature: only divisibility by 16 is of use, got {word!r} for {name}")
    return Launch(kernel, ASTSource(function, types, constants, attributes), constants, options)


def _constant(word: str) -> tuple[bool, Any]:
    """Whether a word of a signature is a constant, and its value."""
    if word in ("True", "False", "None"):
        return True, {"True": True, "False": False, "None": None}[word]
    if word.startswith("tl.") and isinstance(getattr(tl, word[3:], None), tl.dtype):
        return True, getattr(tl, word[3:])
    for kind in (int, float):
        try:
            return True, kind(word)
        except ValueError:
            pass
    return False, None


def rows_of(launches: Iterable[Launch], stock: bool) -> Iterator[dict[str, Any]]:
    for launch in launches:
        results = {
            "turing": compiled_apart(launch, True),
            **({"stock": compiled_apart(launch, False)} if stock else {}),
        }
        yield {
            "kernel": launch.name,
            "constants": {name: value if isinstance(value, (int, float)) else str(value)
                          for name, value in launch.constants.items()},
            "options": dict(launch.options),
            **{by: dataclasses.asdict(found) if isinstance(found, Code) else found for by, found in results.items()},
        }  # fmt: skip


def markdown(row: Mapping[str, Any]) -> Iterator[str]:
    """A line for the stage, and one for stock Triton."""
    constants = ", ".join(f"{name}={value}" for name, value in row["constants"].items())
    options = row["options"]
    for by in ("turing", "stock"):
        if by not in row:
            continue
        first = [f"{row['kernel']}({constants})", f"{options['num_warps']}, {options['num_stages']}"]
        cells = first if by == "turing" else ["", ""]
        yield "| " + " | ".join([*cells, by, *_cells(row[by])]) + " |"


def _cells(found: Mapping[str, Any] | str) -> list[str]:
    if isinstance(found, str):
        return [found.replace("|", "\\|"), "", "", "", "", ""]
    shared = f"{found['shared'] / 1024:.4g} KB"
    loop = f"{found['bound_by']}, {found['tensor_share']:.0%}" if found["bound_by"] else "-"
    return [
        f"{found['hmma']} / {found['imma']} / {found['ffma']}",
        str(found["spills"]),
        str(found["registers"]),
        shared if found["shared"] <= SHARED else f"{shared}: cannot be launched",
        str(found["blocks_per_sm"]),
        loop,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", help="a @triton.jit function of the file, which is imported, not run")
    parser.add_argument("--signature", help="the types of its arguments, and the values of its constants")
    parser.add_argument("--num-warps", type=int, help="of --kernel (4)")
    parser.add_argument("--num-stages", type=int, help="of --kernel (2)")
    parser.add_argument("--no-stock", action="store_true", help="leave out stock Triton, which can take minutes")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("file", type=pathlib.Path, help="a Python file with Triton kernels")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="arguments", help="of the script")
    asked = parser.parse_args(arguments)
    if bool(asked.kernel) != bool(asked.signature):
        parser.error("--kernel and --signature are wanted together")
    if not asked.kernel and (asked.num_warps or asked.num_stages):
        parser.error("--num-warps and --num-stages are of --kernel: a script's launches have their own")
    if asked.kernel and asked.program:
        parser.error(f"the file of --kernel is not run, and takes no arguments, got {asked.program}")
    if not asked.file.is_file():
        parser.error(f"file: there is no {asked.file}")
    error: BaseException | None = None
    if asked.kernel:
        options = {"num_warps": asked.num_warps or 4, "num_stages": asked.num_stages or 2, "enable_fp_fusion": True}
        try:
            launches = [launch_of(asked.file, asked.kernel, asked.signature, options)]
        except ValueError as wrong:
            parser.error(str(wrong))
    else:
        launches, error = launches_of(asked.file, asked.program)
    if error is not None:
        print(
            f"{asked.file} ended with {type(error).__name__}: {error} (no kernel has written anything)", file=sys.stderr
        )
    if not launches:
        print(f"{asked.file} launched no Triton kernel", file=sys.stderr)
        return 1
    print("| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|", sep="\n", flush=True)
    rows = []
    for row in rows_of(launches, not asked.no_stock):
        print(*markdown(row), sep="\n", flush=True)
        rows.append(row)
    if asked.json:
        versions = {"triton": triton.__version__, "device": "none: compiled for sm_75"}
        asked.json.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
