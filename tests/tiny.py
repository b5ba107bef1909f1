"""A tiny model in the released format that keeps every asymmetry, and helpers to compare it with other models."""

import copy

import torch
from reference import reference_weights
from transformers.models.mimo_v2_flash import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from modeling_mimo import MiMoV2Config, MiMoV2ForCausalLM
from modeling_mimo.drafting_mimo_v2 import TrunkStates


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
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
                noise = 1 + 0.3 * noise
            elif name.endswith("e_score_correction_bias"):
                # sigmoid scores differ by about as much: the bias decides some choices
                noise = 0.2 * noise
            elif name.endswith("patch_embed.proj.weight"):
                noise = noise * tensor[0].numel() ** -0.5
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


def trunk_states(model, ids, **options) -> torch.Tensor:
    """[B, S, hidden] before the final norm, which the MTP heads read."""
    states = TrunkStates(model.model, ids.shape[1])
    with states.recording():
        model.model(ids, **options)
    return states.recorded[0][1]


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


# row and column windows in runs, a window shorter than most grids, grouped heads, no attention width equal to another
TINY_VISION = {
    "depth": 6,
    "fullatt_block_indexes": [0, 5],
    "hidden_act": "silu",
    "hidden_size": 32,
    "in_chans": 3,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_query_groups": 2,
    "out_hidden_size": TINY["hidden_size"],
    "patch_size": 16,
    "spatial_merge_size": 2,
    "spatial_patch_size": 16,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "use_sink": True,
    "visual_token_window_size": 5,
    "vit_window_attn_types": [-1, 0, 0, 1, 1, -1],
    "window_size": 128,
}
IMAGE_ID, VIDEO_ID = 300, 301
SIGHT = {"vision_config": TINY_VISION, "image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, **SMALL}
PATCH_VALUES = 3 * 2 * 16 * 16


# an attention width unlike the hidden size, codes that do not fill the vocabulary, sizes as strings as released
TINY_AUDIO = {
    "add_post_norm": True,
    "audio_channels": 5,
    "audio_segment_size": 6000,
    "group_size": 4,
    "input_full_attention": True,
    "input_local_attn_heads": 3,
    "input_local_dim": 32,
    "input_local_head_dim": 8,
    "input_local_hidden_dropout": 0.0,
    "input_local_intermediate_size": 40,
    "input_local_layers": 3,
    "out_hidden_size": TINY["hidden_size"],
    "partial_rotary_factor": 1.0,
    "projection_layers": 2,
    "rope_theta": 640000,
    "speech_vocab_size": "20",
    "speech_zeroemb_idx": "16",
}
AUDIO_ID, CHANNELS, CODES = 302, TINY_AUDIO["audio_channels"], 16
OMNI = {**SIGHT, "audio_config": TINY_AUDIO, "processor_config": {"audio_token_id": AUDIO_ID}}


def sight_model(seed: int = 0, **changes) -> MiMoV2ForCausalLM:
    """A float32 model with a vision tower whose features are as large as token embeddings."""
    return tiny_model(seed, **{**SIGHT, **changes})


def omni_model(seed: int = 0, **changes) -> MiMoV2ForCausalLM:
    """`sight_model` with an audio encoder."""
    return tiny_model(seed, **{**OMNI, **changes})


def media_prompt(*segments, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of one row: an int is so many text tokens, ("image" or "video", t, h, w) a medium of random patches,
    ("audio", frames) one of random codes.

    A video's placeholders are cut into one run per temporal grid with a text token between, as the processor does.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, grids, codes = [], {"image": [], "video": []}, {"image": [], "video": []}, []
    for segment in segments:
        if isinstance(segment, int):
            ids += torch.randint(0, IMAGE_ID, (segment,), generator=generator).tolist()
            continue
        kind, *grid = segment
        if kind == "audio":
            ids += [8, *[AUDIO_ID] * -(-grid[0] // TINY_AUDIO["group_size"])]
            codes.append(torch.randint(0, CODES, (grid[0], CHANNELS), generator=generator))
            continue
        run = [IMAGE_ID if kind == "image" else VIDEO_ID] * (grid[1] * grid[2] // 4)
        for _ in range(grid[0]):
            ids += [7, *run]
        pixels[kind].append(torch.randn(grid[0] * grid[1] * grid[2], PATCH_VALUES, generator=generator))
        grids[kind].append(grid)
    inputs = {"input_ids": torch.tensor([ids])}
    for kind, pixels_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[kind]:
            inputs |= {pixels_name: torch.cat(pixels[kind]), grid_name: torch.tensor(grids[kind])}
    if codes:
        inputs |= {"audio_codes": torch.cat(codes), "audio_code_lengths": torch.tensor([len(part) for part in codes])}
    return inputs


def batched(*rows: dict[str, torch.Tensor], pad_id: int = 3) -> dict[str, torch.Tensor]:
    """Rows of `media_prompt` as one left-padded batch."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    ids, masks, others = [], [], {}
    for row in rows:
        padding = longest - row["input_ids"].shape[1]
        ids.append(torch.nn.functional.pad(row["input_ids"], (padding, 0), value=pad_id))
        masks.append((torch.arange(longest) >= padding).long()[None])
        for name, tensor in row.items():
            if name != "input_ids":
                others.setdefault(name, []).append(tensor)
    return {
        "input_ids": torch.cat(ids),
        "attention_mask": torch.cat(masks),
        **{name: torch.cat(tensors) for name, tensors in others.items()},
    }
