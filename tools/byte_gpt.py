"""A byte-level GPT whose attention is an argument: compiled_fa's, PyTorch's SDPA, or softmax written out.

B batch, S length, H and Hk query and key heads, D head_dim.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compiled_fa import flash_attn_func

BYTES = 256

# Causal attention of q (B, S, H, D) on k and v (B, S, Hk, D) -> (B, S, H, D).
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_compiled_fa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attend_naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_per_key = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads_per_key, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    position = torch.arange(q.shape[1], device=q.device)
    future = position[:, None] < position
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -math.inf).softmax(-1), v)


ATTENTIONS: dict[str, Attention] = {"compiled_fa": attend_compiled_fa, "sdpa": attend_sdpa, "naive": attend_naive}


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT. kv_heads divides heads, heads divides width; positions: "learned" or "rotary"."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    block_size: int
    positions: str


class Block(nn.Module):
    """Pre-norm attention and MLP (GPT-2), without biases."""

    def __init__(self, shape: Shape, attend: Attention) -> None:
        super().__init__()
        self.attend = attend
        self.head_dim = shape.width // shape.heads
        self.widths = [heads * self.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        self.norm_attention = nn.RMSNorm(shape.width)
        self.to_qkv = nn.Linear(shape.width, sum(self.widths), bias=False)
        self.from_heads = nn.Linear(shape.width, shape.width, bias=False)
        self.norm_mlp = nn.RMSNorm(shape.width)
        self.widen = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.narrow = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        return self.after(x, self.attend(q, k, v))

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of x, before any rotation."""
        parts = self.to_qkv(self.norm_attention(x)).split(self.widths, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's result, of its argument and of what attention gave."""
        x = x + self.from_heads(attended.flatten(2))
        added: Tensor = self.narrow(nn.functional.gelu(self.widen(self.norm_mlp(x))))
        return x + added


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of x (B, S, H, D), halves paired; cos and sin (S, 1, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class GPT(nn.Module):
    """Bytes (B, S), S at most block_size -> logits of the byte after each (B, S, 256)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, attend: Attention) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(BYTES, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attend) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.to_logits = nn.Linear(shape.width, BYTES, bias=False)
        if shape.positions == "learned":
            self.positions = nn.Parameter(torch.empty(shape.block_size, shape.width))
        else:
            pairs = shape.width // shape.heads // 2
            frequencies = 10000.0 ** -(torch.arange(pairs) / pairs)
            angles = (torch.arange(shape.block_size)[:, None] * frequencies)[:, None]
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        """GPT-2's: normal of deviation 0.02, smaller where a layer adds to the residual stream; norms 1."""
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                adds = name.endswith(("from_heads.weight", "narrow.weight"))
                nn.init.normal_(parameter, 0, 0.02 / math.sqrt(2 * self.shape.layers if adds else 1), generator)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.embed(text)
        rotation = None
        if self.shape.positions == "learned":
            x = x + self.positions[:length]
        else:
            rotation = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.to_logits(self.norm(x))
        return logits


def next_byte_loss(model: GPT, text: Tensor) -> Tensor:
    """Mean cross entropy, in nats per byte, of text (B, S + 1)."""
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def save(model: GPT, path: Path) -> None:
    torch.save({"shape": asdict(model.shape), "weights": model.state_dict()}, path)


def load(path: Path, attend: Attention, device: torch.device | str = "cpu") -> GPT:
    """What `save` wrote. Raises ValueError for another file."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = GPT(Shape(**saved["shape"]), attend).to(device)
        model.load_state_dict(saved["weights"])
    except (pickle.UnpicklingError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no model that tools.train_gpt saved: {error}") from error
    return model


def next_byte(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Drawn from logits (256,); temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.cpu() / temperature).softmax(-1), 1, generator=generator))


@torch.no_grad()
def sample(model: GPT, prompt: bytes, length: int, temperature: float, seed: int) -> str:
    """The prompt and `length` bytes after it; temperature 0 takes the likeliest byte each time.

    Runs the model uncompiled: its text grows, and a graph for every length would cost more than it saves.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.to_logits.weight.device
    written = list(prompt)
    for _ in range(length):
        text = torch.tensor([written[-model.shape.block_size :]], device=device)
        written.append(next_byte(model(text)[0, -1], temperature, generator))
    return bytes(written).decode(errors="replace")
