"""flash_attn's layers and model: against torch.nn and plain functions, their state dicts, and decoding from a cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiled_fa import flash_attn_func, rotary
from compiled_fa.losses import CrossEntropyLoss, cross_entropy_loss
from compiled_fa.modules import activations, block, dense, gpt, mha, mlp, norms
from compiled_fa.modules.embedding import GPT2Embeddings
from compiled_fa.testing.naive import naive_attention

E, H = 32, 4


def close(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)


def same_gradients(found, wanted, leaves):
    dout = torch.randn_like(found)
    close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found, leaves, dout), torch.autograd.grad(wanted, leaves, dout), strict=True
    ):
        close(one, other, 1e-4)


# Norms, activations, products, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_of_a_sum(dtype, rms, zero_centered):
    x, other, residual = torch.randn(3, 5, 7, 16, dtype=dtype).unbind(0)
    (w, b, w1, b1), rows = torch.randn(4, 16).unbind(0), torch.rand(5, 7)

    def normed(x, weight, bias):
        x, weight = x.double(), weight.double() + (1.0 if zero_centered else 0.0)
        centered = x if rms else x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    options = {"eps": 1e-5, "zero_centered_weight": zero_centered, "is_rms_norm": rms}
    tolerance = 4 * torch.finfo(dtype).eps
    total = x.double() * rows[..., None] + residual.double()
    y, carried = norms.layer_norm_fn(x, w, b, residual=residual, rowscale=rows, prenorm=True, **options)
    assert y.dtype == carried.dtype == dtype
    assert ((carried.double() - total).abs() <= tolerance * total.abs().clamp(min=1)).all()
    wanted = normed(total, w, b)
    assert ((y.double() - wanted).abs() <= tolerance * wanted.abs().clamp(min=4)).all()
    y, y1 = norms.layer_norm_fn(x, w, b, x1=other, weight1=w1, bias1=b1, out_dtype=torch.float64, **options)
    for found, of in (
        (y, normed(x.double() + other.double(), w, b)),
        (y1, normed(x.double() + other.double(), w1, b1)),
    ):
        close(found, of, 1e-5)
    assert norms.layer_norm_fn(x, w, b, prenorm=True, residual_in_fp32=True, **options)[1].dtype == torch.float32


def test_norms_gradients_are_those_of_torch_nn():
    x, residual = (torch.randn(6, 16, requires_grad=True) for _ in range(2))
    norm = nn.LayerNorm(16)
    leaves = [x, residual, norm.weight, norm.bias]
    found = norms.layer_norm_fn(x, norm.weight, norm.bias, residual=residual, eps=norm.eps)
    same_gradients(found, norm(x + residual), leaves)
    same_gradients(norms.layer_norm(x, norm.weight, norm.bias, 1e-5), norm(x), [x, norm.weight, norm.bias])
    rms = norms.RMSNorm(16)
    same_gradients(rms(x), F.rms_norm(x, (16,), rms.weight, rms.eps), [x, rms.weight])
    same_gradients(norms.rms_norm(x, rms.weight, 1e-6), F.rms_norm(x, (16,), rms.weight, 1e-6), [x])
    assert torch.equal(norms.rms_norm_fn(x, rms.weight, None, eps=1e-5), rms(x))
    assert list(rms.state_dict()) == ["weight"]


@pytest.mark.parametrize("rms", [False, True])
def test_dropout_add_norm(rms):
    function = norms.dropout_add_rms_norm if rms else norms.dropout_add_layer_norm
    x, residual = torch.randn(2, 40, 16).unbind(0)
    weight, bias, layer, rows = torch.randn(16), torch.randn(16), torch.rand(16), torch.rand(40)
    y, total, mask = function(x, residual, weight, bias, 0.3, 1e-5, rows, layer, prenorm=True, return_dropout_mask=True)
    assert mask.dtype == torch.uint8
    assert 0.6 < mask.float().mean() < 0.8
    close(total, residual + x * mask / 0.7 * rows[:, None] * layer)
    normed = F.rms_norm(total, (16,), weight, 1e-5) + bias if rms else F.layer_norm(total, (16,), weight, bias, 1e-5)
    close(y, normed)
    layers = {True: norms.DropoutAddRMSNorm, False: norms.DropoutAddLayerNorm}[rms](16, prenorm=True, p=0.3)
    assert list(layers.state_dict()) == (["weight"] if rms else ["weight", "bias"])
    y, total = layers.eval()(x, residual)
    assert torch.equal(total, x + residual)
    close(y, F.rms_norm(total, (16,), None, 1e-5) if rms else F.layer_norm(total, (16,), None, None, 1e-5))
    assert not torch.equal(layers.train()(x, residual)[1], total)
    assert layers(x.bfloat16())[1].dtype == torch.bfloat16


def test_dropout_before_a_norm_is_drawn_for_each_branch():
    x = torch.ones(50, 16)
    weight = torch.ones(16)
    _, total, mask, mask1 = norms.rms_norm_fn(
        x, weight, None, x1=x, dropout_p=0.5, prenorm=True, return_dropout_mask=True
    )
    assert not torch.equal(mask, mask1)
    assert torch.equal(total, 2.0 * mask + 2.0 * mask1)
    assert norms.layer_norm_fn(x, weight, None, return_dropout_mask=True)[1:] == (None, None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"out": torch.ones(2)}, "out must be None"),
        ({"residual_out": torch.ones(2)}, "residual_out must be None"),
        ({"residual": torch.ones(2, 3)}, r"residual must be of x's shape, \(2, 4\), got \(2, 3\)"),
        ({"x1": torch.ones(2, 4), "rowscale": torch.ones(2)}, "rowscale must be None with x1"),
        ({"rowscale": torch.ones(3)}, r"rowscale must be of one element a row, \(2,\), got \(3,\)"),
        ({"dropout_p": 1.5}, "dropout_p must be at least 0 and below 1"),
    ],
)
def test_norms_refuse_what_they_do_not_do(changed, words):
    with pytest.raises(ValueError, match=words):
        norms.layer_norm_fn(torch.ones(2, 4), torch.ones(4), None, **changed)


def test_activations():
    x, y = torch.randn(2, 5, 16, requires_grad=True).unbind(0)
    same_gradients(activations.swiglu(x, y), F.silu(x) * y, [x, y])
    assert torch.equal(activations.gelu_fwd(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(activations.bias_gelu(x, y[0]), F.gelu(x + y[0], approximate="tanh"))
    assert torch.equal(activations.sqrelu_fwd(x), F.relu(x) ** 2)
    wide = F.silu(x.double()) * y.double()
    half = activations.swiglu(x.bfloat16().double().bfloat16(), y.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.double(), wide, 0.1)


@pytest.mark.parametrize("activation", dense.ACTIVATIONS)
def test_products(activation):
    x = torch.randn(3, E, requires_grad=True)
    one, other = nn.Linear(E, 24), nn.Linear(24, E)
    linear = dense.FusedDense(E, 24, return_residual=True)
    linear.load_state_dict(one.state_dict())
    found, same = linear(x)
    assert same is x
    assert torch.equal(found, one(x))
    assert torch.equal(dense.fused_dense_func(x, one.weight, one.bias), one(x))
    layer = dense.FusedMLP(E, 24, activation=activation)
    layer.load_state_dict({f"fc{n}.{k}": v for n, m in ((1, one), (2, other)) for k, v in m.state_dict().items()})
    wanted = {
        "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "sqrelu": lambda x: F.relu(x) ** 2,
    }
    assert torch.equal(layer(x), other(wanted[activation](one(x))))
    assert layer.fc2.out_features == E


def test_products_refuse_groups_and_unknown_activations():
    with pytest.raises(ValueError, match="process_group must be None: tensor parallelism"):
        dense.fused_dense_func(torch.ones(2, 3), torch.ones(4, 3), process_group="group")
    with pytest.raises(ValueError, match=r"activation must be one of .*got 'tanh'"):
        dense.FusedMLP(4, activation="tanh")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_cross_entropy(smoothing, scale):
    logits, labels = torch.randn(9, 11, requires_grad=True), torch.randint(11, (9,))
    labels[2] = -100
    options: dict[str, Any] = {"label_smoothing": smoothing}

    def plain():
        return F.cross_entropy(logits * scale, labels, reduction="none", **options)

    found, z = cross_entropy_loss(logits, labels, logit_scale=scale, **options)
    same_gradients(found, plain(), [logits])
    assert (z == 0).all()
    penalty = 0.3 * torch.logsumexp(logits * scale, -1) ** 2 * (labels != -100)
    found, z = cross_entropy_loss(logits, labels, logit_scale=scale, lse_square_scale=0.3, **options)
    same_gradients(found, plain() + penalty, [logits])
    penalty = penalty.detach()
    close(z, penalty)
    assert not z.requires_grad
    for reduction in ("mean", "sum", "none"):
        loss = CrossEntropyLoss(reduction=reduction, logit_scale=scale, label_smoothing=smoothing)
        close(loss(logits, labels), F.cross_entropy(logits * scale, labels, reduction=reduction, **options))
    loss, z = CrossEntropyLoss(lse_square_scale=0.3, return_z_loss=True, logit_scale=scale)(logits, labels)
    close(z, penalty.sum() / 8)


def test_cross_entropy_of_half_precision_is_that_of_its_values():
    logits, labels = (4 * torch.randn(5, 100)).bfloat16(), torch.randint(100, (5,))
    found = cross_entropy_loss(logits, labels, precomputed_lse=torch.zeros(5))[0]
    assert found.dtype == torch.float32
    close(found, F.cross_entropy(logits.float(), labels, reduction="none"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CrossEntropyLoss(reduction="max"), "reduction must be one of"),
        (lambda: CrossEntropyLoss(process_group=1), "process_group must be None"),
        (lambda: cross_entropy_loss(torch.ones(2, 3), torch.ones(3)), "labels must be of one element a row"),
        (
            lambda: cross_entropy_loss(torch.ones(2, 3), torch.ones(2), logit_scale=0.0),
            "logit_scale must be",
        ),
    ],
)
def test_loss_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_everything_is_one_graph():
    x, weight = torch.randn(4, 16), torch.ones(16)

    def both(x):
        y, residual = norms.layer_norm_fn(x, weight, weight, residual=x, prenorm=True)
        return cross_entropy_loss(activations.swiglu(y, residual), torch.zeros(4, dtype=torch.int64))[0]

    close(torch.compile(both, backend="eager", fullgraph=True)(x), both(x))


# Attention


def slopes_of(nheads):
    return torch.tensor(mha.get_alibi_slopes(nheads))


def test_alibi_slopes():
    assert mha.get_alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert mha.get_alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_modules_are_the_functions(kind):
    q, k, v = torch.randn(3, 2, 7, H, 8).unbind(0)
    slopes = slopes_of(H)
    cls: Any = mha.FlashSelfAttention if kind == "self" else mha.FlashCrossAttention
    layer = cls(causal=True, softmax_scale=0.3, window_size=(4, 0), alibi_slopes=slopes, attention_dropout=0.5).eval()
    given = (torch.stack([q, k, v], 2),) if kind == "self" else (q, torch.stack([k, v], 2))
    wanted = flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, window_size=(4, 0), alibi_slopes=slopes)
    close(layer(*given), wanted)
    sums = torch.tensor([0, 7, 14], dtype=torch.int32)
    lengths = {"cu_seqlens": sums, "max_seqlen": 7}
    if kind == "cross":
        lengths |= {"cu_seqlens_k": sums, "max_seqlen_k": 7}
    close(layer(*(x.flatten(0, 1) for x in given), **lengths), wanted.flatten(0, 1))
    open_window = cls(softmax_scale=0.3)
    close(open_window(*given, causal=True), flash_attn_func(q, k, v, softmax_scale=0.3, causal=True))
    assert not torch.equal(layer.train()(*given), layer(*given))
    assert not layer.state_dict()
    with pytest.raises(ValueError, match=r"max_seqlen must be given with cu_seqlens"):
        layer(*given, cu_seqlens=sums)


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_keys(causal):
    q, k, v = torch.randn(3, 2, 6, 2, 8).unbind(0)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    layer = mha.SelfAttention(causal=causal)
    out = layer(torch.stack([q, k, v], 2), key_padding_mask=mask)
    close(out[:1], naive_attention(q[:1], k[:1], v[:1], causal=causal)[0])
    close(out[1:, :4], naive_attention(q[1:, :4], k[1:, :4], v[1:, :4], causal=causal)[0])
    close(layer(torch.stack([q, k, v], 2)), naive_attention(q, k, v, causal=causal)[0])
    kv = torch.stack([k, v], 2)
    few = mha.CrossAttention(causal=causal)(q[:, :3].repeat_interleave(2, 2), kv, key_padding_mask=mask)
    close(few[1:], naive_attention(q[1:, :3].repeat_interleave(2, 2), k[1:, :4], v[1:, :4], causal=causal)[0])


def by_hand(layer, x, x_kv=None):
    """MHA's forward, from its weights."""
    kv_heads = layer.num_heads_kv
    if layer.cross_attn:
        q, kv = layer.Wq(x), layer.Wkv(x if x_kv is None else x_kv)
    else:
        q, kv = layer.Wqkv(x).split([E, 2 * 8 * kv_heads], -1)
    q = q.view(*q.shape[:2], H, 8)
    k, v = kv.view(*kv.shape[:2], 2, kv_heads, 8).unbind(2)
    if layer.rotary_emb_dim:
        angles = torch.outer(torch.arange(x.shape[1]), layer.rotary_emb.inv_freq)
        q, k = (rotary.apply_rotary_emb(y, angles.cos(), angles.sin(), layer.rotary_emb.interleaved) for y in (q, k))
    inner = layer.inner_cross_attn
    out, _ = naive_attention(q, k, v, inner.softmax_scale, inner.causal, inner.window_size, 0.0, inner.alibi_slopes)
    return layer.out_proj(out.flatten(2))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softmax_scale": 0.2},
    "GQA": {"num_heads_kv": 2, "causal": True},
    "rotary": {"rotary_emb_dim": 6, "causal": True},
    "interleaved": {"rotary_emb_dim": 8, "num_heads_kv": 1, "rotary_emb_interleaved": True},
    "ALiBi": {"use_alibi": True, "causal": True, "use_flash_attn": True},
    "window": {"window_size": (2, 1), "use_flash_attn": True, "num_heads_kv": 2},
    "cross": {"cross_attn": True, "num_heads_kv": 2},
    "checkpointing": {"checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_mha(kind):
    options = KINDS[kind]
    layer = mha.MHA(E, H, **options)
    x = torch.randn(2, 9, E, requires_grad=True)
    x_kv = torch.randn(2, 5, E) if "cross_attn" in options else None
    same_gradients(layer(x, x_kv), by_hand(layer, x, x_kv), [x, *layer.parameters()])
    names = ["Wq", "Wkv", "out_proj"] if "cross_attn" in options else ["Wqkv", "out_proj"]
    assert sorted(layer.state_dict()) == sorted(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


def test_mha_with_packed_sequences_subsets_and_residuals():
    layer = mha.MHA(E, H, use_flash_attn=True, causal=True, return_residual=True)
    x = torch.randn(9, E)
    sums = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, same = layer(x, cu_seqlens=sums, max_seqlen=5)
    assert same is x
    close(out, torch.cat([layer(part[None])[0][0] for part in x.split([4, 5])]))
    cross = mha.MHA(E, H, cross_attn=True)
    x = x[None]
    close(cross(x, mixer_subset=slice(0, 1)), cross(x)[:, :1])
    mask = torch.arange(9)[None] < 6
    close(cross(x[:, :6], x, key_padding_mask=mask), cross(x[:, :6], x[:, :6]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dwconv": True}, "dwconv must be False: a convolution"),
        ({"num_heads": 5}, "num_heads must be a divisor of embed_dim, 32, got 5"),
        ({"num_heads_kv": 3}, "num_heads_kv must be a divisor of num_heads, 4, got 3"),
        ({"use_alibi": True}, "use_flash_attn must be True with use_alibi or window_size"),
        ({"cross_attn": True, "rotary_emb_dim": 4}, "rotary_emb_dim must be 0 with cross_attn"),
    ],
)
def test_mha_refuses_when_it_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        mha.MHA(**({"embed_dim": E, "num_heads": H} | options))


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        ({}, {"cu_seqlens": torch.zeros(2)}, "cu_seqlens must be None without use_flash_attn"),
        ({"use_flash_attn": True}, {"key_padding_mask": torch.ones(2, 3)}, "key_padding_mask must be None with"),
        ({}, {"x_kv": torch.ones(2, 3, E)}, "x_kv must be None without cross_attn"),
        ({}, {"inference_params": SimpleNamespace(seqlen_offset=0)}, "layer_idx must be given to a layer that decodes"),
    ],
)
def test_mha_refuses_when_it_is_called(options, given, words):
    with pytest.raises(ValueError, match=words):
        mha.MHA(E, H, **options)(torch.randn(2, 3, E), **given)


