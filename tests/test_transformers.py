"""transformers' models with attn_implementation="compiled_fa": eager's logits, gradients and tokens, or a refusal.

Without transformers all of this is skipped: pip install -c constraints.txt ".[transformers]".
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from compiled_fa.testing.budget import budget, error

transformers = pytest.importorskip("transformers", minversion="5")

from compiled_fa.integrations import transformers as integration  # noqa: E402

VOCABULARY, LENGTH, WINDOW = 61, 12, 5
# Weights so large that attention is far from uniform: what is wrong with it is seen.
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ENCODER = {key: DECODER[key] for key in DECODER if key not in ("num_key_value_heads", "head_dim")}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "qwen3": ("Qwen3", DECODER),
    "phi3": ("Phi3", DECODER),
    "mistral": ("Mistral", {**DECODER, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {**DECODER, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3Text",
        {**DECODER, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "falcon": ("Falcon", {**ENCODER, "num_hidden_layers": 1, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("GPT2", GPT2),
    "gpt-oss": (
        "GptOss",
        {
            **DECODER,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "opt": ("OPT", {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", ENCODER),
    "modernbert": (
        "ModernBert",
        {**ENCODER, "local_attention": 6, "layer_types": ["full_attention", "sliding_attention"], "sep_token_id": 2},
    ),
}
PADDING: dict[str, Any] = {
    "none": None,
    "left": (torch.arange(LENGTH) >= torch.tensor([[0], [4], [9]])).long(),
    "right": (torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [9]])).long(),
}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    integration.register()
    transformers.AttentionInterface.register("exact", exact_attention)
    transformers.AttentionMaskInterface.register("exact", exact_mask)


def model_of(kind: tuple[str, dict[str, Any]], auto: str = "AutoModelForCausalLM") -> Any:
    name, options = kind
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    if name == "GptOss":
        model.set_experts_implementation("eager")  # the other one multiplies no float64
    return model


def tokens(batch: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def results(model: Any, kept: torch.Tensor | None, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits or hidden states where kept, and their gradients with respect to every weight."""
    out = model(**inputs)[0]
    if kept is not None:
        out = out[kept.bool()]
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((out * towards.to(out)).sum(), list(weights.values()), allow_unused=True)
    found = {"out": out, **dict(zip(weights, gradients, strict=True))}
    return {name: result.detach() for name, result in found.items() if result is not None}


def exact_attention(
    module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, position_bias=None, **kwargs
):
    """Attention written down, in the inputs' dtype: eager's softmax is in fp32 whatever they are."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if not softcap else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if attention_mask is not None and attention_mask.is_floating_point():
        scores = scores + attention_mask
    elif attention_mask is not None:  # as a tower of images has none
        scores = scores.masked_fill(~attention_mask, -torch.inf)
        scores = scores.masked_fill(~attention_mask.any(-1, keepdim=True), 0.0)  # queries of padding: anything finite
    if s_aux is not None:
        sinks = s_aux[:, None, None].expand(*scores.shape[:-1], 1)
        return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2), None
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def exact_mask(**arguments):
    return transformers.masking_utils.sdpa_mask(
        **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check_equals_eager(model: Any, kept: torch.Tensor | None = None, ours: Any = None, **inputs: Any) -> None:
    """Within the error budget: float64 is right, and eager in fp32 sets the scale. ours: other inputs for us."""
    naive = results(model, kept, **inputs)
    model.set_attn_implementation("compiled_fa")
    found = results(model, kept, **(ours or inputs))
    model = model.double()
    model.set_attn_implementation("exact")
    exact = results(model, kept, **{name: _double(x) for name, x in inputs.items()})
    assert found.keys() == exact.keys()
    # Gradients of weights are sums whose terms are as large as the largest, though they cancel, as a key bias's do.
    magnitude = max(float(gradient.abs().max()) for gradient in exact.values())
    for name, result in found.items():
        allowed = budget(naive[name], exact[name], 4 * magnitude)
        assert error(result, exact[name]) <= allowed, (name, error(result, exact[name]), allowed)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_equal_eager(kind, padding):
    mask = PADDING[padding]
    check_equals_eager(model_of(DECODERS[kind]), mask, input_ids=tokens(), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_equal_eager(kind, padding):
    mask = PADDING[padding]
    check_equals_eager(model_of(ENCODERS[kind], "AutoModel"), mask, input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("padding", PADDING)
def test_an_encoder_and_a_decoder_equal_eager(padding):
    """Queries of the decoder are not cut by the mask of the encoder's keys, though their lengths be equal."""
    for length in (LENGTH, 7):
        model = model_of(("Bart", BART), "AutoModelForSeq2SeqLM")
        inputs: dict[str, Any] = {"input_ids": tokens(), "decoder_input_ids": tokens(length=length), "use_cache": False}
        check_equals_eager(model, attention_mask=PADDING[padding], **inputs)


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
IMAGE = {**TOWER, "image_size": 16, "patch_size": 4}


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_image_and_text_towers_equal_eager(name):
    """CLIP reads a text's end token, which is no padding: there our queries give 0."""
    model = model_of((name, {"text_config": {**TEXT, **SPECIAL}, "vision_config": IMAGE}), "AutoModel")
    ids = tokens().clamp(max=VOCABULARY - 2)
    ids[:, 3] = VOCABULARY - 1
    check_equals_eager(model, input_ids=ids, attention_mask=PADDING["right"], pixel_values=torch.randn(3, 3, 16, 16))


