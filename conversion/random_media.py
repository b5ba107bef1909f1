"""The vision part of small random checkpoints: entries of config.json, tensor shapes, and the stub preprocessor file.

Source of every key and value that is not a size: config.json and preprocessor_config.json of XiaomiMiMo/MiMo-V2.5.
"""

import copy
from collections.abc import Iterator


# no key of the released config gives the width of a vision head
VISION_HEAD_DIM = 64

# what config.json calls `processor_config`; ids are those of the released tokenizer
PROCESSOR_CONFIG = {
    "audio_avg_pooler": 2,
    "audio_channels": 20,
    "audio_end_token_id": 151674,
    "audio_fmax": None,
    "audio_fmin": 0,
    "audio_group_size": 4,
    "audio_hop_length": 240,
    "audio_input_id_per_second": 25.0,
    "audio_kernel_size": 3,
    "audio_n_mels": 128,
    "audio_nfft": 960,
    "audio_sampling_rate": 24000,
    "audio_segment_size": 6000,
    "audio_start_token_id": 151673,
    "audio_stride_size": 2,
    "audio_token_id": 151669,
    "audio_window_size": 960,
    "audio_zeroemb_idx": [1024] * 20,
    "fps": 1.0,
    "image_max_pixels": 8388608,
    "image_min_pixels": 8192,
    "image_token_id": 151655,
    "max_frames": 3600,
    "merge_size": 2,
    "min_frames": None,
    "num_frames": None,
    "pad_token_id": 151643,
    "patch_size": 16,
    "rope_type": "rope",
    "temporal_compression_ratio": 1,
    "temporal_patch_size": 2,
    "use_per_grid_t_timestamps": False,
    "use_video_timestamps": True,
    "video_audio_interleave_length": 0.0,
    "video_end_token_id": 151671,
    "video_max_pixels": 8388608,
    "video_min_pixels": 8192,
    "video_process_num_threads": 16,
    "video_start_token_id": 151670,
    "video_token_id": 151656,
    "video_tokens_per_second": 2,
    "video_total_max_pixels": 268435456,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}

# the released preprocessor_config.json: Qwen's class names, and pixel limits that nobody serves
PREPROCESSOR_STUB = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}

# grouped heads, runs of column blocks, and (tiny) a window that is shorter than small images
_VISION = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "visual_token_window_size": 8,
        "vit_window_attn_types": [-1, 0, 0, 1, 1, -1],
    },
    "demo": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "visual_token_window_size": 64,
        "vit_window_attn_types": [-1, 0, 0, 0, 1, 1, 1, -1],
    },
}
_VISION["bench"] = _VISION["demo"]


def vision_config(size: str, out_hidden_size: int) -> dict:
    """The entry `vision_config` of config.json, in the released key order."""
    sizes = _VISION[size]
    types = sizes["vit_window_attn_types"]
    return copy.deepcopy(
        {
            "depth": len(types),
            "fullatt_block_indexes": [index for index, kind in enumerate(types) if kind == -1],
            "hidden_act": "silu",
            "hidden_size": sizes["hidden_size"],
            "in_chans": 3,
            "intermediate_size": sizes["intermediate_size"],
            "num_heads": sizes["num_heads"],
            "num_key_value_heads": sizes["num_key_value_heads"],
            "num_query_groups": sizes["num_heads"] // sizes["num_key_value_heads"],
            "out_hidden_size": out_hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "spatial_patch_size": 16,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "use_sink": True,
            "visual_token_window_size": sizes["visual_token_window_size"],
            "vit_window_attn_types": types,
            "window_size": 128,
        }
    )


def vision_shapes(vision: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every vision tensor, in the order of the forward pass."""
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    query, key = (vision[name] * VISION_HEAD_DIM for name in ("num_heads", "num_key_value_heads"))
    patch = (vision["in_chans"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield "visual.patch_embed.proj.weight", (hidden, *patch)
    for block, kind in enumerate(vision["vit_window_attn_types"]):
        prefix = f"visual.blocks.{block}."
        yield prefix + "norm1.weight", (hidden,)
        if kind != -1 and vision["use_sink"]:
            yield prefix + "attn.sinks", (vision["num_heads"],)
        yield prefix + "norm2.weight", (hidden,)
        for name, rows, columns in (
            ("attn.qkv", query + 2 * key, hidden),
            ("attn.proj", hidden, query),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
            yield f"{prefix}{name}.bias", (rows,)
    merged = hidden * vision["spatial_merge_size"] ** 2
    yield "visual.merger.ln_q.weight", (hidden,)
    yield "visual.merger.mlp.0.weight", (merged, merged)
    yield "visual.merger.mlp.2.weight", (vision["out_hidden_size"], merged)
