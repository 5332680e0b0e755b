"""Write text with a model that tools/train_gpt.py saved, without a KV cache and with one, dense and in pages.

    python -m tools.train_gpt --text book.txt --attention compiled_fa --positions rotary --save gpt.pt
    python -m tools.generate gpt.pt --prompt "The "

The text appears as it is written; then, how fast each way was. Each way writes the same: with --temperature 0, exit
status 1 if it does not.
"""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compiled_fa import flash_attn_with_kvcache
from tools.byte_gpt import GPT, attend_compiled_fa, load, next_byte

WAYS = ("none", "dense", "paged")


class Cache(Protocol):
    """Keys and values of one text, a pair for each layer, and how many there are."""

    length: Tensor  # int32 (1,)
    layers: list[tuple[Tensor, Tensor]]

    def reserve(self, tokens: int) -> Tensor | None:
        """Make room for so many more -> the block_table, if there is one."""


class DenseCache:
    """As long as the longest text."""

    def __init__(self, model: GPT) -> None:
        weight, shape = model.to_logits.weight, model.shape
        size = 1, shape.block_size, shape.kv_heads, shape.width // shape.heads
        self.layers = [(weight.new_zeros(size), weight.new_zeros(size)) for _ in model.blocks]
        self.length = torch.zeros(1, dtype=torch.int32, device=weight.device)

    def reserve(self, tokens: int) -> None:
        return None


class PagedCache:
    """Pages of a pool, which are taken one by one, in no order, as the text grows."""

    def __init__(self, model: GPT, page_size: int) -> None:
        weight, shape = model.to_logits.weight, model.shape
        count = -(-shape.block_size // page_size)
        size = count, page_size, shape.kv_heads, shape.width // shape.heads
        self.layers = [(weight.new_zeros(size), weight.new_zeros(size)) for _ in model.blocks]
        self.length = torch.zeros(1, dtype=torch.int32, device=weight.device)
        self._page_size, self._reserved = page_size, 0
        self._free = torch.randperm(count).tolist()
        # Always as wide as it may become, so that a compiled step sees one shape.
        self._table = torch.full((1, count), -1, dtype=torch.int32, device=weight.device)

    def reserve(self, tokens: int) -> Tensor:
        before, self._reserved = -(-self._reserved // self._page_size), self._reserved + tokens
        for column in range(before, -(-self._reserved // self._page_size)):
            self._table[0, column] = self._free.pop()
        return self._table


def step(
    model: GPT,
    text: Tensor,
    layers: list[tuple[Tensor, Tensor]],
    length: Tensor,
    block_table: Tensor | None,
) -> Tensor:
    """Logits (256,) after text (1, S), which comes behind the `length` bytes in the cache, and is in it from now on."""
    x = model.embed(text)
    rotation: dict[str, Any] = {}
    if model.shape.positions == "learned":
        x = x + model.positions[length + torch.arange(text.shape[1], device=text.device)]
    else:
        rotation = {"rotary_cos": model.cos[:, 0], "rotary_sin": model.sin[:, 0], "rotary_interleaved": False}
    for block, (k_cache, v_cache) in zip(model.blocks, layers, strict=True):
        q, k, v = block.qkv(x)  # type: ignore[operator]
        attended = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=length, block_table=block_table, causal=True, **rotation
        )
        x = block.after(x, attended)  # type: ignore[operator]
    logits: Tensor = model.to_logits(model.norm(x[:, -1:]))
    return logits[0, 0]


@dataclass(frozen=True)
class Options:
    """length: bytes to write. page_size: of the paged cache. compiled: each step as one graph."""

    length: int
    temperature: float
    seed: int
    page_size: int
    compiled: bool


@torch.no_grad()
def generate(model: GPT, prompt: bytes, way: str, options: Options) -> Iterator[int]:
    """Bytes after the prompt, one by one."""
    generator = torch.Generator().manual_seed(options.seed)
    device = model.to_logits.weight.device
    whole: Callable[..., Tensor] = model
    one_step: Callable[..., Tensor] = step
    if options.compiled:
        torch.compiler.reset()
        whole, one_step = torch.compile(model, fullgraph=True), torch.compile(step, fullgraph=True)
    written = list(prompt)
    cache: Cache | None = None
    if way != "none":
        cache = DenseCache(model) if way == "dense" else PagedCache(model, options.page_size)
    new = written
    for _ in range(options.length):
        text = torch.tensor([written if cache is None else new], device=device)
        if cache is None:
            logits = whole(text)[0, -1]
        else:
            table = cache.reserve(len(new))
            logits = one_step(model, text, cache.layers, cache.length, table)
            cache.length += len(new)
        new = [next_byte(logits, options.temperature, generator)]
        written += new
        yield new[0]


def run(model: GPT, prompt: bytes, way: str, options: Options, show: bool) -> tuple[bytes, float, float]:
    """-> the text after the prompt, seconds to its first byte, and bytes a second after that. show: on stdout."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    written, first = bytearray(), 0.0
    start = time.perf_counter()
    if show:
        print(decoder.decode(prompt), end="", flush=True)
    for byte in generate(model, prompt, way, options):
        written.append(byte)
        if len(written) == 1:
            first = time.perf_counter() - start
        if show:
            print(decoder.decode(bytes([byte])), end="", flush=True)
    if show:
        print(decoder.decode(b"", final=True), flush=True)
    seconds = time.perf_counter() - start - first
    return bytes(written), first, (len(written) - 1) / seconds if len(written) > 1 else 0.0


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.generate",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, metavar="FILE", help="what tools.train_gpt --save wrote")
    add("--prompt", default="The ", help="what the text begins with")
    add("--length", type=int, metavar="BYTES", help="how much to write; default: as much as the model can see at once")
    add("--cache", default=",".join(WAYS), metavar="NAMES", help=f"some of {','.join(WAYS)}; default: all of them")
    add("--page-size", type=int, default=16, metavar="BYTES", help="of the paged cache (default: 16)")
    add("--temperature", type=float, default=0.0, help="0, the default: the likeliest byte each time")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="each step as one graph: torch.compile(fullgraph=True)")
    add("--device", default="cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    ways = options.cache.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--cache must be some of {','.join(WAYS)}, got {unknown[0]!r}")
    try:
        model = load(options.model, attend_compiled_fa, options.device).eval()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    prompt, most = options.prompt.encode(), model.shape.block_size
    length = most - len(prompt) if options.length is None else options.length
    if not prompt or length < 1 or len(prompt) + length > most:
        parser.error(
            f"the prompt and --length, {len(prompt)} and {length} bytes, must be at least 1 each, and together at most "
            f"what the model sees at once, {most}"
        )
    if options.page_size < 1:
        parser.error(f"--page-size must be at least 1, got {options.page_size}")
    how = Options(length, options.temperature, options.seed, options.page_size, options.compile)
    results = {way: run(model, prompt, way, how, show=way == ways[0]) for way in ways}
    print(f"\n{'cache':6} {'first byte':>11} {'bytes/s after it':>17}")
    for way, (_, first, rate) in results.items():
        print(f"{way:6} {first * 1e3:8.1f} ms {rate:17.0f}")
    texts = {text for text, _, _ in results.values()}
    if len(texts) > 1:
        print("the texts differ")
    return int(len(texts) > 1 and options.temperature == 0)


if __name__ == "__main__":
    sys.exit(main())