def test_whisper_equals_eager_and_writes_the_same():
    options = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    model = model_of(("Whisper", options), "AutoModelForSpeechSeq2Seq")
    sounds = torch.randn(3, 8, 40)
    texts = []
    for implementation in ("eager", "compiled_fa"):
        model.set_attn_implementation(implementation)
        texts.append(model.generate(sounds, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)
    model.set_attn_implementation("eager")
    check_equals_eager(model, input_features=sounds, decoder_input_ids=tokens(), use_cache=False)


@pytest.mark.parametrize("padding", PADDING)
def test_position_bias_equals_eager(padding):
    """T5's, whose gradient is of a table of distances; and the decoder's queries stand among its own keys."""
    model = model_of(("T5", T5), "AutoModelForSeq2SeqLM")
    inputs: dict[str, Any] = {"input_ids": tokens(), "decoder_input_ids": tokens(length=7), "use_cache": False}
    check_equals_eager(model, attention_mask=PADDING[padding], **inputs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_t5_writes_the_same(cache):
    model, ids, texts = model_of(("T5", T5), "AutoModelForSeq2SeqLM"), tokens(), []
    for implementation in ("eager", "compiled_fa"):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        texts.append(model.generate(ids, attention_mask=PADDING["left"], **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_four_dimensions_equal_eager(kind):
    """They say all: causal, too, if that is wanted."""
    seen = torch.rand(3, 1, LENGTH, LENGTH) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    inputs: dict[str, Any] = {"input_ids": tokens(), "use_cache": False}
    for name in ("llama", "mistral", "gpt-oss"):
        ours = {**inputs, "attention_mask": seen if kind == torch.bool else added}
        check_equals_eager(model_of(DECODERS[name]), ours=ours, attention_mask=added, **inputs)


def test_padding_with_holes_equals_eager():
    holes = torch.ones(3, LENGTH, dtype=torch.long)
    holes[1, 5], holes[2, :4], holes[2, 7] = 0, 0, 0
    check_equals_eager(model_of(DECODERS["mistral"]), holes, input_ids=tokens(), attention_mask=holes, use_cache=False)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("queries", [LENGTH, 3])
def test_a_bias_with_padding_and_a_window(padding, sliding_window, queries):
    """Keys of a bias are those that the mask's lengths say: causal, and in a window."""
    module = torch.nn.Module()
    q, k, v = torch.randn(3, 4, queries, 8), *torch.randn(2, 3, 2, LENGTH, 8)
    bias, mask = torch.randn(1, 4, queries, LENGTH), PADDING[padding]
    found, _ = integration.attention(module, q, k, v, mask, position_bias=bias, sliding_window=sliding_window)
    key, position = torch.arange(LENGTH), torch.arange(LENGTH - queries, LENGTH)[:, None]
    seen = (key <= position) & (mask[:, None, None] != 0)
    if sliding_window is not None:
        seen = seen & (key > position - sliding_window)
    expected, _ = exact_attention(module, q, k, v, seen, 8**-0.5, position_bias=bias)
    tokens_only = mask[:, LENGTH - queries :].bool()
    torch.testing.assert_close(found[tokens_only], expected[tokens_only])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_rows_equal_eager(kind, batch):
    if kind == "opt":
        pytest.skip("transformers' OPT does not hand position_ids to attention")
    if kind == "gpt-oss":
        pytest.skip("transformers' GPT-OSS does not hand position_ids to its mask: eager attends across rows")
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)]).expand(batch, -1)
    check_equals_eager(model_of(DECODERS[kind]), input_ids=tokens(batch), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_what_the_flattening_collator_makes_equals_eager(with_lengths):
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths, return_tensors="pt")
    batch = collate([{"input_ids": tokens(1, length)[0].tolist()} for length in (5, 1, 8)])
    batch.pop("labels")
    eager = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    assert ("cu_seq_lens_q" in batch) == with_lengths
    check_equals_eager(model_of(DECODERS["mistral"]), ours={**batch, "use_cache": False}, **eager)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_generate_gives_eagers_tokens(kind, padding, cache):
    if kind == "opt" and cache == "static":
        pytest.skip("transformers' OPT takes no static cache")
    model, ids = model_of(DECODERS[kind]), tokens()
    texts = []
    for implementation in ("eager", "compiled_fa"):
        model.set_attn_implementation(implementation)
        texts.append(
            model.generate(
                ids, attention_mask=PADDING[padding], max_new_tokens=8, do_sample=False, cache_implementation=cache
            )
        )
    assert texts[0].shape == (3, LENGTH + 8)
    assert torch.equal(*texts)


def test_a_static_cache_needs_no_mask():
    """Keys that it does not have yet are not seen; a prompt in two parts."""
    model, ids = model_of(DECODERS["llama"]), tokens()
    logits = []
    for implementation in ("eager", "compiled_fa"):
        model.set_attn_implementation(implementation)
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        parts = [model(part, cache=cache).logits for part in ids.split(8, dim=1)]
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[1], logits[0])