def params(batch, longest, lengths=None):
    return SimpleNamespace(
        max_seqlen=longest,
        max_batch_size=batch,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=lengths,
    )


DECODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": {"use_flash_attn": True},
    "GQA, rotary": {"use_flash_attn": True, "num_heads_kv": 2, "rotary_emb_dim": 8},
    "rotary of a part": {"rotary_emb_dim": 4, "rotary_emb_interleaved": True},
    "xPos": {"use_flash_attn": True, "rotary_emb_dim": 8, "rotary_emb_scale_base": 512.0},
    "ALiBi, window": {"use_flash_attn": True, "use_alibi": True, "window_size": (3, 0)},
}


@pytest.mark.parametrize("kind", DECODES)
def test_mha_decodes_what_it_gives_for_the_whole(kind):
    layer = mha.MHA(E, H, causal=True, layer_idx=3, **DECODES[kind]).eval()
    x = torch.randn(2, 8, E)
    state = params(2, 8)
    if kind == "flash":
        state.key_value_memory_dict[3] = layer.allocate_inference_cache(2, 8)
    found = []
    for part in x.split([5, 1, 2], 1):
        found.append(layer(part, inference_params=state))
        state.seqlen_offset += part.shape[1]
    with torch.no_grad():
        wanted = layer(x)
        if kind == "xPos":  # whose factors depend on the length of the tables
            layer.rotary_emb._update_cos_sin_cache(8, x.device, x.dtype)
            wanted = layer(x)
    close(torch.cat(found, 1), wanted)
    with pytest.raises(ValueError, match=r"must be .*, got"):
        layer(x[:, :1], inference_params=state)


