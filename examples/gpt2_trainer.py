"""Hugging Face's GPT-2 under Hugging Face's Trainer: the losses of "eager" with attn_implementation="compiled_fa".

    pip install "transformers>=5.24" accelerate
    python examples/gpt2_trainer.py

A small GPT-2 with random weights learns the bytes of README.md for 20 steps, padded on the right to unequal lengths.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, logging

from compiled_fa.integrations import transformers as integration

README = Path(__file__).resolve().parent.parent / "README.md"
PADDING, LENGTH = 256, 64  # bytes are 0 to 255
TOLERANCE = 2e-5  # in nats: roundings of fp32 that 20 steps of AdamW carry along
# No dropout, which draws other numbers in each attention.
CONFIG = {"vocab_size": 257, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "attn_pdrop": 0.0,
          "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": PADDING, "eos_token_id": PADDING}  # fmt: skip


def rows(count: int) -> list[dict[str, list[int]]]:
    """Pieces of the text, from 20 bytes on, each with padding behind it that is no label."""
    text = README.read_bytes()
    generator = torch.Generator().manual_seed(0)
    found = []
    for start in torch.randint(len(text) - LENGTH, (count,), generator=generator).tolist():
        length = int(torch.randint(20, LENGTH + 1, (), generator=generator))
        piece, missing = list(text[start : start + length]), LENGTH - length
        row = {"input_ids": piece + [PADDING] * missing, "labels": piece + [-100] * missing}
        found.append({**row, "attention_mask": [1] * length + [0] * missing})
    return found


def losses(attention: str, steps: int, batch: int = 8) -> list[float]:
    """Of each step of training with this attn_implementation."""
    integration.register()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config: Any = GPT2Config(**CONFIG, attn_implementation=attention)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=rows(steps * batch))
        trainer.log = lambda logs, *rest: trainer.state.log_history.append(logs)  # instead of printing them
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> int:
    eager, ours = losses("eager", 20), losses("compiled_fa", 20)
    apart = max(abs(a - b) for a, b in zip(eager, ours, strict=True))
    print(f"loss {ours[0]:.3f} to {ours[-1]:.3f} in {len(ours)} steps; from eager's at most {apart:.1e} nats")
    right = len(ours) == 20 and ours[-1] < ours[0] and apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