def test_half_precision_and_inference_mode():
    model = model_of(DECODERS["llama"]).to(torch.bfloat16)
    ids, mask = tokens(), PADDING["left"]
    kept = mask.bool()
    with torch.inference_mode():
        reference = copy.deepcopy(model).double()
        reference.set_attn_implementation("exact")
        exact = reference(ids, attention_mask=mask).logits[kept]
        naive = model(ids, attention_mask=mask).logits[kept]
        model.set_attn_implementation("compiled_fa")
        found = model(ids, attention_mask=mask).logits[kept]
    assert error(found, exact) <= budget(naive, exact, float(exact.abs().max()))


def test_dropout_is_applied_and_seeded():
    model = model_of(("Llama", {**DECODER, "attention_dropout": 0.5})).train()
    model.set_attn_implementation("compiled_fa")
    ids = tokens()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(ids, use_cache=False).logits)
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


@pytest.mark.parametrize("padded", [False, True])
def test_llama_is_one_graph_over_lengths(padded):
    model = model_of(DECODERS["llama"])
    model.set_attn_implementation("compiled_fa")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    frames = []
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((3, 12), (2, 20), (4, 33)):
        ids = tokens(batch, length)
        mask = (torch.arange(length) >= torch.arange(batch)[:, None]).long() if padded else None
        wanted = results(model, mask, input_ids=ids, attention_mask=mask, use_cache=False)
        found = results(compiled, mask, input_ids=ids, attention_mask=mask, use_cache=False)
        torch.testing.assert_close(found["out"], wanted["out"])
        for name, gradient in wanted.items():
            key = name if name == "out" else f"_orig_mod.{name}"
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames == [frames[0]] * 3
    calls = [sum("compiled_fa" in str(node.target) for node in graph.graph.nodes) for graph in counter.graphs]
    assert sorted(calls)[-2:] in ([2], [0, 2])  # transformers leaves an empty graph beside the model's


def test_compiled_code_refuses_what_it_would_get_wrong():
    model = model_of(DECODERS["llama"])
    model.set_attn_implementation("compiled_fa")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])[None]
    with pytest.raises(RuntimeError, match="DataCollatorWithFlattening"):
        compiled(tokens(1), position_ids=positions, use_cache=False)
    holes = torch.ones(3, LENGTH, dtype=torch.long)
    holes[1, 5] = 0
    with pytest.raises(RuntimeError, match="attention_mask has holes"):
        compiled(tokens(), attention_mask=holes, use_cache=False)