def test_mha_decodes_sequences_of_their_own_lengths():
    layer = mha.MHA(E, H, causal=True, layer_idx=0, use_flash_attn=True, rotary_emb_dim=8).eval()
    x, lengths = torch.randn(2, 6, E), torch.tensor([5, 3], dtype=torch.int32)
    state = params(2, 6)
    layer(x[:, :5], inference_params=state)
    state.lengths_per_sample, state.seqlen_offset = lengths, 5
    last = torch.stack([x[0, 5], x[1, 3]])[:, None]
    found = layer(last, inference_params=state)
    with torch.no_grad():
        close(found[:1], layer(x[:1])[:, -1:])
        close(found[1:], layer(x[1:, :4])[:, -1:])


# MLPs, blocks, models


def test_mlps():
    x = torch.randn(3, E)
    plain = mlp.Mlp(E, out_features=8, return_residual=True)
    y, same = plain(x)
    assert same is x
    assert torch.equal(y, plain.fc2(F.gelu(plain.fc1(x))))
    assert (plain.fc1.out_features, plain.fc2.out_features) == (4 * E, 8)
    for activation in (F.sigmoid, F.silu, F.gelu):
        gated = mlp.GatedMlp(E, activation=activation, multiple_of=16)
        y, gate = gated.fc1(x).chunk(2, -1)
        assert y.shape[-1] == 96
        close(gated(x), gated.fc2(y * activation(gate)))


