"""Writes MiMo-Micro before it has learned anything: config, tokenizer, random weights, the trained audio tokenizer.

python examples/micro/build.py runs/codec runs/untrained
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_mimo  # noqa: F401 registers the model
from modeling_mimo import MiMoV2Config
from modeling_mimo.conversion.random_config import released_config
from modeling_mimo.conversion.random_media import PREPROCESSOR_STUB
from modeling_mimo.conversion.small_tokenizer import build_small_tokenizer, save_small_tokenizer
from modeling_mimo.training.micro_tasks import MIX
from modeling_mimo.training.micro_texts import TOOLS


# every asymmetry of the releases: 8 of 24 dimensions rotate, K and V have different widths, layer types different KV
# heads, and GA chunks of 136 rows and SWA chunks of 176 do not divide by 128
TEXT = {
    "hidden_size": 192,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0, 1],
    "moe_layer_freq": [0, 1, 1, 1, 1, 1, 1],
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "v_head_dim": 16,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "attention_chunk_size": 32,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 3,
    "max_position_embeddings": 4096,
    "vocab_size": 1024,
}
VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_query_groups": 2,
    "visual_token_window_size": 8,
    "vit_window_attn_types": [-1, 0, 0, 1, 1, -1],
}
AUDIO = {
    "input_local_attn_heads": 2,
    "input_local_dim": 64,
    "input_local_head_dim": 32,
    "input_local_intermediate_size": 128,
    "input_local_layers": 2,
}
# a picture is nine tokens, a clip four pairs of frames
PROCESSOR = {
    "image_max_pixels": 9216,
    "video_max_pixels": 9216,
    "num_frames": 8,
}
# conversations whose texts the tokenizer learns from
TEXTS = 3000


def config(codec: dict) -> dict:
    """The contents of config.json, in the released spelling."""
    values = released_config("tiny", "bf16", overrides=TEXT, vision=True, audio=True)
    values["vision_config"] |= VISION | {"out_hidden_size": values["hidden_size"]}
    channels, largest = codec["num_quantizers"], max(codec["codebook_size"])
    # as released: a row that stands for no code, and some rows that are not used
    values["audio_config"] |= AUDIO | {
        "out_hidden_size": values["hidden_size"],
        "audio_channels": channels,
        "speech_vocab_size": str(largest + 32),
        "speech_zeroemb_idx": str(largest),
    }
    values["processor_config"] |= PROCESSOR | {"audio_channels": channels, "audio_zeroemb_idx": [largest] * channels}
    return values


def words() -> str:
    """What the tokenizer learns from: texts of all tasks, by the shares that they are trained with."""
    random = np.random.default_rng(0)
    shares = np.array(list(MIX.values())) / sum(MIX.values())
    lines = []
    for scene in random.choice(list(MIX), TEXTS, p=shares):
        drawn = scene(random, False)
        lines.append("You are MiMo, a helpful AI assistant engineered by Xiaomi.\nuser\nassistant\n" + drawn.text)
        lines += [f"{turn.question}\n{turn.thinking or ''}\n{turn.answer}" for turn in drawn.turns]
    # what the template writes around tools
    lines += [json.dumps(TOOLS[0]), "<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>"] * 20
    return "\n".join(lines)


@torch.no_grad()
def scale_weights(model: torch.nn.Module) -> None:
    """Matrices of standard deviation 1 / sqrt(inputs): with 0.02, made for wide models, a narrow one learns slowly."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            inputs = parameter.shape[-1] if "experts" in name else parameter[0].numel()
            parameter.normal_(std=inputs**-0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path, help="folder that train_codec.py wrote")
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"folder: expected one that does not exist, got {args.folder}")
    values = config(json.loads((args.codec / "config.json").read_text(encoding="utf-8")))
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(MiMoV2Config.from_dict(values), dtype=torch.float32)
    scale_weights(model)
    model.save_pretrained(args.folder)
    (args.folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (args.folder / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR_STUB, indent=2) + "\n", encoding="utf-8"
    )
    shutil.copytree(args.codec, args.folder / "audio_tokenizer")
    save_small_tokenizer(build_small_tokenizer(values["vocab_size"], words()), args.folder)
    AutoProcessor.from_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