def test_what_cannot_be_served_is_refused():
    model = model_of(DECODERS["llama"])
    model.set_attn_implementation("compiled_fa")
    ids, q = tokens(), torch.randn(3, 2, LENGTH, 4)
    holes = torch.ones(3, LENGTH, dtype=torch.long)
    holes[1, 5] = 0
    with pytest.raises(ValueError, match=r'attention_mask has holes.*use attn_implementation="eager"'):
        integration.attention(torch.nn.Module(), q, q, q, holes)
    with pytest.raises(ValueError, match=r"attention_mask: a mask of shape \(3, 1, 12, 12\)"):
        model(ids, attention_mask=torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.int64).tril())
    with pytest.raises(ValueError, match=r"attention_mask: a mask of shape \(3, 12, 12\)"):
        integration.mask(3, LENGTH, LENGTH, attention_mask=torch.ones(3, LENGTH, LENGTH))
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("argument", ["position_bias", "block_table"])
def test_arguments_that_are_refused(argument):
    sums = torch.tensor([0, 1, 3])
    refused: dict[str, Any] = {argument: torch.ones(1), "cu_seq_lens_q": sums, "cu_seq_lens_k": sums}
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        integration.attention(torch.nn.Module(), q, q, q, None, **refused)


@pytest.mark.parametrize("given", ["cu_seq_lens_q", "cu_seq_lens_k"])
def test_lengths_of_one_side_only_are_refused(given):
    lengths: dict[str, Any] = {given: torch.tensor([0, 1, 3])}
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k are wanted together"):
        integration.attention(torch.nn.Module(), q, q, q, None, **lengths)


@pytest.mark.parametrize("how", ["or_mask_function", "and_mask_function", "block_sequence_ids", "chunks"])
def test_masks_of_another_kind_are_transformers_own(how):
    from transformers import masking_utils

    config = transformers.LlamaConfig(**DECODER)
    config.attention_chunk_size = 4 if how == "chunks" else None
    make = masking_utils.create_chunked_causal_mask if how == "chunks" else masking_utils.create_causal_mask
    extra: dict[str, Any] = {}
    if how == "block_sequence_ids":
        extra[how] = torch.arange(3 * LENGTH).view(3, LENGTH) // 5
    elif how != "chunks":
        extra[how] = lambda batch, head, q, k: q % 3 != k % 4
    found = []
    for config._attn_implementation in ("compiled_fa", "exact"):
        given = {"inputs_embeds": torch.empty(3, LENGTH, 0), "attention_mask": PADDING["left"], "cache": None}
        found.append(make(config=config, **given, **extra))
    assert found[0].shape == (3, 1, LENGTH, LENGTH)
    assert torch.equal(*found)


def test_compiled_code_refuses_blocks():
    from transformers import masking_utils

    config = transformers.LlamaConfig(**DECODER)
    config._attn_implementation = "compiled_fa"

    def make(x, blocks):
        masking_utils.create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=None, cache=None, block_sequence_ids=blocks
        )
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(make, backend="aot_eager", fullgraph=True)
    blocks, x = torch.full((3, LENGTH), -1), torch.zeros(3, LENGTH, 1)
    assert torch.equal(compiled(x, blocks), x + 1)  # each token is a block of its own
    blocks[1, 4:6] = 0
    with pytest.raises(RuntimeError, match="a query sees the key after its own"):
        compiled(x, blocks)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padding_mask_itself(padding):
    """What a model of somebody's own hands to attention; queries of padding give 0. A shorter mask hides later keys."""
    kept = PADDING[padding].clone()
    kept[1] = 0  # a row without a token
    q, k, v = torch.randn(3, 3, 2, LENGTH, 8).unbind(0)
    module = torch.nn.Module()
    whole, _ = integration.attention(module, q, k, v, kept)
    assert whole.shape == (3, LENGTH, 2, 8)
    assert not whole[~kept.bool()].any()
    seen = kept.bool()[:, None, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    torch.testing.assert_close(whole[kept.bool()], wanted[kept.bool()])
    junk = torch.full((3, 2, 4, 8), 1e4)
    later, _ = integration.attention(module, q, torch.cat([k, junk], 2), torch.cat([v, junk], 2), kept)
    torch.testing.assert_close(later, whole)


def test_registering_wants_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="wants transformers 5"):
        integration.register()