@pytest.mark.parametrize("prenorm", [True, False])
def test_block(prenorm):
    layer = block.Block(64, prenorm=prenorm)
    x, residual = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    if prenorm:
        found, carried = layer(x, residual)
        first = x + residual
        second = first + layer.mixer(layer.norm1(first))
        close(carried, second)
        close(found, layer.mlp(layer.norm2(second)))
        assert torch.equal(layer(x)[1], layer(x, torch.zeros_like(x))[1])
        fp32 = block.Block(64, residual_in_fp32=True, mlp_cls=lambda dim: nn.Identity()).bfloat16()
        assert [y.dtype for y in fp32(x.bfloat16())] == [torch.bfloat16, torch.float32]
    else:
        first = layer.norm1(x + layer.mixer(x))
        close(layer(x), layer.norm2(first + layer.mlp(first)))
        with pytest.raises(ValueError, match="residual must be None without prenorm"):
            layer(x, residual)
    assert {name.split(".")[0] for name in layer.state_dict()} == {"mixer", "norm1", "mlp", "norm2"}


def test_stochastic_depth_drops_samples():
    layer = block.StochasticDepth(0.5)
    x = torch.ones(200, 3)
    dropped = layer(x)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1]).all()
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="residual_in_fp32 must be False without prenorm"):
        block.Block(64, prenorm=False, residual_in_fp32=True)
    with pytest.raises(ValueError, match="sequence_parallel must be False"):
        block.Block(64, sequence_parallel=True)


