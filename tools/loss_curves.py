"""Loss curves of the trainers in examples/, with our attention and with eager's: records for `python -m bench plot`.

    python -m tools.loss_curves                 # 200 steps of each into bench/results/training_NAME.jsonl
    python -m tools.loss_curves gpt2_trainer --steps 20 --output curves

Each trainer runs in this process, from the same weights and on the same data for either attention. It needs what the
example needs. Exit status 1 where the last losses are further apart than TOLERANCE.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.records import ROOT, Writer, circumstances

OUTPUT = ROOT / "bench" / "results"
# Example -> what a figure says of it, and what its losses() takes besides.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2_trainer": ("GPT-2, transformers' Trainer", {}),
    "deepspeed_zero": ("GPT-2, DeepSpeed ZeRO-3", {"stage": 3}),
    "megatron_gpt": ("GPT, Megatron-Core", {}),
}
ATTENTIONS = {"naive": "eager", "ours": "compiled_fa"}  # peer, as figures name it -> its name in the examples
TOLERANCE = 0.02  # in nats, after hundreds of steps, of which each carries roundings along


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m tools.loss_curves", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trainers", nargs="*", metavar="NAME", help=f"of {', '.join(TRAINERS)}; none: all of them")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help="default: bench/results")
    asked = parser.parse_args(words)
    if unknown := [name for name in asked.trainers if name not in TRAINERS]:
        parser.error(f"no trainer {unknown[0]!r}; there are {', '.join(TRAINERS)}")
    command, wrong = shlex.join(["python", "-m", "tools.loss_curves", *words]), False
    for name in asked.trainers or TRAINERS:
        title, options = TRAINERS[name]
        losses = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["losses"]
        found = {peer: losses(attention, asked.steps, **options) for peer, attention in ATTENTIONS.items()}
        known, writer = circumstances(torch.device("cpu")), Writer(asked.output / f"training_{name}.jsonl", command)
        for peer, values in found.items():
            record = {"suite": "training", "case": title, "trainer": name, "peer": peer, "status": "trained"}
            writer.write({**known, **record, "losses": [round(loss, 6) for loss in values]})
        writer.close()
        apart = abs(found["ours"][-1] - found["naive"][-1])
        print(f"{title}: {found['ours'][0]:.3f} to {found['ours'][-1]:.3f}, from eager's {apart:.1e} nats", flush=True)
        wrong |= not apart <= TOLERANCE
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
