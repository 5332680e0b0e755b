"""A program that compiles a dot for sm_75 in itself and in a child of each kind, and prints what came of it as JSON.

{kind: {turing: whether there are Turing's tensor-core instructions, torch: whether torch was imported, log: at level
DEBUG, ptx: its hash}}; sm_80: a kernel for an A100. It imports nothing of ours. Arguments: the kinds.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when asked to compile, once there is a log
    import triton.language as tl

KINDS = ("fork", "spawn", "forkserver")


def dot(pointer, size: "tl.constexpr"):
    i = tl.arange(0, size)
    at = pointer + i[:, None] * size + i[None, :]
    x = tl.load(at)
    tl.store(at, tl.dot(x, x).to(tl.float16))


def found(pipe: Any = None, capability: int = 75) -> dict[str, Any]:
    log = io.StringIO()
    logging.basicConfig(level=logging.DEBUG, stream=log, force=True)
    import triton
    import triton.language
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    globals()["tl"] = triton.language
    source = ASTSource(
        fn=triton.jit(dot), signature={"pointer": "*fp16", "size": "constexpr"}, constexprs={"size": 16}, attrs={}
    )
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": True})
    ptx = compiled.asm["ptx"]
    result = {
        "turing": "mma.sync.aligned.m16n8k8" in ptx,
        "torch": "torch" in sys.modules,
        "log": log.getvalue(),
        "ptx": hashlib.sha256(ptx.encode()).hexdigest(),
    }
    if pipe is not None:
        pipe.send(result)
    return result


def main() -> None:
    if sys.argv[1:] == ["child"]:
        print(json.dumps(found()))
        return
    kinds = sys.argv[1:] or KINDS
    results = {}
    for kind in kinds:
        context: Any = multiprocessing.get_context(kind)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=found, args=(theirs,))
        process.start()
        theirs.close()
        results[kind] = ours.recv()
        process.join()
    child = subprocess.run([sys.executable, __file__, "child"], check=True, stdout=subprocess.PIPE, text=True)
    results["subprocess"] = json.loads(child.stdout)
    results["itself"] = found()
    results["sm_80"] = found(capability=80)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
