"""Attention inside models' layers: ours by each road beside eager and SDPA attention, a step of the whole layer.

Llama's layer is transformers' (skipped where there is none); the ViT block and the UNet's attention block, of Stable
Diffusion's shapes, are written here. Roads, by the name of their record: naive, scores written out (transformers'
"eager"); SDPA; ours, flash_attn's functions (transformers: attn_implementation="compiled_fa"); ours sdpa, PyTorch's
function under compiled_fa.sdpa(everywhere=True); of packed sequences also ours padded, on the padded batch that naive
and SDPA have.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_fa
from compiled_fa import flash_attn_func
from compiled_fa.testing.budget import Expected, error

from .cases import SHORT_DTYPES, Direction
from .parity import PEER_SLACK
from .timing import interleaved

BOTH: tuple[Direction, ...] = ("forward", "forward+backward")
PYTORCHS = F.scaled_dot_product_attention
ROADS = ("ours", "ours sdpa", "ours padded", "SDPA", "naive")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, Sq, H, D), k, v (B, Sk, H, D) -> (B, Sq, H, D)


@dataclass(frozen=True)
class Road:
    """A module of its own, and how it is called: -> rows (tokens, width), in the same order for all roads."""

    module: nn.Module
    call: Callable[[nn.Module], Tensor]

    def step(self, direction: Direction) -> list[Tensor]:
        """Rows, and with backward the gradients of all weights, of a loss of them."""
        if direction == "forward":
            with torch.no_grad():
                return [self.call(self.module)]
        rows = self.call(self.module)
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        return [rows.detach(), *torch.autograd.grad(rows.float().square().mean(), weights)]


@dataclass(frozen=True)
class Layer:
    """A layer with its inputs. hooked: ours sdpa is among its roads, which PyTorch's function is replaced for."""

    label: str
    roads: dict[str, Road]
    directions: tuple[Direction, ...] = BOTH
    hooked: bool = False


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v)


def _pytorchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return PYTORCHS(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _hooked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the function that stands in torch.nn.functional when it is called."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = flash_attn_func(q, k, v)
    return out


ATTENDS: dict[str, Attend] = {"naive": _written_out, "SDPA": _pytorchs, "ours": _ours, "ours sdpa": _hooked}


class Attention(nn.Module):
    """Queries of x, keys and values of x or of a context of another width."""

    def __init__(self, width: int, nheads: int, attend: Attend, context_width: int | None = None) -> None:
        super().__init__()
        self.nheads, self.attend = nheads, attend
        self.q, self.projection = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(context_width or width, 2 * width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.nheads, -1))
        k, v = self.kv(x if context is None else context).unflatten(-1, (2, self.nheads, -1)).unbind(2)
        out: Tensor = self.projection(self.attend(q, k, v).flatten(-2))
        return out


class Block(nn.Module):
    """Pre-norm attention, with a context (a text's tokens) a second one, and an MLP: a ViT's block, and a UNet's."""

    def __init__(self, width: int, nheads: int, attend: Attend, context_width: int | None = None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if context_width else 2))
        self.own = Attention(width, nheads, attend)
        self.other = Attention(width, nheads, attend, context_width) if context_width else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.own(self.norms[0](x))
        if self.other is not None:
            x = x + self.other(self.norms[1](x), context)
        out: Tensor = x + self.mlp(self.norms[-1](x))
        return out


def _blocks(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int], nheads: int, context: tuple[int, int] | None
) -> dict[str, Road]:
    """shape: batch, tokens, width. context: tokens and width of what a second attention reads."""
    batch, _, width = shape
    torch.manual_seed(0)
    x = torch.randn(shape).to(device, dtype)
    text = None if context is None else torch.randn(batch, *context).to(device, dtype)
    roads = {}
    for name, attend in ATTENDS.items():
        torch.manual_seed(1)
        block = Block(width, nheads, attend, context[1] if context else None).to(device, dtype)
        roads[name] = Road(block, lambda module: module(x, text).flatten(0, 1))
    return roads


