"""Train a small byte-level GPT with one attention after another, and compare their losses step by step.

    python -m tools.train_gpt                                       # compiled_fa, SDPA, explicit softmax; README.md
    python -m tools.train_gpt --text book.txt --plot losses.png
    python -m tools.train_gpt --text book.txt --attention compiled_fa --steps 2000 --positions rotary --save gpt.pt

Model and loss are one graph: torch.compile(fullgraph=True). Every attention starts from the same weights and reads the
same bytes in the same order, so that its losses may differ from the others' by float noise only; exit status 1 if
they differ by more (see `tolerances`). The model of the attention named first then writes some text.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.byte_gpt import ATTENTIONS, GPT, Shape, next_byte_loss, sample, save

BAR_WIDTH = 40  # characters
README = Path(__file__).resolve().parent.parent / "README.md"


@dataclass(frozen=True)
class Run:
    model: GPT
    losses: Tensor  # fp64 (steps,), in nats per byte
    first_step_s: float  # with the compilation of forward and backward
    tokens_per_s: float  # of the other steps


def train(name: str, shape: Shape, data: Tensor, options: argparse.Namespace) -> Run:
    """Train from options.seed, on windows of data (bytes, 1-D) drawn at random."""
    generator = torch.Generator().manual_seed(options.seed)
    model = GPT(shape, ATTENTIONS[name])
    model.initialise(generator)
    model.to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    torch.compiler.reset()  # else a second attention is a recompilation of the first's code
    loss_of = next_byte_loss if options.no_compile else torch.compile(next_byte_loss, fullgraph=True, dynamic=False)
    windows = data.unfold(0, shape.block_size + 1, 1)
    losses = torch.empty(options.steps, dtype=torch.float64)
    start = first_step_end = time.perf_counter()
    for step in range(options.steps):
        chosen = torch.randint(len(windows), (options.batch_size,), generator=generator)
        loss = loss_of(model, windows[chosen].to(options.device, torch.int64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
        if step == 0:
            first_step_end = time.perf_counter()
        show_progress(name, step + 1, options.steps, losses[step].item())
    tokens = (options.steps - 1) * options.batch_size * shape.block_size
    seconds = time.perf_counter() - first_step_end
    return Run(model, losses, first_step_end - start, tokens / seconds)


def show_progress(name: str, done: int, of: int, loss: float) -> None:
    if sys.stderr.isatty():
        bar = ("█" * (BAR_WIDTH * done // of)).ljust(BAR_WIDTH, "░")
        print(f"\r{name:12} {bar} {done}/{of}  loss {loss:.3f}", end="\n" if done == of else "", file=sys.stderr)


def tolerances(steps: int) -> Tensor:
    """The greatest difference between losses that float noise explains, (steps,), in nats per byte.

    An fp32 loss near 5 is a multiple of 5e-7, and equal weights give losses a few of these apart: 4e-6. Every step
    rounds its gradients anew; independent roundings add up as the root of their number. Training from weights moved by
    one rounding stays within a fifth of this for 100 steps at learning rates to 0.003. At 0.01 it is chaotic: there
    even float64 curves part, from 1e-15 to 1e-1 in 200 steps, and no tolerance tells noise from error.
    """
    return 4e-6 * torch.arange(1, steps + 1, dtype=torch.float64).sqrt()


def agree(runs: dict[str, Run]) -> bool:
    """Print the greatest difference between the loss curves, and say whether float noise explains all of them."""
    curves = torch.stack([run.losses for run in runs.values()])
    spread = curves.amax(0) - curves.amin(0)
    allowed = tolerances(len(spread))
    within = bool((spread <= allowed).all())  # False for NaN
    step = int((spread / allowed).argmax())  # NaN counts as the greatest
    print(
        f"greatest difference between curves: {spread.max():.1e}; nearest to its tolerance: {spread[step]:.1e} of "
        f"{allowed[step]:.1e} at step {step + 1}: {'float noise' if within else 'TOO FAR APART'}"
    )
    return within


def plot(runs: dict[str, Run], path: Path, figure_class: Any) -> None:
    """Losses above, differences from the first-named attention's, beside the tolerance, below."""
    figure = figure_class(figsize=(7, 6), layout="constrained")
    losses, differences = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    first, *others = runs
    steps = range(1, len(runs[first].losses) + 1)
    for index, (name, run) in enumerate(runs.items()):  # each thinner, for curves that agree hide each other
        losses.plot(steps, run.losses, label=name, linewidth=1 + 2 * (len(others) - index))
    for name in others:
        differences.plot(steps, (runs[name].losses - runs[first].losses).abs(), ".", label=f"|{name} - {first}|")
    differences.plot(steps, tolerances(len(steps)), "k--", label="tolerance")
    losses.set_ylabel("loss (nats per byte)")
    differences.set(xlabel="step", ylabel="difference", yscale="log")
    losses.legend()
    differences.legend()
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, default=README, metavar="FILE", help="what to learn: any file (default: README.md)")
    add("--attention", default="all", metavar="NAMES", help=f"some of {','.join(ATTENTIONS)}; default: all of them")
    add("--steps", type=positive, default=50)
    add("--batch-size", type=positive, default=8)
    add("--learning-rate", type=float, default=1e-3, help="default: 0.001; curves part by themselves at 0.01")
    add("--seed", type=int, default=0)
    add("--layers", type=positive, default=2)
    add("--width", type=positive, default=128)
    add("--heads", type=positive, default=4)
    add("--kv-heads", type=positive, help="key heads, fewer than --heads for GQA; default: as many")
    add("--block-size", type=positive, default=128, help="the most bytes that the model sees at once (default: 128)")
    add("--positions", choices=("learned", "rotary"), default="learned")
    add("--prompt", default="The ", help="what the sampled text begins with")
    add("--sample", type=int, default=200, metavar="BYTES", help="how much to write in the end (default: 200)")
    add("--temperature", type=float, default=0.8)
    add("--plot", type=Path, metavar="FILE", help="draw the loss curves into this image")
    add("--save", type=Path, metavar="FILE", help="save the model of the attention named first, for tools.generate")
    add("--device", default="cpu")
    add("--no-compile", action="store_true", help="train without torch.compile")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, options = parse_arguments(argv)
    names = list(ATTENTIONS) if options.attention == "all" else options.attention.split(",")
    if unknown := [name for name in names if name not in ATTENTIONS]:
        parser.error(f"--attention must be 'all' or some of {','.join(ATTENTIONS)}, got {unknown[0]!r}")
    kv_heads = options.kv_heads or options.heads
    if options.width % options.heads or options.heads % kv_heads:
        parser.error(f"--heads {options.heads} must divide --width {options.width}, and be a multiple of --kv-heads")
    if options.positions == "rotary" and options.width // options.heads % 2:
        parser.error(f"rotary pairs dimensions: --width / --heads must be even, got {options.width // options.heads}")
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}: the first step's time is the compiler's")
    if not options.prompt:
        parser.error("--prompt must not be empty")
    try:
        text = options.text.read_bytes()
    except OSError as error:
        parser.error(f"cannot read --text: {error}")
    if len(text) <= options.block_size:
        parser.error(
            f"{options.text} has {len(text)} bytes, and --block-size {options.block_size} needs at least "
            f"{options.block_size + 1}: give a longer --text or a smaller --block-size"
        )
    figure_class: Any = None
    if options.plot:
        try:
            from matplotlib.figure import Figure

            figure_class = Figure
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'compiled-fa[plots]'")

    shape = Shape(options.layers, options.width, options.heads, kv_heads, options.block_size, options.positions)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    print(f"{options.text.name}: {len(data)} bytes; {options.steps} steps of {options.batch_size} x {shape.block_size}")
    print(f"{'attention':12} {'first loss':>10} {'last loss':>10} {'first step':>11} {'tokens/s':>9}")
    runs: dict[str, Run] = {}
    for name in names:
        runs[name] = run = train(name, shape, data, options)
        first, last = run.losses[0], run.losses[-1]
        print(f"{name:12} {first:10.6f} {last:10.6f} {run.first_step_s:9.1f} s {run.tokens_per_s:9.0f}", flush=True)
    within = agree(runs) if len(runs) > 1 else True
    if figure_class is not None:
        plot(runs, options.plot, figure_class)
    if options.save:
        save(runs[names[0]].model, options.save)
    if options.sample:
        print(f"\nwritten by the model trained with {names[0]}:\n")
        print(sample(runs[names[0]].model, options.prompt.encode(), options.sample, options.temperature, options.seed))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