def config(**changed):
    settings: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": E,
        "num_attention_heads": H,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
        "activation_function": "gelu_new",
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "initializer_range": 0.1,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    return SimpleNamespace(**(settings | changed))


MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "rotary, RMS norm, SwiGLU, GQA": {
        "max_position_embeddings": 0,
        "rotary_emb_fraction": 1.0,
        "rms_norm": True,
        "activation_function": "swiglu",
        "mlp_multiple_of": 16,
        "n_head_kv": 2,
        "use_flash_attn": True,
        "tie_word_embeddings": False,
    },
    "postnorm, projected, padded vocabulary": {
        "prenorm": False,
        "word_embed_proj_dim": 24,
        "pad_vocab_size_multiple": 8,
        "activation_function": "relu",
        "scale_attn_by_inverse_layer_idx": True,
        "lm_head_bias": True,
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_gpt_decodes_what_it_gives_for_the_whole(kind):
    model = gpt.GPTLMHeadModel(config(**MODELS[kind])).eval()
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape == (2, 9, 56 if "pad_vocab_size_multiple" in MODELS[kind] else 50)
        close(model(ids, num_last_tokens=2).logits, logits[:, -2:])
        state, found = params(2, 9), []
        state.key_value_memory_dict = model.allocate_inference_cache(2, 9)
        for part in ids.split([6, 1, 2], 1):
            at = torch.arange(state.seqlen_offset, state.seqlen_offset + part.shape[1])
            found.append(model(part, position_ids=at, inference_params=state).logits)
            state.seqlen_offset += part.shape[1]
    close(torch.cat(found, 1), logits, 1e-4)
    later = ids.clone()
    later[:, 5:] = 0
    close(model(later).logits[:, :5], logits[:, :5])


def gpt2_by_hand(model, ids):
    """GPT-2 (LN before attention and MLP, dropout off), from the weights of a model that keeps residuals apart."""
    model = model.transformer
    x = model.embeddings(ids)
    for layer in model.layers:
        x = x + by_hand(layer.mixer, layer.norm1(x))
        x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(x)), approximate="tanh"))
    return model.ln_f(x) @ model.embeddings.word_embeddings.weight.T


