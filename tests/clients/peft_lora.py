"""A LoRA step of peft, by transformers' Trainer under torch.compile: the losses of eager attention.

    python -m compiled_fa.run tests/clients/peft_lora.py

Llama's weights are frozen, so attention's inputs require gradients in some layers' q and v only.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, logging

from compiled_fa.integrations import transformers as integration

STEPS, LENGTH = 4, 24
TOLERANCE = 1e-4  # in nats


def losses(attention: str, compiled: bool) -> list[float]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    ids = torch.randint(61, (STEPS * 2, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )
        rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in ids]
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.log = lambda logs, *rest: trainer.state.log_history.append(logs)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> int:
    integration.register()
    logging.set_verbosity_error()
    eager = losses("eager", False)
    apart = {compiled: max(abs(a - b) for a, b in zip(eager, losses("compiled_fa", compiled), strict=True))
             for compiled in (False, True)}  # fmt: skip
    print(f"losses {eager[0]:.4f} to {eager[-1]:.4f}; ours differ by {apart[False]:.1e}, compiled by {apart[True]:.1e}")
    right = len(eager) == STEPS and eager[0] != eager[-1] and max(apart.values()) <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
