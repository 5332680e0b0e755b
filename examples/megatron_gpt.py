"""Megatron-Core's GPT with our core attention: the same losses as with scores written out.

    pip install megatron-core
    python examples/megatron_gpt.py

One rank, on the CPU, where Megatron's own attention asks for CUDA; so the other attention here is a few lines. With
torchrun and tensor_model_parallel_size the lines that name CoreAttention are the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from compiled_fa.integrations.megatron import CoreAttention

README = Path(__file__).resolve().parent.parent / "README.md"
# What torchrun sets.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29542"}
LENGTH, BATCH = 64, 8
TOLERANCE = 1e-4  # in nats: roundings of fp32 that 20 steps of AdamW carry along


class WrittenOut(CoreAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * query.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", probs, value).flatten(2)


def losses(attention: str, steps: int) -> list[float]:
    """Of each step of training: attention is "compiled_fa" or "eager"."""
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = CoreAttention if attention != "eager" else WrittenOut
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = torch.frombuffer(bytearray(README.read_bytes()), dtype=torch.uint8).unfold(0, LENGTH + 1, 1)
    generator, positions = torch.Generator().manual_seed(0), torch.arange(LENGTH).expand(BATCH, -1)
    found = []
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (BATCH,), generator=generator)].long()
        loss = model(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> int:
    eager, ours = losses("eager", 20), losses("compiled_fa", 20)
    apart = max(abs(a - b) for a, b in zip(eager, ours, strict=True))
    print(f"loss {ours[0]:.3f} to {ours[-1]:.3f} in {len(ours)} steps; from those written out at most {apart:.1e} nats")
    right = ours[-1] < ours[0] and apart <= TOLERANCE
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
