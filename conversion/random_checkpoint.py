"""Small random checkpoints in the exact format of the released ones, traps included.

    python -m modeling_mimo.conversion.random_checkpoint /tmp/mimo-tiny --size tiny

The format is that of XiaomiMiMo/MiMo-V2.5: the same keys and key order in config.json (the vision and processor parts
only with `vision`, the audio part only with `audio`, else as in MiMo-V2.5-Pro), the same tensor names and dtypes,
expert-parallel files without `__metadata__`, an alphabetical index, FP8 with 128 x 128 scales that are tiled per chunk
in the fused `qkv_proj`, expert weights whose scale lies in another file, and an `audio_tokenizer/` folder that the
index does not name. Only the sizes and the values are not Xiaomi's.

With dtype "mxfp4" it is that of XiaomiMiMo/MiMo-V2.6-Flash-RL: routed experts in MXFP4, a bfloat16 router, and the
keys of that config.json.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from .fp8 import quantize_chunks
from .mxfp4 import quantize_mxfp4
from .random_audio import audio_shapes, write_random_audio_tokenizer
from .random_common import new_folder, random_tensor, write_json
from .random_config import DTYPES, LAYOUTS, SIZES, check_config, released_config, small_token_id, token_count
from .random_media import PREPROCESSOR_STUB, vision_shapes


# MiMo-V2.5 publishes three draft layers and its config.json does not say so.
_MTP_LAYERS = 3


def released_tensors_random(config: dict, seed: int = 0, layout: str | None = None) -> dict[str, torch.Tensor]:
    """Random values of every tensor of a checkpoint, not quantized, under the released names.

    config: as `released_config` returns it. layout: "fused_qkv" (rows in chunks [Q_c | K_c | V_c], one per
    `num_key_value_heads`), "plain" (rows [Q | K | V]) or "split"; None takes what the config says.
    Router weights and `e_score_correction_bias` are float32, everything else is bfloat16; so is a router whose
    `moe_router_dtype` says so.

    Linear weights have standard deviation 1 / sqrt(fan in), embeddings and sinks 1, norms 1 +- 0.1. A value depends
    on the seed and its name alone: the three layouts hold the same model.
    """
    layout = layout or ("fused_qkv" if config.get("attention_projection_layout") == "fused_qkv" else "split")
    check_config(config)
    tensors = {}
    for name, shape in _split_shapes(config):
        tensors[name] = random_tensor(name, shape, seed)
        if name.endswith("mlp.gate.weight") and config.get("moe_router_dtype") == "bfloat16":
            tensors[name] = tensors[name].to(torch.bfloat16)
        # the audio encoder's projections are split in every layout
        if layout != "split" and name.startswith("model.") and name.endswith("self_attn.v_proj.weight"):
            names = [name.replace("v_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            chunks = config["num_key_value_heads"] if layout == "fused_qkv" else 1
            parts = zip(*(tensors.pop(part).chunk(chunks) for part in names))
            tensors[name.replace("v_proj", "qkv_proj")] = torch.cat([part for chunk in parts for part in chunk])
    return tensors


def write_random_checkpoint(
    folder: str | os.PathLike,
    size: str = "tiny",
    seed: int = 0,
    dtype: str = "fp8",
    layout: str = "fused_qkv",
    overrides: dict | None = None,
    with_tokenizer: bool = True,
    vision: bool = False,
    audio: bool = False,
) -> Path:
    """Write a random checkpoint in the released format and return its folder. The same arguments, the same bytes.

    size: a key of SIZES. dtype: "fp8", "bf16" (no scales, no `quantization_config`) or "mxfp4" (MiMo-V2.6: MXFP4
    experts with a `weight_scale`, the rest as in "fp8").
    layout: "fused_qkv" (MiMo-V2.5), "plain" (what re-exporters publish: the same config tag, but rows [Q | K | V]
    and one regular scale grid) or "split" (MiMo-V2-Flash: q_proj, k_proj, v_proj; model_type `mimo_v2_flash`).
    overrides, vision, audio: as in `released_config`. With vision the folder also gets the released stub
    preprocessor_config.json, and no file of a processor of its own, as released; with audio also `audio_tokenizer/`,
    as `write_random_audio_tokenizer` writes it.

    Files are written to `<folder>.partial`, which is renamed at the end.
    ValueError: `folder` exists and is not an empty folder, `<folder>.partial` exists, or arguments as above.
    """
    config = released_config(size, dtype, layout, overrides, vision, audio)
    with new_folder(folder) as partial:
        tensors = released_tensors_random(config, seed, layout)
        if dtype != "bf16":
            chunks = config["num_key_value_heads"] if layout == "fused_qkv" else 1
            tensors = _quantized(tensors, chunks, dtype)
        _write_weights(partial, tensors, config, dtype)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", _generation_config(config))
        if vision:
            write_json(partial / "preprocessor_config.json", PREPROCESSOR_STUB)
        if audio:
            write_random_audio_tokenizer(partial / "audio_tokenizer", size, seed)
        if with_tokenizer:
            # Imported here: it brings in all of Transformers, which the tensors do not need.
            from .small_tokenizer import build_small_tokenizer, save_small_tokenizer

            save_small_tokenizer(build_small_tokenizer(token_count(config)), partial)
    return Path(folder)


def _generation_config(config: dict) -> dict:
    eos = [small_token_id(released, config) for released in (151643, 151645, 151672)]
    return {
        "bos_token_id": eos[0],
        "eos_token_id": eos,
        "do_sample": False,
        "top_p": 0.95,
        "temperature": 1.0,
        "max_new_tokens": 2048,
    }


def _split_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor as if the projections were split, in the order of the forward pass."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer, (sliding, moe) in enumerate(zip(config["hybrid_layer_pattern"], config["moe_layer_freq"])):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield from _attention_shapes(prefix + "self_attn.", config, bool(sliding))
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if not moe:
            yield from _mlp_shapes(prefix + "mlp.", hidden, config["intermediate_size"])
            continue
        yield prefix + "mlp.gate.weight", (config["n_routed_experts"], hidden)
        yield prefix + "mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
        for expert in range(config["n_routed_experts"]):
            yield from _mlp_shapes(f"{prefix}mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    if "vision_config" in config:
        yield from vision_shapes(config["vision_config"])
    if "audio_config" in config:
        yield from audio_shapes(config["audio_config"])
    for layer in range(config.get("num_nextn_predict_layers", _MTP_LAYERS)):
        prefix = f"model.mtp.layers.{layer}."
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        yield prefix + "eh_proj.weight", (hidden, 2 * hidden)
        yield from _attention_shapes(prefix + "self_attn.", config, sliding=True)
        yield from _mlp_shapes(prefix + "mlp.", hidden, config["intermediate_size"])


def _attention_shapes(prefix: str, config: dict, sliding: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    kind = "swa_" if sliding else ""
    hidden, heads = config["hidden_size"], config[kind + "num_attention_heads"]
    kv_heads, head, v_head = (config[kind + key] for key in ("num_key_value_heads", "head_dim", "v_head_dim"))
    yield prefix + "q_proj.weight", (heads * head, hidden)
    yield prefix + "k_proj.weight", (kv_heads * head, hidden)
    yield prefix + "v_proj.weight", (kv_heads * v_head, hidden)
    yield prefix + "o_proj.weight", (hidden, heads * v_head)
    if config["add_swa_attention_sink_bias" if sliding else "add_full_attention_sink_bias"]:
        yield prefix + "attention_sink_bias", (heads,)


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (inner, hidden)
    yield prefix + "up_proj.weight", (inner, hidden)
    yield prefix + "down_proj.weight", (hidden, inner)


def _quantized(tensors: dict[str, torch.Tensor], qkv_chunks: int, dtype: str) -> dict[str, torch.Tensor]:
    """The language model's qkv and MLP projections become FP8 and get a `<name>_scale_inv` each; the rest stays.

    With dtype "mxfp4" the routed experts become MXFP4 instead and get a `<name>_scale`.
    """
    kinds = ("qkv_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    stored = {}
    for name, tensor in tensors.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if dtype == "mxfp4" and ".mlp.experts." in name:
            stored[name], stored[name + "_scale"] = quantize_mxfp4(tensor)
        elif kind in kinds and name.startswith("model."):
            chunks = qkv_chunks if kind == "qkv_proj" else 1
            stored[name], stored[name + "_scale_inv"] = quantize_chunks(tensor, chunks)
        else:
            stored[name] = tensor
    return stored


def _file_chooser(config: dict) -> Callable[[str], str]:
    """A function from a tensor's name to its file's name.

    Rank k holds the k-th equal share of every layer's experts. A released rank writes layer by layer all gate, all
    up, all down projections and starts its second file past 32 GiB, which in MiMo-V2.5 is just before the scale of
    the last up_proj of a late layer. The same cut is made here in the last MoE layer but one.
    """
    experts = config["n_routed_experts"]
    ranks = next(ranks for ranks in (4, 2, 1) if experts % ranks == 0 and (experts >= 4 * ranks or ranks == 1))
    moe_layers = [layer for layer, moe in enumerate(config["moe_layer_freq"]) if moe]
    cut_layer = moe_layers[-2:][0] if moe_layers else 0

    def file_of(name: str) -> str:
        if name.startswith("model.mtp."):
            return "model_mtp.safetensors"
        if ".mlp.experts." not in name:
            return "model_pp0_ep0_shard1.safetensors"
        _, _, layer, _, _, expert, projection, kind = name.split(".")
        rank, place = divmod(int(expert), experts // ranks)
        last_up_scale = projection == "up_proj" and kind != "weight" and place == experts // ranks - 1
        before = int(layer) < cut_layer or (
            int(layer) == cut_layer and projection != "down_proj" and not last_up_scale
        )
        return f"model_pp0_ep{rank}_shard{0 if before else 1}.safetensors"

    return file_of


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], config: dict, dtype: str) -> None:
    file_of = _file_chooser(config)
    weight_map = {name: file_of(name) for name in sorted(tensors)}
    for file in sorted(set(weight_map.values())):
        # Called without metadata the library writes no `__metadata__`, as Xiaomi did, and orders by dtype, then name.
        part = {name: tensors[name] for name, where in weight_map.items() if where == file}
        (folder / file).write_bytes(save(part))
    metadata = {
        "save_format": dtype,
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "tp_size": config["num_key_value_heads"],
    }
    write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_mimo.conversion.random_checkpoint",
        description="Write a small random MiMo-V2 checkpoint in the released format.",
        epilog="example: python -m modeling_mimo.conversion.random_checkpoint mimo-tiny --size tiny --layout split",
    )
    parser.add_argument("folder", help="folder to write; must not exist or be empty")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="fp8")
    parser.add_argument("--layout", choices=LAYOUTS, default="fused_qkv")
    parser.add_argument("--vision", action="store_true", help="with a vision tower and processor settings")
    parser.add_argument("--audio", action="store_true", help="with audio parts and audio_tokenizer/; needs --vision")
    parser.add_argument("--no-tokenizer", dest="with_tokenizer", action="store_false", help="no tokenizer files")
    try:
        folder = write_random_checkpoint(**vars(parser.parse_args(arguments)))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    files = [file for file in folder.rglob("*") if file.is_file()]
    print(f"{folder}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
