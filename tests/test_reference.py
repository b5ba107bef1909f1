"""The reference page against an independent implementation: the text-only class that ships with Transformers."""

import pytest
import torch
from reference import dequantize, reference_hidden, reference_logits, reference_weights, split_qkv
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM


# Every pair that could be swapped by mistake differs: q/v head dims, thetas, GA/SWA kv heads, layer kinds.
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "hybrid_layer_pattern": [0, 1, 1, 0],
    "moe_layer_freq": [0, 1, 1, 1],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "v_head_dim": 16,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
    "partial_rotary_factor": 0.334,  # 24 * 0.334 -> 8 dims
    "rope_theta": 50000,
    "swa_rope_theta": 100,
    "sliding_window": 5,
    "attention_value_scale": 0.612,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "layernorm_epsilon": 1e-3,
    "tie_word_embeddings": False,
}


def transformers_model(config, seed=0):
    renamed = ("hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "rope_theta", "swa_rope_theta")
    own = MiMoV2FlashConfig(
        **{key: value for key, value in config.items() if key not in renamed and not key.startswith(("swa_", "add_"))},
        rms_norm_eps=config["layernorm_epsilon"],
        layer_types=["sliding_attention" if swa else "full_attention" for swa in config["hybrid_layer_pattern"]],
        mlp_layer_types=["sparse" if moe else "dense" for moe in config["moe_layer_freq"]],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": config[key], "partial_rotary_factor": 0.334}
            for kind, key in (("full_attention", "rope_theta"), ("sliding_attention", "swa_rope_theta"))
        },
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = MiMoV2FlashForCausalLM(own).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith("sinks"):
                tensor.copy_(noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.3 * noise)  # sigmoid scores differ by about as much: it decides some choices
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def released(model):
    """Transformers' names -> the split names of a released checkpoint."""
    out = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            out[name.replace("self_attn.sinks", "self_attn.attention_sink_bias")] = tensor
    return {name: tensor.clone() for name, tensor in out.items()}


def fuse(weights, config, chunked=True):
    """q/k/v -> qkv_proj by an explicit walk over heads."""
    out = dict(weights)
    for n, swa in enumerate(config["hybrid_layer_pattern"]):
        prefix = f"model.layers.{n}.self_attn."
        kv_heads = config["swa_num_key_value_heads" if swa else "num_key_value_heads"]
        q = out.pop(prefix + "q_proj.weight").view(config["num_attention_heads"], config["head_dim"], -1)
        k = out.pop(prefix + "k_proj.weight").view(kv_heads, config["head_dim"], -1)
        v = out.pop(prefix + "v_proj.weight").view(kv_heads, config["v_head_dim"], -1)
        chunks = config["num_key_value_heads"] if chunked else 1
        rows = []
        for c in range(chunks):
            for part in (q, k, v):
                per = len(part) // chunks
                rows += list(part[c * per : (c + 1) * per])
        out[prefix + "qkv_proj.weight"] = torch.cat(rows)
    return out


def quantize(weight, chunks=1):
    """Random block scales, so that a wrong block shows; the fp8 payload is whatever the weight rounds to."""
    rows, cols = weight.shape[0] // chunks, weight.shape[1]
    scale = 0.5 + torch.rand(chunks * -(-rows // 128), -(-cols // 128), generator=torch.Generator().manual_seed(3))
    return weight.to(torch.float8_e4m3fn), scale


def tokens(batch=2, length=13):
    return torch.randint(0, CONFIG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights():
    return released(transformers_model(CONFIG))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 6},
        {"attention_value_scale": None},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 2, "topk_group": 1},
        {"tie_word_embeddings": True},
        {"hybrid_layer_pattern": [1, 0, 1, 1], "moe_layer_freq": [1, 0, 1, 0]},
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_transformers(changes):
    config = CONFIG | changes
    model = transformers_model(config)
    expected = model(tokens()).logits
    assert expected.std() > 0.5  # large enough for 1e-5 to mean something
    logits = reference_logits(released(model), config, tokens())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding(weights):
    ids, mask = tokens(), torch.ones(2, 13, dtype=torch.long)
    mask[0, :6] = 0  # longer than the window of 5: the first rows have nothing to attend
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = reference_logits(weights, CONFIG, ids, mask)
    assert logits.isfinite().all()
    expected = transformers_model(CONFIG)(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    alone = reference_logits(weights, CONFIG, ids[:1, 6:])
    torch.testing.assert_close(logits[0, 6:], alone[0], atol=1e-5, rtol=1e-5)
    given = reference_logits(weights, CONFIG, ids, mask, position_ids=positions)
    torch.testing.assert_close(given, logits, atol=0, rtol=0)
    empty = reference_logits(weights, CONFIG, ids, torch.zeros_like(mask))
    assert empty.isfinite().all()


@torch.no_grad()
def test_double_precision_hidden_and_embeds(weights):
    logits = reference_logits(weights, CONFIG, tokens())
    double = reference_logits(weights, CONFIG, tokens(), dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(logits.double(), double, atol=2e-5, rtol=1e-5)
    embeds = weights["model.embed_tokens.weight"][tokens()]
    torch.testing.assert_close(reference_logits(weights, CONFIG, inputs_embeds=embeds), logits, atol=0, rtol=0)
    hidden = reference_hidden(weights, CONFIG, tokens())
    normed = torch.nn.functional.rms_norm(hidden, (32,), weights["model.norm.weight"], CONFIG["layernorm_epsilon"])
    torch.testing.assert_close(normed @ weights["lm_head.weight"].T, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_swa_attention_sink_bias": False},
        {"sliding_window": 6},
        {"sliding_window": 4},
        {"attention_value_scale": 0.707},
        {"rope_theta": 60000},
        {"swa_rope_theta": 50000},
        {"partial_rotary_factor": 0.5},
        {"layernorm_epsilon": 1e-2},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 1.1},
        {"num_experts_per_tok": 3},
        {"n_group": 4},
        {"moe_router_dtype": "bfloat16"},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_option_changes_the_logits(weights, changes):
    before, after = (reference_logits(weights, config, tokens()) for config in (CONFIG, CONFIG | changes))
    assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["attention_sink_bias", "e_score_correction_bias"])
@torch.no_grad()
def test_every_bias_changes_the_logits(weights, name):
    changed = {key: torch.zeros_like(value) if key.endswith(name) else value for key, value in weights.items()}
    before, after = (reference_logits(w, CONFIG, tokens()) for w in (weights, changed))
    assert (before - after).abs().max() > 1e-3


@torch.no_grad()
def test_window_argument_and_full_sink(weights):
    wide = reference_logits(weights, CONFIG, tokens(), window=6)
    torch.testing.assert_close(
        wide, reference_logits(weights, CONFIG | {"sliding_window": 6}, tokens()), atol=0, rtol=0
    )
    with_full = weights | {f"model.layers.{n}.self_attn.attention_sink_bias": torch.ones(8) for n in (0, 3)}
    on = reference_logits(with_full, CONFIG | {"add_full_attention_sink_bias": True}, tokens())
    off = reference_logits(with_full, CONFIG, tokens())
    assert (on - off).abs().max() > 1e-3
    torch.testing.assert_close(off, reference_logits(weights, CONFIG, tokens()), atol=0, rtol=0)


def test_dequantize_against_a_loop():
    weight, scale = quantize(torch.randn(2 * 200, 150, generator=torch.Generator().manual_seed(2)), chunks=2)
    assert scale.shape == (4, 2)  # 200 rows are 1.6 blocks: 2 scale rows per chunk
    expected = torch.empty(400, 150)
    for row in range(400):
        for col in range(150):
            expected[row, col] = weight[row, col].float() * scale[row // 200 * 2 + row % 200 // 128, col // 128]
    torch.testing.assert_close(dequantize(weight, scale, chunks=2), expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match="needs scales"):
        dequantize(weight, scale[:3], chunks=2)


@pytest.mark.parametrize("chunked", [True, False])
@torch.no_grad()
def test_fused_layouts(weights, chunked):
    fused, layout = fuse(weights, CONFIG, chunked), "chunked" if chunked else "plain"
    read = reference_weights(fused, CONFIG, qkv_layout=layout)
    expected = reference_logits(weights, CONFIG, tokens())
    torch.testing.assert_close(reference_logits(read, CONFIG, tokens()), expected, atol=0, rtol=0)
    wrong = reference_weights(fused, CONFIG, qkv_layout="plain" if chunked else "chunked")
    assert (reference_logits(wrong, CONFIG, tokens()) - expected).abs().max() > 0.1


@torch.no_grad()
def test_released_format(weights):
    tensors, expected = {}, {}
    for name, weight in fuse(weights, CONFIG).items():
        if "qkv_proj" in name or ("mlp" in name and "gate.weight" not in name and weight.ndim == 2):
            chunks = 2 if "qkv_proj" in name else 1
            tensors[name], tensors[name + "_scale_inv"] = quantize(weight, chunks)
            expected[name] = dequantize(tensors[name], tensors[name + "_scale_inv"], chunks)
        else:
            tensors[name] = weight if "mlp.gate." in name else weight.to(torch.bfloat16)
            expected[name] = tensors[name].float()
    # 8 query heads * 24 + 2 or 4 kv heads * (24 + 16), over 2 chunks: 136 rows (2 blocks) and 176 rows (2 blocks)
    assert tensors["model.layers.0.self_attn.qkv_proj.weight_scale_inv"].shape == (4, 1)
    read = reference_weights(tensors, CONFIG)
    for name, tensor in expected.items():
        torch.testing.assert_close(read[name], tensor, atol=0, rtol=0)
    q, _, v = split_qkv(expected["model.layers.1.self_attn.qkv_proj.weight"], CONFIG, swa=True)
    assert torch.equal(read["model.layers.1.self_attn.q_proj.weight"], q)
    assert v.shape == (4 * 16, 32)
    assert not any("scale_inv" in name for name in read)
    rounded = reference_weights(tensors, CONFIG, through=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(rounded[name], read[name].bfloat16().float())
    assert not torch.equal(rounded[name], read[name])
    assert torch.equal(rounded["model.layers.1.mlp.gate.weight"], tensors["model.layers.1.mlp.gate.weight"])
    assert reference_logits(rounded, CONFIG, tokens()).isfinite().all()
