"""F.scaled_dot_product_attention through our ops: in a block, or for a whole process.

    with compiled_fa.sdpa() as calls:
        model(x)
    print(calls)

While it is on, scaled_dot_product_attention is our function in torch.nn.functional, and in each module that had
imported it by name; afterwards PyTorch's stands there again. Torch's code in C++ that calls the operator itself, and
torch.ops.aten.scaled_dot_product_attention, are not reached.

Source: torch.nn.functional.scaled_dot_product_attention, whose meaning this keeps.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import DTYPES, MAX_HEAD_DIM
from .with_bias import attention

NAME = "scaled_dot_product_attention"
FLASH_HEAD_DIM = 256  # the greatest that PyTorch's flash kernel takes
FLASH_CAPABILITY = (8, 0)  # cards from which on PyTorch's flash kernel runs
ALIGNMENT = 16  # bytes; PyTorch's memory-efficient kernel takes rows that are multiples of it

_pytorchs = F.scaled_dot_product_attention


@dataclass
class Calls:
    """What became of the calls outside of compiled code. left: how many were left to PyTorch, by reason."""

    served: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = [f"{count} left to PyTorch: {reason}" for reason, count in self.left.most_common()]
        return "; ".join([f"{self.served} served by compiled_fa", *reasons])


@dataclass
class _Enabled:
    everywhere: bool
    calls: Calls
    places: list[tuple[ModuleType, str]]


_enabled: list[_Enabled] = []  # the last counts
_lock = threading.Lock()


@contextmanager
def sdpa(everywhere: bool = False) -> Iterator[Calls]:
    """F.scaled_dot_product_attention by our ops in this block, in all threads, where they can serve.

    Args:
        everywhere: also where PyTorch has a fused kernel of its own, which on a CPU and from Ampere on is as fast.

    Returns:
        Calls, which counts and says why calls were left to PyTorch.

    Example:
        with compiled_fa.sdpa():
            out = model(x)  # nn.MultiheadAttention, timm, diffusers ...
    """
    calls = enable_sdpa(everywhere)
    try:
        yield calls
    finally:
        disable_sdpa()


def enable_sdpa(everywhere: bool = False) -> Calls:
    """sdpa() from now on, until disable_sdpa(). Calls of both nest: each disable_sdpa() undoes one enable_sdpa()."""
    with _lock:
        places = [] if _enabled else _places(_pytorchs)
        calls = Calls()
        _enabled.append(_Enabled(everywhere, calls, places))
        for module, name in places:
            setattr(module, name, scaled_dot_product_attention)
        return calls


def disable_sdpa() -> None:
    """Undo the last enable_sdpa(): after the first of them, PyTorch's function stands everywhere that ours did.

    Raises:
        RuntimeError: it is not enabled.
    """
    with _lock:
        if not _enabled:
            raise RuntimeError("compiled_fa.sdpa is not enabled")
        _enabled.pop()
        # Modules imported meanwhile took ours.
        for module, name in [] if _enabled else _places(scaled_dot_product_attention):
            setattr(module, name, _pytorchs)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, by our ops where sdpa_reason gives none.

    Args:
        query: (B, H, Sq, D) or (H, Sq, D).
        key, value: (B, Hk, Sk, D) and (B, Hk, Sk, Dv), or without B. H is Hk, or a multiple of it with enable_gqa.
        attn_mask: what broadcasts to (B, H, Sq, Sk) or (H, Sq, Sk): bool, True where a key is seen, fp32, or of query's
            dtype.
        The rest: PyTorch's; is_causal is aligned to the top left.

    Returns:
        (B, H, Sq, Dv) or (H, Sq, Dv).
    """
    enabled = _enabled[-1] if _enabled else None
    everywhere = enabled is None or enabled.everywhere
    reason = sdpa_reason(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, everywhere=everywhere)
    if enabled is not None and not torch.compiler.is_compiling():
        if reason is None:
            enabled.calls.served += 1
        else:
            enabled.calls.left[reason] += 1
    if reason is not None:
        return _pytorchs(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.dim() == 3:
        query, key, value = query[None], key[None], value[None]
        return _serve(query, key, value, attn_mask, dropout_p, is_causal, scale)[0]
    return _serve(query, key, value, attn_mask, dropout_p, is_causal, scale)


def sdpa_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    everywhere: bool = False,
) -> str | None:
    """Why such a call of F.scaled_dot_product_attention is left to PyTorch; None: we serve it.

    Args: as scaled_dot_product_attention; everywhere: as sdpa.
    """
    tensors = (query, key, value)
    given = tensors if attn_mask is None else (*tensors, attn_mask)
    if any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in given):
        return "a tensor of a class of its own"
    if attn_mask is not None and is_causal:
        return "a mask and is_causal, which are not for one call"
    if query.dim() not in (3, 4) or key.dim() != query.dim() or value.dim() != query.dim():
        return "other than three or four dimensions"
    if any(x.dtype not in DTYPES or x.dtype != query.dtype or x.device != query.device for x in tensors):
        return "a dtype, dtypes or devices that are not served"
    if query.shape[:-3] != key.shape[:-3] or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        return "shapes that do not fit without broadcasting"
    if any(size == 0 for x in tensors for size in x.shape):
        return "an empty tensor"
    nheads, nheads_k = query.shape[-3], key.shape[-3]
    if nheads != nheads_k and not (enable_gqa and nheads % nheads_k == 0):
        return "numbers of heads that do not fit"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"a head_dim over {MAX_HEAD_DIM}"
    if not 0.0 <= dropout_p < 1.0:
        return "a dropout_p that is not at least 0 and below 1"
    if is_causal and query.shape[-2] > key.shape[-2]:
        return "causal, with more queries than keys"
    if attn_mask is not None and not _mask_fits(query, key, attn_mask):
        return "a mask whose shape, dtype or device does not fit"
    if not everywhere and _pytorch_is_fused(query, key, value, attn_mask, dropout_p):
        return "PyTorch's own fused kernel"
    return None


