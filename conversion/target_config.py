"""config.json of the target: that of the source with only those keys changed that would not be true any more."""

import copy
from typing import Any

from modeling_mimo.weight_mapping_mimo_v2 import FP8_BLOCK

from .converters import FLOAT_DTYPES, Plan
from .mxfp4 import MXFP4_GROUP
from .stored_weight import FP8, MXFP4, QUANTIZED


_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16"}
_VISION_KEYS = ("vision_config", "vision_model_type")

# our list of every module that is not quantized has this second name; no release has it
_FULL_LIST = "modules_to_not_convert"


def target_config(source: dict[str, Any], plan: Plan, to: str, dtype: str) -> dict[str, Any]:
    """The contents of config.json for what `plan` writes."""
    config = copy.deepcopy(source)
    if dtype in FLOAT_DTYPES:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = _DTYPE_NAMES[dtype]
    if to == "hub":
        # the code these name is not copied: it takes fused rows for [Q; K; V]
        config.pop("auto_map", None)
    _set_layout(config, plan)
    _set_parts(config, plan)
    stored = {weight.dtype for conversion in plan.conversions for weight in conversion.target}
    if stored & set(QUANTIZED):
        released = config.get("quantization_config") or {}
        config["quantization_config"] = _quantization_config(released, plan, to)
    else:
        config.pop("quantization_config", None)
    return config


def _set_layout(config: dict[str, Any], plan: Plan) -> None:
    wanted = "split" if plan.layout == "split" else "fused_qkv"
    # CODEPATH: V2-Flash says nothing and is split
    silent = "attention_projection_layout" not in config and config["model_type"] == "mimo_v2_flash"
    if wanted != plan.config.attention_projection_layout or not silent:
        config["attention_projection_layout"] = wanted
    config.pop("fused_qkv_layout", None)
    if plan.layout == "plain":
        config["fused_qkv_layout"] = "plain"


def _set_parts(config: dict[str, Any], plan: Plan) -> None:
    if "mtp" not in plan.parts:
        config["num_nextn_predict_layers"] = 0
    if "vision" not in plan.parts:
        for key in _VISION_KEYS:
            config.pop(key, None)
    if "audio" not in plan.parts:
        config.pop("audio_config", None)
    if not {"vision", "audio"} & set(plan.parts):
        # without it a tokenizer is all the processor there is
        config.pop("processor_config", None)


def _quantization_config(released: dict[str, Any], plan: Plan, to: str) -> dict[str, Any]:
    """The entry of the source where it is still true, else what a release of this form has."""
    experts = {weight.dtype for item in plan.conversions if item.group.startswith("experts") for weight in item.target}
    store_dtype = "mxfp4" if MXFP4 in experts else "fp8"
    entry = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", **released}
    if store_dtype == "mxfp4" or "store_dtype" in released or not released:
        entry["store_dtype"] = store_dtype
    if store_dtype == "mxfp4":
        entry["mxfp4_block_size"] = MXFP4_GROUP
    else:
        entry.pop("mxfp4_block_size", None)
    entry["weight_block_size"] = [FP8_BLOCK, FP8_BLOCK]
    if to == "hub":
        entry["ignored_layers"] = entry[_FULL_LIST] = unquantized_modules(plan)
    elif _FULL_LIST in entry or "ignored_layers" not in entry:
        # the released list names o_proj alone, the draft layers by their name inside the trainer
        entry.pop(_FULL_LIST, None)
        layers = range(plan.config.num_hidden_layers)
        entry["ignored_layers"] = [f"model.layers.{layer}.self_attn.o_proj" for layer in layers]
        entry["ignored_layers"].append("model.decoder.self_attn.o_proj")
    return entry


def unquantized_modules(plan: Plan) -> list[str]:
    """Every module with a float weight of two or more dimensions, by its name in the files."""
    return [
        weight.name.removesuffix(".weight")
        for conversion in plan.conversions
        for weight in conversion.target
        if weight.dtype not in (FP8, MXFP4) and weight.name.endswith(".weight") and len(weight.shape) > 1
    ]


__all__ = ["target_config", "unquantized_modules"]
