"""Who is timed: every way to compute a case that this machine has. One dictionary, `PEERS`, names them all."""

from torch.nn.attention import SDPBackend

from . import cache, flex, installed, naive, ours, ragged, sdpa
from .base import Peer, Prepared

PEERS: dict[str, Peer] = {
    "ours": ours.OURS,
    "ours dense": ours.OURS_DENSE,
    "ours fused": ours.by_engine("fused"),
    "ours triton": ours.by_engine("triton"),
    "ours cache": cache.CACHE,
    "ours one piece": cache.ONE_PIECE,
    "ours append": cache.APPEND,
    "naive": naive.NAIVE,
    "SDPA": sdpa.SDPA,
    "SDPA flash": sdpa.on_backend(SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": sdpa.on_backend(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cuDNN": sdpa.on_backend(SDPBackend.CUDNN_ATTENTION),
    "SDPA math": sdpa.on_backend(SDPBackend.MATH),
    "SDPA padded": ragged.PADDED,
    "SDPA loop": ragged.LOOP,
    "nested": ragged.NESTED,
    "flex": flex.FLEX,
    "flash_attn": installed.FLASH_ATTN,
    "xformers": installed.XFORMERS,
    "turing": installed.TURING,
    "noflash": installed.NOFLASH,
    "copy": sdpa.COPY,
}

__all__ = ["PEERS", "Peer", "Prepared"]