def _mask_fits(query: Tensor, key: Tensor, attn_mask: Tensor) -> bool:
    """Is it what PyTorch takes for a mask of these? What is not, it refuses."""
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) or attn_mask.device != query.device:
        return False
    scores = (*query.shape[:-1], key.shape[-2])
    sizes = zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    return attn_mask.dim() <= len(scores) and all(size == 1 or size == full for size, full in sizes)


def _pytorch_is_fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> bool:
    """Is this call for a kernel of PyTorch's that makes no score matrix?

    On CUDA cards before FLASH_CAPABILITY it has only its memory-efficient one, and the call is ours. Of a mask its
    kernel for CPUs gives no gradient, and its flash kernel for CUDA takes none: there it is the memory-efficient one's,
    which has no groups of heads.
    """
    head_dim, same = query.shape[-1], query.shape[-1] == value.shape[-1]
    taken = same and query.dim() == 4 and all(x.stride(-1) == 1 for x in (query, key, value))
    if query.device.type == "cpu":
        mask_taken = attn_mask is None or (attn_mask.dim() in (2, 4) and not attn_mask.requires_grad)
        return taken and mask_taken and dropout_p == 0.0
    if query.device.type == "cuda" and torch.version.hip is None:
        capable = torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY and query.dtype != torch.float64
        if attn_mask is None:
            return capable and taken and head_dim <= FLASH_HEAD_DIM
        lies = attn_mask.stride()[-1:] in ((), (1,)) and query.shape[-3] == key.shape[-3]
        return capable and taken and lies and head_dim * query.dtype.itemsize % ALIGNMENT == 0
    return True  # of other devices' kernels nothing was measured


def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    if is_causal:  # queries stand at the first keys, and none sees those behind
        key, value = key[..., : query.shape[-2], :], value[..., : query.shape[-2], :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = attention(q, k, v, attn_mask, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal)
    return out.transpose(1, 2)


def _places(function: object) -> list[tuple[ModuleType, str]]:
    """Modules, and names in them, that are the function. Not where it is from."""
    kept = (__name__, "torch._C._nn")
    modules = [
        module for name, module in list(sys.modules.items()) if isinstance(module, ModuleType) and name not in kept
    ]
    return [(module, NAME) for module in modules if vars(module).get(NAME) is function]
