"""Tables of CPUs, by class.

What a class was not measured at is as in PLAIN: PyTorch's kernel serves all that it can, and tiles only what it cannot.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

from .form import AT_EVERY_CALL, AT_NO_CALL, NEVER, Rule, SdpaCpu, SplitKV, Tiled, Tuning


def _bf16_rules(forward: Rule, backward: Rule) -> dict[str, Any]:
    """Of all kinds of calls alike."""
    kinds = "", "_causal", "_gqa", "_gqa_causal"
    return {f"tiles_forward_bf16{kind}": forward for kind in kinds} | {
        f"tiles_backward_bf16{kind}": backward for kind in ("", "_gqa")
    }


PLAIN = Tuning(
    name="plain",
    sdpa_cpu=SdpaCpu(
        measured_on=None,
        tiles_forward=AT_NO_CALL,
        tiles_backward=AT_NO_CALL,
        **_bf16_rules(AT_NO_CALL, AT_NO_CALL),
        shared_call_below_tokens=96,
        shared_call_tokens=512,
        call_products=1 << 22,
        call_tokens=256,
        few_queries=16,
        few_queries_from_elements=1 << 18,
        few_queries_from_elements_bf16=1 << 16,
        widens_bf16=False,
        widened_bytes=32 << 20,
    ),
    split_kv=SplitKV(
        measured_on=None,
        most_rows=16,
        decode_from_keys=64,
        decode_from_elements=1 << 16,
        decode_beside_tiles=AT_EVERY_CALL,
        decode_beside_sdpa=AT_NO_CALL,
        decode_beside_sdpa_16bit=AT_NO_CALL,
        decode_beside_sdpa_16bit_masked=AT_NO_CALL,
        decode_rows_beside_sdpa=16,
        split_keys=64,
        long_split_keys=256,
        long_split_from_keys=4096,
        short_keys=96,
        short_from_elements=1 << 18,
        short_beside_tiles=AT_EVERY_CALL,
        short_beside_sdpa=AT_NO_CALL,
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


def _from_elements_of_keys(elements: int) -> Rule:
    return Rule(log(elements), keys=-1.0, batch=-1.0, heads=-1.0, heads_per_key=1.0, head_dim=-1.0)


# Rules: tools.rule_fit on random calls, as bench choice draws them, of other seeds. Tiles in bf16: on 123, 128, 179 and
# 159 forward, 140 and 205 backward, in other dtypes on 728; of split_kv on 123, 403, 26 and 256 that both ways took;
# with a mask, in 16 bits, on 84 of 8 to 16 rows.
_ZEN4 = "2 cores of an AMD EPYC (Zen 4), torch 2.13.0, 2026-11-27"

AVX512_BF16 = Tuning(
    name="avx512_bf16",
    sdpa_cpu=replace(
        PLAIN.sdpa_cpu,
        measured_on=f"{_ZEN4}: which calls are for tiles",
        tiles_forward=Rule(2.563, 0.013, -0.165, 0.005, -0.192, -0.069, -0.092, -0.195, 0.046),
        tiles_forward_bf16=Rule(6.478, -0.292, -0.181, -0.106, -0.308, 0.0, -0.64, 0.0, -0.218),
        tiles_forward_bf16_causal=Rule(1.913, -0.009, -0.092, -0.07, -0.127, 0.0, -0.063, 0.0, 0.145),
        tiles_forward_bf16_gqa=Rule(6.218, -0.212, -0.136, -0.242, -0.399, 0.04, -0.681, 0.0, -0.194),
        tiles_forward_bf16_gqa_causal=Rule(4.873, 0.021, -0.271, -0.256, -0.448, 0.305, -0.501, 0.0, 0.55),
        tiles_backward=Rule(2.647, 0.093, -0.186, -0.026, 0.016, -0.044, -0.294, -0.04, -0.021),
        tiles_backward_bf16=Rule(3.338, -0.193, -0.168, -0.074, 0.039, 0.0, -0.268, 0.67, 0.139),
        tiles_backward_bf16_gqa=Rule(4.962, -0.303, -0.245, -0.057, -0.146, -0.138, -0.363, 0.231, -0.118),
    ),
    split_kv=replace(
        PLAIN.split_kv,
        measured_on=f"{_ZEN4}: which calls it takes",
        decode_beside_tiles=Rule(-1.014, 0.152, -0.002, -0.068, 0.02, 0.077, -0.031, 0.005, -0.085),
        decode_from_keys=16,
        decode_from_elements=1 << 13,
        decode_beside_sdpa=Rule(1.467, -0.095, -0.045, 0.007, -0.289, -0.067, -0.23, -0.467, -0.528),
        decode_beside_sdpa_16bit=AT_EVERY_CALL,
        decode_beside_sdpa_16bit_masked=Rule(-2.568, 0.608, 0.161, 0.158, -0.123, 0.617, -0.09),
        decode_rows_beside_sdpa=8,
        short_keys=400,
        short_from_elements=1 << 13,
        short_beside_tiles=Rule(-3.251, 0.083, 0.083, -0.071, 0.059, 0.194, 0.495, -0.693),
        short_beside_sdpa=Rule(-2.945, 0.217, 0.193, -0.055, 0.002, 0.142, 0.26, -0.461),
        accumulators=16,
        register_bytes=64,
    ),
    tiled=replace(PLAIN.tiled, bf16_from_scores=1 << 14),
)

# Measured there as lengths from which on: in bf16 tiles from 256 keys on, and for gradients at every length; causal
# gradients by tiles from 257 queries on; few queries on long caches; in fp32 split_kv from 2**20 elements of 256 keys a
# sequence on, or 2**19 of 1,024. As rules they are near to that, and were not measured again.
_ZEN5 = "2 cores of an AMD EPYC (Zen 5), torch 2.13.0"

ZEN5 = Tuning(
    name="zen5",
    sdpa_cpu=replace(
        PLAIN.sdpa_cpu,
        measured_on=_ZEN5,
        tiles_forward=Rule(log(4096), queries=2.0, keys=-1.0),
        tiles_backward=Rule(20.0, queries=-1.0, causal=log(257) - 20.0),
        **_bf16_rules(Rule(log(256), keys=-1.0), AT_EVERY_CALL),
    ),
    split_kv=replace(
        PLAIN.split_kv,
        measured_on=_ZEN5,
        decode_beside_sdpa=Rule(
            log(1 << 20) + 0.6 * log(255), keys=-1.6, batch=-1.0, heads=-1.0, heads_per_key=1.0, head_dim=-1.0
        ),
        decode_beside_sdpa_16bit=AT_EVERY_CALL,
        decode_beside_sdpa_16bit_masked=AT_EVERY_CALL,
        short_beside_sdpa=AT_EVERY_CALL,
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
        short_beside_sdpa=AT_EVERY_CALL,
        register_bytes=32,
    ),
)

# Measured there with the table of a Zen 5: in bf16 the kernel takes half the time of tiles forward; backward tiles are
# faster, but for causal ones, of the kernel in bf16: in fp32, as it runs now, it was not measured. One query in bf16:
# from 1,024 keys on of 8 heads of 128, but not with 256.
_SAPPHIRE_RAPIDS = "2 cores of an Intel Xeon (Sapphire Rapids), torch 2.13.0"
AMX = replace(
    ZEN5,
    name="amx",
    sdpa_cpu=replace(
        PLAIN.sdpa_cpu,
        measured_on=f"{_SAPPHIRE_RAPIDS}: which calls are for tiles",
        **_bf16_rules(AT_NO_CALL, AT_EVERY_CALL),
    ),
    split_kv=replace(
        ZEN5.split_kv,
        measured_on=f"{_SAPPHIRE_RAPIDS}: which calls it takes",
        decode_beside_sdpa_16bit=_from_elements_of_keys(1 << 20),
        decode_beside_sdpa_16bit_masked=_from_elements_of_keys(1 << 20),
    ),
    tiled=replace(ZEN5.tiled, measured_on=None),
)

ARM = replace(PLAIN, name="arm", split_kv=replace(PLAIN.split_kv, accumulators=16))

TABLES = {table.name: table for table in (AVX2, AVX512, AVX512_BF16, ZEN5, AMX, ARM, PLAIN)}