def test_gpt2_is_gpt2_and_learns():
    model = gpt.GPTLMHeadModel(config())
    ids = torch.randint(50, (2, 9))
    same_gradients(model(ids).logits, gpt2_by_hand(model, ids), list(model.parameters()))
    optimizer, loss = torch.optim.Adam(model.parameters(), 0.01), CrossEntropyLoss()
    losses = []
    for _ in range(10):
        found = loss(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    assert losses[-1] < 0.5 * losses[0]
    names = {f"transformer.layers.1.{name}" for name in ("mixer.Wqkv.weight", "norm2.bias", "mlp.fc1.weight")}
    names |= {"transformer.embeddings.word_embeddings.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert names <= set(model.state_dict())


@pytest.mark.parametrize("setting", gpt.NOT_SERVED)
def test_gpt_refuses_settings_that_it_does_not_serve(setting):
    with pytest.raises(ValueError, match=rf"config.{setting} must be .*: it is not served"):
        gpt.GPTModel(config(**{setting: 2.0}))


def test_gpt_refuses_groups_and_unknown_activations():
    with pytest.raises(ValueError, match="process_group must be None"):
        gpt.GPTModel(config(), process_group=1)
    with pytest.raises(ValueError, match=r"activation_function must be one of .*got 'tanh'"):
        gpt.GPTModel(config(activation_function="tanh"))


def test_embeddings():
    layer: Any = GPT2Embeddings(E, 20, 10, word_embed_proj_dim=8)
    ids = torch.randint(20, (2, 5))
    wanted = layer.project_in(layer.word_embeddings(ids)) + layer.position_embeddings.weight[:5]
    close(layer(ids), wanted)
    assert "position_embeddings.weight" not in GPT2Embeddings(E, 20, 0).state_dict()
