"""config.json of small random checkpoints: released keys and values, with sizes of our own.

Sources: config.json of XiaomiMiMo/MiMo-V2.5 and MiMo-V2.6-Flash-RL; the differences of MiMo-V2-Flash.
"""

import copy

from .mxfp4 import MXFP4_GROUP
from .random_audio import audio_config
from .random_media import PROCESSOR_CONFIG, vision_config


LAYOUTS = ("fused_qkv", "plain", "split")
DTYPES = ("fp8", "bf16", "mxfp4")

# Tokens of the small tokenizer; the embedding has a few rows more, as the released one (151675 tokens, 152576 rows).
TOKENS = 2048
_RELEASED_TOKENS = 151675

# MiMo-V2.5's config.json in its own order, without auto-generated lists and `quantization_config`.
# None marks what a size or the tokenizer decides. The doubled and unread keys are the released file's.
_CONFIG = {
    "architectures": ["MiMoV2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_mimo_v2.MiMoV2Config",
        "AutoModel": "modeling_mimo_v2.MiMoV2Model",
        "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM",
    },
    "attention_bias": False,
    "attention_chunk_size": None,
    "attention_dropout": 0.0,
    "attention_value_scale": 0.707,
    "attention_projection_layout": "fused_qkv",
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "audio_config": None,
    "swa_num_key_value_heads": None,
    "swa_num_attention_heads": None,
    "swa_head_dim": None,
    "swa_v_head_dim": None,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": None,
    "hybrid_block_size": None,
    "hybrid_layer_pattern": None,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layernorm_epsilon": 1e-05,
    "max_position_embeddings": None,
    "model_type": "mimo_v2",
    "moe_intermediate_size": None,
    "moe_layer_freq": None,
    "n_group": 1,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "norm_topk_prob": True,
    "num_attention_heads": None,
    "num_experts_per_tok": None,
    "num_hidden_layers": None,
    "num_key_value_heads": None,
    "pad_token_id": 151643,
    "partial_rotary_factor": 0.334,
    "processor_config": None,
    "quantization_config": None,
    "rope_scaling": {"rope_type": "default", "type": "default"},
    "rope_theta": 10000000,
    "routed_scaling_factor": None,
    "scoring_func": "sigmoid",
    "sliding_window": None,
    "sliding_window_size": None,
    "swa_rope_theta": 10000,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "v_head_dim": None,
    "video_token_id": 151656,
    "vision_config": None,
    "vision_end_token_id": 151653,
    "vision_model_type": "mimovl",
    "vision_start_token_id": 151652,
    "vocab_size": None,
}
_VISION_KEYS = ("processor_config", "vision_config", "vision_model_type")

# MiMo-V2-Flash's differences: split projections, text only, older numbers. Its exact key order is unknown.
_FLASH_DROPPED = [key for key in _CONFIG if key.startswith(("audio_", "image_", "video_", "vision_"))]
_FLASH_DROPPED += ["auto_map", "attention_projection_layout", "dtype"]
_FLASH_CHANGED = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "rope_theta": 5000000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
}

# MiMo-V2.6-Flash-RL's differences. Its key order and its vision, audio and processor entries are unknown.
_V2_6_DROPPED = ("auto_map", "rope_scaling")
_V2_6_CHANGED = {
    "audio_end_token_id": 151674,
    "audio_start_token_id": 151673,
    "audio_token_id": 151669,
    "bos_token_id": None,
    "layernorm_epsilon": 1e-06,
    "moe_router_dtype": "bfloat16",
    "num_nextn_predict_layers": 3,
    "rope_parameters": {
        "partial_rotary_factor": 0.334,
        "rope_theta": 10000000.0,
        "rope_type": "default",
        "type": "default",
    },
    "rope_theta": 10000000.0,
    "swa_rope_theta": 10000.0,
    "transformers_version": "5.3.0",
}

# tiny (10M parameters): every asymmetry of the released models. 8 of 24 rotary dimensions, key and value heads of
# different width, GA chunks of 136 rows and SWA chunks of 176 (neither divides by 128), window 8.
# demo (55M), bench (143M): the released head widths 192 and 128, so GA chunks of 1088 = 8.5 blocks and SWA chunks of
# 11 blocks, and the released window.
SIZES = {
    "tiny": {
        "hidden_size": 256,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0, 1, 1],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "v_head_dim": 16,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "max_position_embeddings": 4096,
        "vocab_size": 2176,
    },
    "demo": {
        "hidden_size": 384,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 4,
        "head_dim": 192,
        "v_head_dim": 128,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 32768,
        "vocab_size": 2304,
    },
}
SIZES["bench"] = SIZES["demo"] | {
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "swa_num_key_value_heads": 8,
    "intermediate_size": 2048,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
}