def vit(quick: bool, dtype: torch.dtype, device: torch.device) -> Layer:
    """ViT-B/16 on 224 × 224: 197 tokens, 12 heads of 64."""
    shape, nheads = ((2, 17, 32), 2) if quick else ((8, 197, 768), 12)
    roads = _blocks(dtype, device, shape, nheads, None)
    return Layer(_label("ViT block", shape[0], shape[1], nheads, shape[2] // nheads, dtype), roads, BOTH, True)


def unet(quick: bool, dtype: torch.dtype, device: torch.device) -> Layer:
    """Stable Diffusion 1.5's largest: 64 × 64 latents with and without a prompt of 77 tokens, 8 heads of 40."""
    shape, nheads, context = ((2, 64, 32), 2, (7, 24)) if quick else ((2, 4096, 320), 8, (77, 768))
    roads = _blocks(dtype, device, shape, nheads, context)
    label = _label("UNet attention block", shape[0], shape[1], nheads, shape[2] // nheads, dtype)
    return Layer(label, roads, BOTH[:1], True)


def _llama(quick: bool, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, int, str]:
    """A Llama of one layer -> the model, its width, and what a label says of its heads."""
    from transformers import LlamaConfig, LlamaModel

    from compiled_fa.integrations import transformers as integration

    integration.register()
    heads, keys, head_dim = (4, 2, 8) if quick else (16, 4, 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=heads * head_dim,
        intermediate_size=(11 * heads * head_dim) // 4,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model: nn.Module = LlamaModel(config)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith("embed"))  # its inputs are embedded already
    return model.to(device, dtype), heads * head_dim, f"H{heads}/{keys} D{head_dim}"


IMPLEMENTATIONS = {"naive": "eager", "SDPA": "sdpa", "ours": "compiled_fa", "ours padded": "compiled_fa"}


def _with_attention(model: nn.Module, road: str) -> nn.Module:
    own: Any = copy.deepcopy(model)
    own.set_attn_implementation(IMPLEMENTATIONS[road])
    module: nn.Module = own
    return module


def llama(quick: bool, dtype: torch.dtype, device: torch.device) -> Layer:
    """transformers' Llama layer, causal, 16 heads on 4."""
    model, width, heads = _llama(quick, dtype, device)
    tokens = 24 if quick else 1024
    x = torch.randn(1, tokens, width).to(device, dtype)

    def call(module: nn.Module) -> Tensor:
        rows: Tensor = module(inputs_embeds=x, use_cache=False)[0][0]
        return rows

    roads = {name: Road(_with_attention(model, name), call) for name in ("naive", "SDPA", "ours")}
    return Layer(f"Llama layer B1 N{tokens} {heads} {_short(dtype)} causal", roads)


def packed(quick: bool, dtype: torch.dtype, device: torch.device) -> Layer:
    """The same layer in fine-tuning on short sequences: packed for ours, in a padded batch for the others."""
    model, width, heads = _llama(quick, dtype, device)
    drawn = random.Random(0)
    lengths = [drawn.randint(3, 12) if quick else drawn.randint(16, 256) for _ in range(4 if quick else 32)]
    longest = max(lengths)
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    rows = torch.randn(sum(lengths), width).to(device, dtype)
    batch = rows.new_zeros(*mask.shape, width).masked_scatter_(mask[..., None], rows)
    places = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
    packing = {f"cu_seq_lens_{side}": starts for side in "qk"} | {f"max_length_{side}": longest for side in "qk"}

    def padded_call(module: nn.Module) -> Tensor:
        found: Tensor = module(inputs_embeds=batch, attention_mask=mask.long(), use_cache=False)[0][mask]
        return found

    def packed_call(module: nn.Module) -> Tensor:
        found: Tensor = module(inputs_embeds=rows[None], position_ids=places, use_cache=False, **packing)[0][0]
        return found

    calls = {"naive": padded_call, "SDPA": padded_call, "ours": packed_call, "ours padded": padded_call}
    roads = {name: Road(_with_attention(model, name), call) for name, call in calls.items()}
    label = f"Llama layer, {len(lengths)} seqs of {min(lengths)}..{longest} {heads} {_short(dtype)} causal"
    return Layer(label, roads, BOTH[1:])


def _short(dtype: torch.dtype) -> str:
    return SHORT_DTYPES[str(dtype).removeprefix("torch.")]


def _label(name: str, batch: int, tokens: int, nheads: int, head_dim: int, dtype: torch.dtype) -> str:
    return f"{name} B{batch} N{tokens} H{nheads} D{head_dim} {_short(dtype)}"


# Name -> the layer, and the package that it needs.
LAYERS: dict[str, tuple[Callable[[bool, torch.dtype, torch.device], Layer], str | None]] = {
    "llama": (llama, "transformers"),
    "packed": (packed, "transformers"),
    "vit": (vit, None),
    "unet": (unet, None),
}


def complaint(make: Callable[..., Layer], name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with a road, held against scores written out in float64 on the small layer; None: nothing."""
    layer, exact_layer = make(True, dtype, device), make(True, torch.float64, device)
    with compiled_fa.sdpa(everywhere=True) if layer.hooked else nullcontext():
        found = layer.roads[name].step(layer.directions[-1])
    naive = layer.roads["naive"].step(layer.directions[-1])
    exact = exact_layer.roads["naive"].step(layer.directions[-1])
    magnitude = 4 * max(float(x.abs().max()) for x in exact)  # a gradient's terms may be as large as another's
    for at, (result, rough, right) in enumerate(zip(found, naive, exact, strict=True)):
        allowed = Expected.of(rough, right, magnitude)
        off = error(result, right)
        if not allowed.allows(off, 1.0 if name.startswith("ours") else PEER_SLACK):
            what = "its output" if at == 0 else f"gradient {at}"
            return f"{what} is off by {off:.2g}, allowed {allowed.allowed:.2g}"
    return None


def records(
    quick: bool, device: torch.device, seconds: float, rounds: int | None, match: str = ""
) -> Iterator[list[dict[str, Any]]]:
    """A list for each layer, dtype and direction, of a record a road. match: what a layer's label must contain."""
    for make, needed in LAYERS.values():
        for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
            if needed is not None and importlib.util.find_spec(needed) is None:
                continue
            layer = make(quick, dtype, device)
            if match not in layer.label:
                continue
            wrong = {name: complaint(make, name, dtype, device) for name in layer.roads}
            for direction in layer.directions:
                yield _timed(layer, direction, wrong, device, seconds, rounds)


def _timed(
    layer: Layer,
    direction: Direction,
    wrong: dict[str, str | None],
    device: torch.device,
    seconds: float,
    rounds: int | None,
) -> list[dict[str, Any]]:
    common = {"case": layer.label, "direction": direction}
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in (name for name in ROADS if name in layer.roads):
        if (reason := wrong[name]) is not None:
            found[name] = {**common, "peer": name, "status": "mismatch", "reason": reason}
            continue
        found[name] = {**common, "peer": name, "status": "timed"}
        runs[name] = partial(layer.roads[name].step, direction)
    with compiled_fa.sdpa(everywhere=True) if layer.hooked else nullcontext():
        for name, timing in interleaved(runs, device, seconds, rounds).items():
            found[name] |= {"median_s": timing.median, "iqr_s": timing.iqr, "rounds": timing.rounds}
    return list(found.values())
