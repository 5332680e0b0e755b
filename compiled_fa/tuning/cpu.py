"""Tables of CPUs, by class.

What a class was not measured at is as in PLAIN: PyTorch's kernel serves all that it can, and tiles only what it cannot.
"""

from __future__ import annotations

from dataclasses import replace

from .form import NEVER, SdpaCpu, SplitKV, Tiled, Tuning

PLAIN = Tuning(
    name="plain",
    sdpa_cpu=SdpaCpu(
        measured_on=None,
        few_queries=0,
        few_queries_tiles_from_keys=NEVER,
        bf16_tiles_from_keys=NEVER,
        backward_tiles_from_queries=NEVER,
        causal_backward_tiles_from_queries=NEVER,
        bf16_backward_tiles_from_queries=NEVER,
        bf16_causal_backward_tiles_from_queries=NEVER,
        shared_call_below_tokens=96,
        shared_call_tokens=512,
        widens_bf16=False,
        widened_bytes=32 << 20,
    ),
    split_kv=SplitKV(
        measured_on=None,
        most_rows=16,
        decode_from_keys=64,
        decode_from_elements=1 << 16,
        decode_from_elements_beside_sdpa_16bit=NEVER,
        decode_from_elements_beside_sdpa=NEVER,
        decode_long_keys=1024,
        split_keys=64,
        long_split_keys=256,
        long_split_from_keys=4096,
        short_keys=96,
        short_from_elements=1 << 18,
        short_from_elements_beside_sdpa=NEVER,
        short_block_rows=4,
        short_key_multiple=16,
        score_bytes=4 << 20,
        accumulators=8,
        register_bytes=16,
    ),
    tiled=Tiled(
        measured_on=None,
        tile=512,
        bf16_tile_queries=1024,
        banded_tile=256,
        thin_rows=16,
        thin_tile_keys=4096,
        score_bytes_a_core=1 << 20,
        chunk_bytes=64 << 20,
        bf16_from_scores=NEVER,
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
        memory_parts=0,
        whole_rows=0,
        group_scores=0,
    ),
)

_ZEN5 = "2 cores of an AMD EPYC (Zen 5), torch 2.13.0"

AVX512_BF16 = Tuning(
    name="avx512_bf16",
    sdpa_cpu=replace(
        PLAIN.sdpa_cpu,
        measured_on=_ZEN5,
        few_queries=4,
        few_queries_tiles_from_keys=4096,
        bf16_tiles_from_keys=256,
        causal_backward_tiles_from_queries=257,
        bf16_backward_tiles_from_queries=0,
        bf16_causal_backward_tiles_from_queries=0,
    ),
    split_kv=replace(
        PLAIN.split_kv,
        measured_on=_ZEN5,
        decode_from_elements_beside_sdpa_16bit=1 << 16,
        decode_from_elements_beside_sdpa=1 << 20,
        short_from_elements_beside_sdpa=1 << 18,
        accumulators=16,
        register_bytes=64,
    ),
    tiled=replace(PLAIN.tiled, measured_on=_ZEN5, bf16_from_scores=1 << 14),
)

AVX512 = replace(PLAIN, name="avx512", split_kv=replace(PLAIN.split_kv, accumulators=16, register_bytes=64))

# Measured there with the table of a Zen 5: fp32 with gradients 1.10 of SDPA, causal 1.17; bf16 with gradients, by the
# kernel in bf16, eight times the time of fp32; 2,000 short sequences 0.80. So all but the last is for the kernel.
AVX2 = replace(
    PLAIN,
    name="avx2",
    sdpa_cpu=replace(
        PLAIN.sdpa_cpu,
        measured_on="2 cores of an AMD EPYC (Zen 3), torch 2.13.0: which calls are for tiles",
        widens_bf16=True,
    ),
    split_kv=replace(
        PLAIN.split_kv,
        measured_on="2 cores of an AMD EPYC (Zen 3), torch 2.13.0: short sequences",
        short_from_elements_beside_sdpa=1 << 18,
        register_bytes=32,
    ),
)

# Measured there with the table of a Zen 5: in bf16 the kernel takes half the time of tiles forward; backward tiles are
# faster, but not causal ones. One query in bf16: from 1,024 keys on of 8 heads of 128, but not with 256.
_SAPPHIRE_RAPIDS = "2 cores of an Intel Xeon (Sapphire Rapids), torch 2.13.0"
AMX = replace(
    AVX512_BF16,
    name="amx",
    sdpa_cpu=replace(
        PLAIN.sdpa_cpu,
        measured_on=f"{_SAPPHIRE_RAPIDS}: which calls are for tiles",
        bf16_backward_tiles_from_queries=0,
    ),
    split_kv=replace(
        AVX512_BF16.split_kv,
        measured_on=f"{_SAPPHIRE_RAPIDS}: which calls it takes",
        decode_from_elements_beside_sdpa_16bit=1 << 20,
    ),
    tiled=replace(AVX512_BF16.tiled, measured_on=None),
)

ARM = replace(PLAIN, name="arm", split_kv=replace(PLAIN.split_kv, accumulators=16))

TABLES = {table.name: table for table in (AVX2, AVX512, AVX512_BF16, AMX, ARM, PLAIN)}
