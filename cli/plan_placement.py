"""Where `device_map` would put the weights in given memory, and what a token then fetches from elsewhere."""

import logging
import math
import warnings

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import convert_file_size_to_int
from transformers.integrations.accelerate import expand_device_map

from modeling_mimo import MiMoV2Config, MiMoV2ForCausalLM, MiMoV2FP8Config
from modeling_mimo.checkpoint_mimo_v2 import TensorInfo
from modeling_mimo.offload_mimo_v2 import expert_device_map
from modeling_mimo.quantization_mimo_v2 import MiMoV2FP8Quantizer
from modeling_mimo.weight_mapping_mimo_v2 import MXFP4_GROUP, MXFP4_PER_BYTE, released_tensors, weight_name


DTYPES = {"fp8": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

PLACEMENT_FORMULA = (
    "per token without drafting: the weights of the text model that are not where it computes, of the experts "
    "`num_experts_per_tok` per layer; from disk as the files hold them, from CPU memory to a GPU as they are there"
)


def parse_memory(text: str, field: str) -> list[int]:
    """`"80GB"`, `"24GiB,24GiB"` -> bytes. ValueError names `field`."""
    try:
        return [convert_file_size_to_int(size) for size in text.split(",")]
    except ValueError:
        raise ValueError(f"{field}: expected sizes such as 80GB or 24GiB,24GiB, got {text!r}.") from None


def plan_placement(
    config: MiMoV2Config, tensors: dict[str, TensorInfo] | None, dtype: str, gpus: list[int], cpu: int
) -> dict:
    """Bytes per device and bytes fetched per token, for `device_map="auto"` and for `expert_device_map`.

    Args:
        dtype: of the weights in memory, a key of DTYPES.
        gpus, cpu: bytes for weights, as `max_memory` has them.

    Returns:
        `auto` and `experts`, each with `devices` and `per_token`; `experts["fits"]` says whether the rest of the model
        fits where it computes.
    """
    model, stored = meta_model(config, dtype), _stored_bytes(config, tensors)
    main = 0 if gpus else "cpu"
    budget = {**dict(enumerate(gpus)), "cpu": cpu}
    # accelerate warns, in both ways, of GPUs that are not in this machine and of what does not fit
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            auto = infer_auto_device_map(model, max_memory=budget, no_split_module_classes=model._no_split_modules)
    finally:
        logging.disable(logging.NOTSET)
    plan = {"max_memory": {str(device): size for device, size in budget.items()}, "formula": PLACEMENT_FORMULA}
    plan["auto"] = _totals(model, stored, auto, main)
    in_cpu = _totals(model, stored, expert_device_map(config, "cpu", main), main)
    # experts that fit into CPU memory need no disk; without a GPU they would be no offload at all
    fits = gpus and in_cpu["devices"]["cpu"] <= cpu
    plan["experts"] = in_cpu if fits else _totals(model, stored, expert_device_map(config, "disk", main), main)
    plan["experts"]["fits"] = plan["experts"]["devices"][str(main)] <= budget[main]
    return plan


def meta_model(config: MiMoV2Config, dtype: str) -> MiMoV2ForCausalLM:
    """The model on the meta device, with the parameters that it has in memory in `dtype`."""
    with torch.device("meta"):
        model = MiMoV2ForCausalLM._from_config(config, dtype=DTYPES[dtype])
        if dtype == "fp8":
            quantization = {**config.to_dict()["quantization_config"], "dequantize": False}
            quantizer = MiMoV2FP8Quantizer(MiMoV2FP8Config(**quantization))
            quantizer._process_model_before_weight_loading(model)
    return model


def _totals(model: MiMoV2ForCausalLM, stored: dict[str, int], device_map: dict, main: int | str) -> dict:
    """`devices`: bytes by device, on disk as in the files; `per_token`: bytes fetched from "cpu" and "disk"."""
    config = model.config
    share = config.num_experts_per_tok / config.n_routed_experts
    totals, fetched = {str(main): 0}, {"cpu": 0.0, "disk": 0.0}
    sizes = {
        name: tensor.nbytes for part in (model.named_parameters(), model.named_buffers()) for name, tensor in part
    }
    devices = expand_device_map(device_map, list(sizes))
    for name, device in devices.items():
        # codes and scales of a parameter are counted with its weight
        size = stored.get(name, 0) if device == "disk" else sizes[name]
        totals[str(device)] = totals.get(str(device), 0) + size
        runs = name.startswith(("model.", "lm_head.")) and not name.startswith("model.mtp.")
        if device in fetched and device != main and runs:
            fetched[device] += size * (share if ".experts." in name else 1)
    return {"devices": totals, "per_token": {device: round(size) for device, size in fetched.items()}}


def _stored_bytes(config: MiMoV2Config, tensors: dict[str, TensorInfo] | None) -> dict[str, int]:
    """Parameter -> bytes of the released tensors that it is made of, by headers where there are some."""
    table, sizes = released_tensors(config), {}
    for name, info in (tensors or {}).items():
        target = table[weight_name(name)].target
        sizes[target] = sizes.get(target, 0) + info.nbytes
    if tensors is not None:
        return sizes
    quantization = config.to_dict().get("quantization_config")
    # CODEPATH: V2.6 stores its experts as mxfp4, every other release as fp8
    mxfp4 = bool(quantization) and quantization.get("store_dtype") == "mxfp4"
    router_bytes = 2 if config.moe_router_dtype == "bfloat16" else 4
    for spec in table.values():
        elements = math.prod(spec.shape)
        if not quantization or not spec.quantized:
            size = elements * (router_bytes if spec.part == "router" else 2)
        elif mxfp4 and spec.part == "experts":
            size = elements // MXFP4_PER_BYTE + elements // MXFP4_GROUP
        else:
            size = elements + 4 * math.prod(spec.scale_shape)
        sizes[spec.target] = sizes.get(spec.target, 0) + size
    return sizes