def released_config(
    size: str = "tiny",
    dtype: str = "fp8",
    layout: str = "fused_qkv",
    overrides: dict | None = None,
    vision: bool = False,
    audio: bool = False,
) -> dict:
    """The contents of config.json: a released config with the sizes of SIZES[size].

    dtype: "mxfp4" gives the config of MiMo-V2.6; not with the "split" layout.
    vision: with `vision_config` and `processor_config`, as MiMo-V2.5; not with the "split" layout of MiMo-V2-Flash.
    audio: with `audio_config` too; only with vision, as in every release.
    overrides: config keys to set or add last, by their released spelling; they must fit together (a change of
    `num_hidden_layers` needs `hybrid_layer_pattern` and `moe_layer_freq`). The list of layers that are not
    quantized follows `num_hidden_layers`. `num_nextn_predict_layers` sets the draft layers (3 when absent).
    ValueError: unknown size, dtype or layout; overrides that contradict each other.
    """
    for name, value, known in (("size", size, tuple(SIZES)), ("dtype", dtype, DTYPES), ("layout", layout, LAYOUTS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if vision and layout == "split":
        raise ValueError("vision is True, expected False with layout 'split': MiMo-V2-Flash is text only")
    if dtype == "mxfp4" and layout == "split":
        raise ValueError("dtype is 'mxfp4', expected fp8 or bf16 with layout 'split': MiMo-V2.6 is fused")
    if audio and not vision:
        raise ValueError("audio is True, expected vision too: every release that hears also sees")
    config = copy.deepcopy(_CONFIG)
    config.update(copy.deepcopy(SIZES[size]))
    layers = len(config["hybrid_layer_pattern"])
    config["num_hidden_layers"] = layers
    config["moe_layer_freq"] = [0] + [1] * (layers - 1)
    for key in ("num_attention_heads", "head_dim", "v_head_dim"):
        config[f"swa_{key}"] = config[key]
    config["sliding_window_size"] = config["attention_chunk_size"] = config["sliding_window"]
    if vision:
        config["vision_config"] = vision_config(size, config["hidden_size"])
        config["processor_config"] = copy.deepcopy(PROCESSOR_CONFIG)
    else:
        config = {key: value for key, value in config.items() if key not in _VISION_KEYS}
    if audio:
        config["audio_config"] = audio_config(size, config["hidden_size"])
    else:
        del config["audio_config"]
    if layout == "split":
        config = {key: value for key, value in config.items() if key not in _FLASH_DROPPED} | _FLASH_CHANGED
    if dtype == "mxfp4":
        changed = copy.deepcopy(_V2_6_CHANGED)
        config = {key: value for key, value in config.items() if key not in _V2_6_DROPPED} | changed
    config.update(overrides or {})
    for key in (key for key in config if key.endswith("_token_id") and key not in (overrides or {})):
        if config[key] is not None:
            config[key] = small_token_id(config[key], config)
    if vision and "processor_config" not in (overrides or {}):
        media = config["processor_config"]
        media.update({key: small_token_id(media[key], config) for key in media if key.endswith("_token_id")})
    if dtype == "bf16":
        del config["quantization_config"]
    else:
        config["quantization_config"] = _quantization_config(config["num_hidden_layers"], dtype)
    check_config(config)
    return config


def token_count(config: dict) -> int:
    """Tokens of the small tokenizer of a checkpoint: its embedding may have more rows."""
    return min(TOKENS, config["vocab_size"])


def small_token_id(released: int, config: dict) -> int:
    """The small tokenizer ends with the released one's 32 added tokens in their order."""
    return released - _RELEASED_TOKENS + token_count(config)


def _quantization_config(layers: int, dtype: str) -> dict:
    # `model.decoder` is the draft layers' name inside the trainer; on disk they are `model.mtp.layers.N`.
    ignored = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(layers)]
    group = {"mxfp4_block_size": MXFP4_GROUP} if dtype == "mxfp4" else {}
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        **group,
        "quant_method": "fp8",
        "store_dtype": dtype,
        "ignored_layers": [*ignored, "model.decoder.self_attn.o_proj"],
        "weight_block_size": [128, 128],
    }


def check_config(config: dict) -> None:
    """ValueError for lengths and head counts that contradict each other."""
    layers = config["num_hidden_layers"]
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        if len(config[key]) != layers:
            raise ValueError(f"{key} has {len(config[key])} entries, expected num_hidden_layers = {layers}")
    chunks = config["num_key_value_heads"]
    for key in ("num_attention_heads", "swa_num_attention_heads", "swa_num_key_value_heads"):
        if config[key] % chunks:
            raise ValueError(f"{key} is {config[key]}, expected a multiple of num_key_value_heads = {chunks}")
