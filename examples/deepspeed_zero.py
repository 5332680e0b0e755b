"""DeepSpeed's ZeRO, stages 1 and 3, on a GPT-2 of transformers: the same losses with our attention as with "eager".

    pip install "transformers>=5.24" deepspeed
    python examples/deepspeed_zero.py

One rank, on a CPU where there is nothing else. On two:

    torchrun --nproc-per-node 2 examples/deepspeed_zero.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compiled_fa.integrations import transformers as integration

README = Path(__file__).resolve().parent.parent / "README.md"
# What its launcher sets.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
LENGTH, BATCH = 64, 8
TOLERANCE = 2e-5  # in nats: roundings of fp32 that 10 steps of AdamW carry along
CONFIG = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "attn_pdrop": 0.0,
          "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def losses(attention: str, steps: int, stage: int = 1) -> list[float]:
    """Of each step of training with this attn_implementation under ZeRO of this stage."""
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    integration.register()
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    config: Any = GPT2Config(**CONFIG, attn_implementation=attention)
    model = GPT2LMHeadModel(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        config={
            "train_batch_size": BATCH * int(os.environ["WORLD_SIZE"]),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    windows = torch.frombuffer(bytearray(README.read_bytes()), dtype=torch.uint8).unfold(0, LENGTH, 1)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    found = []
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (BATCH,), generator=generator)].long().to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


def main() -> int:
    right = True
    for stage in (1, 3):
        eager, ours = losses("eager", 10, stage), losses("compiled_fa", 10, stage)
        apart = max(abs(a - b) for a, b in zip(eager, ours, strict=True))
        print(f"ZeRO-{stage}: loss {ours[0]:.3f} to {ours[-1]:.3f}, from eager's at most {apart:.1e} nats")
        right &= ours[-1] < ours[0] and apart <= TOLERANCE
    torch.distributed.destroy_process_group()
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
