"""Tables of CPUs."""

from __future__ import annotations

from .form import SdpaCpu, SplitKV, Tiled, Tuning

ZEN5 = Tuning(
    name="avx512_bf16",
    measured_on="2 cores of an AMD EPYC (Zen 5: AVX-512 with bf16 instructions, no AMX), torch 2.13.0",
    sdpa_cpu=SdpaCpu(
        bf16_tiles_from_keys=256,
        few_queries=4,
        few_queries_tiles_from_keys=4096,
        causal_backward_queries=256,
        shared_call_below_tokens=96,
        shared_call_tokens=512,
        widened_bytes=32 << 20,
    ),
    split_kv=SplitKV(
        most_rows=16,
        decode_from_keys=64,
        decode_from_elements=1 << 16,
        decode_from_elements_wide=1 << 20,
        decode_long_keys=1024,
        split_keys=64,
        long_split_keys=256,
        long_split_from_keys=4096,
        short_keys=96,
        short_from_elements=1 << 18,
        short_block_rows=4,
        short_key_multiple=16,
        score_bytes=4 << 20,
        accumulators=16,
        register_bytes=64,
    ),
    tiled=Tiled(
        tile=512,
        bf16_tile_queries=1024,
        banded_tile=256,
        thin_rows=16,
        thin_tile_keys=4096,
        score_bytes_a_core=1 << 20,
        chunk_bytes=64 << 20,
        bf16_from_scores=1 << 14,
        bf16_lengths=84,
        bf16_lengths_banded=42,
        bf16_length_multiple=64,
        grouped_tokens=128,
        exact_group_sequences=4,
        uncut=256,
        softcap_kept_operations=20,
        backward_kept_operations=1000,
        kept_buffer_bytes=16 << 20,
        kept_bytes=128 << 20,
    ),
)
