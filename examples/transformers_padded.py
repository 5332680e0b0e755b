"""A transformers model with random weights on our attention: a step on a padded batch, and generation from it.

    pip install "transformers>=5.24"
    python examples/transformers_padded.py

register() is the whole difference: attn_implementation="compiled_fa" then serves any model that takes transformers'
attention functions. Loss, gradients and generated tokens are those of transformers' own "eager" attention.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compiled_fa.integrations import transformers as integration

LENGTHS = [96, 40, 7]  # tokens of each prompt; padded on the left to the longest
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
NEW_TOKENS = 16
TOLERANCE = 1e-4  # of the greatest gradient: roundings of fp32


def outcome(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the gradient of all weights in one row, and generated tokens."""
    model.zero_grad()
    # A first token is predicted by what stands before it: padding, whose output means nothing in any attention.
    predicted = mask & mask.roll(1, dims=1) & (torch.arange(mask.shape[1]) > 0)
    labels = ids.masked_fill(predicted == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return loss.detach(), gradient, tokens


def main() -> int:
    torch.manual_seed(0)
    integration.register()
    model = LlamaForCausalLM(CONFIG).eval()
    longest = max(LENGTHS)
    mask = (torch.arange(longest) >= longest - torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(2, CONFIG.vocab_size, mask.shape) * mask

    model.set_attn_implementation("eager")
    eager_loss, eager_gradient, eager_tokens = outcome(model, ids, mask)
    model.set_attn_implementation("compiled_fa")
    loss, gradient, tokens = outcome(model, ids, mask)

    apart = ((gradient - eager_gradient).abs().max() / eager_gradient.abs().max()).item()
    print(f"loss {loss:.6f}, eager's {eager_loss:.6f}")
    print(f"gradients differ by {apart:.1e} of the greatest, allowed {TOLERANCE:.0e}")
    same = torch.equal(tokens, eager_tokens)
    print(f"{NEW_TOKENS} generated tokens for each of {len(LENGTHS)} prompts: {'the same' if same else 'others'}")
    right = same and apart <= TOLERANCE and bool((loss - eager_loss).abs() <= TOLERANCE * eager_loss)
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
