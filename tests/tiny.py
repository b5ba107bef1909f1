"""A tiny model in the released format that keeps every asymmetry, and helpers to compare it with other models."""

import copy

import torch
from reference import reference_weights
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from modeling_mimo import MiMoV2Config, MiMoV2ForCausalLM


# the released spelling; K and V widths differ, 8 of 24 dims rotate, window < sequence, other KV heads, thetas and
# sinks per layer type, a dense first layer, and chunks of 136 and 176 rows, which do not divide by 128
TINY = {
    "architectures": ["MiMoV2ForCausalLM"],
    "model_type": "mimo_v2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "v_head_dim": 16,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0, 1],
    "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1],
    "sliding_window": 8,
    "sliding_window_size": 8,
    "rope_theta": 10000000,
    "swa_rope_theta": 10000,
    "partial_rotary_factor": 0.334,
    "attention_value_scale": 0.707,
    "attention_projection_layout": "fused_qkv",
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_bias": False,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_shared_experts": None,
    "hidden_act": "silu",
    "layernorm_epsilon": 1e-05,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
WINDOW = TINY["sliding_window"]

# the three row orders of the attention projections
LAYOUTS = {
    "split": {"attention_projection_layout": "split"},
    "chunked": {"fused_qkv_layout": "chunked"},
    "plain": {"fused_qkv_layout": "plain"},
}

# two global and two sliding layers, for tests that run a model often
SMALL = {"num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1]}


def tiny_dict(**changes) -> dict:
    """A config.json in the released spelling."""
    return copy.deepcopy({**TINY, **changes})


def tiny_config(**changes) -> MiMoV2Config:
    return MiMoV2Config.from_dict(tiny_dict(**changes))


def randomize(model, seed: int = 0):
    """Weights that keep activations near 1 and make every norm, sink and correction bias count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("e_score_correction_bias"):
                # sigmoid scores differ by about as much: the bias decides some choices
                noise = 0.2 * noise
            elif tensor.dim() > 1 and "embed_tokens" not in name:
                noise = noise * tensor.shape[-1] ** -0.5
            tensor.copy_(noise)
    return model


def tiny_model(seed: int = 0, **changes) -> MiMoV2ForCausalLM:
    """A float32 model in eval mode; `changes` by released spelling, `attn_implementation` is not one of them."""
    return randomize(MiMoV2ForCausalLM(tiny_config(**changes)).eval(), seed)


def released_state(model) -> dict[str, torch.Tensor]:
    """State dict under the released names: stacked experts taken apart."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2)
                state[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                state[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                state[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            state[name] = tensor
    return state


def page_weights(model, raw: dict) -> dict[str, torch.Tensor]:
    """Weights of `model` for the naive page."""
    layout = "plain" if model.config.fused_qkv_layout == "plain" else "chunked"
    return reference_weights(released_state(model), raw, qkv_layout=layout)


def transformers_twin(model, raw: dict, sliding_window: int) -> MiMoV2FlashForCausalLM:
    """Transformers' own V2-Flash class with the weights of `model`; its `sliding_window` counts the query."""
    renamed = {"rms_norm_eps": raw["layernorm_epsilon"], "sliding_window": sliding_window}
    same = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim v_head_dim attention_value_scale n_routed_experts num_experts_per_tok n_group "
        "topk_group norm_topk_prob routed_scaling_factor hidden_act max_position_embeddings"
    )
    thetas = {"full_attention": raw["rope_theta"], "sliding_attention": raw["swa_rope_theta"]}
    config = MiMoV2FlashConfig(
        **{key: raw[key] for key in same.split()},
        **renamed,
        layer_types=[("full_attention", "sliding_attention")[code] for code in raw["hybrid_layer_pattern"]],
        mlp_layer_types=[("dense", "sparse")[code] for code in raw["moe_layer_freq"]],
        rope_parameters={
            name: {
                "rope_type": "default",
                "rope_theta": theta,
                "partial_rotary_factor": raw["partial_rotary_factor"],
            }
            for name, theta in thetas.items()
        },
        attn_implementation="eager",
        experts_implementation="eager",
    )
    twin = MiMoV2FlashForCausalLM(config).eval()
    split = page_weights(model, raw)
    stacked = model.state_dict()
    state = {}
    for name in twin.state_dict():
        own = name.replace("self_attn.sinks", "self_attn.attention_sink_bias")
        state[name] = stacked[own] if ".experts." in own else split[own]
    twin.load_state_dict(state)
    return twin


def token_ids(batch: int = 2, length: int = 50, seed: int = 1, vocab_size: int = TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Largest absolute difference at most `tolerance`, and nothing that is not finite."""
    assert got.shape == expected.shape
    difference = (got.float() - expected.float()).abs().max().item()
    # written so that NaN fails
    assert difference <= tolerance, f"differs by {difference}"
