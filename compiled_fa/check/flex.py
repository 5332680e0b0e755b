"""flex_attention by torch.compile, timed in a process of its own, for speed.py, which writes its command line.

Words: device; with the Turing stage?; gradients?; the shape. Prints the median seconds.
"""

from __future__ import annotations

import sys

import torch

from .. import turing
from ..timing import interleaved_medians
from . import speed


def main(words: list[str]) -> int:
    device = torch.device(words[0])
    stage, gradients, causal = (words[at] == "True" for at in (1, 2, -1))
    batch, seqlen, nheads, head_dim = map(int, words[3:7])
    shape = speed.Shape(batch, seqlen, nheads, head_dim, causal)
    if stage:
        turing.enable()
    else:
        turing.disable()  # where the whole environment has it
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, seqlen, seqlen, device=str(device))
    compiled = torch.compile(flex_attention) if device.type == "cuda" else flex_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: torch.Tensor = compiled(q, k, v, block_mask=mask)
        return out.transpose(1, 2)

    inputs = shape.inputs(device, torch.float16 if device.type == "cuda" else torch.float32)
    times = interleaved_medians({"flex": lambda: speed.call(attention, inputs, gradients)}, device)
    print(times["flex"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
