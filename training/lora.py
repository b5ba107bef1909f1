"""LoRA on any part of the model: targets for PEFT, and adapters for weights that stay quantized."""

import os
import re

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from modeling_mimo.adapters_mimo_v2 import ON_DISK, check_adapter_tensors, is_on_disk
from modeling_mimo.checkpoint_mimo_v2 import Checkpoint, CheckpointError
from modeling_mimo.lora_layers_mimo_v2 import with_own_layers
from modeling_mimo.modeling_mimo_v2_text import MiMoV2Experts


_MLP = r"mlp\.(gate_proj|up_proj|down_proj)"
_ATTENTION = r"self_attn\.(qkv_proj|q_proj|k_proj|v_proj|o_proj)"
# part -> names of its linear layers, as a pattern
_LINEARS = {
    "attention": rf"model\.layers\.\d+\.{_ATTENTION}",
    "mlp": rf"model\.layers\.\d+\.{_MLP}",
    "vision": rf"visual\.blocks\.\d+\.(attn\.(qkv|proj)|{_MLP})",
    "audio": rf"audio_encoder\.input_local_transformer\.layers\.\d+\.({_ATTENTION}|{_MLP})",
    "projectors": r"visual\.merger\.mlp\.(0|2)|audio_encoder\.projection\.mlp\.(0|2)",
    "mtp": rf"model\.mtp\.layers\.\d+\.(eh_proj|{_ATTENTION}|{_MLP})",
}
_EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LORA_PARTS = ("attention", "experts", "mlp", "vision", "audio", "projectors", "mtp")


def lora_targets(model: nn.Module, parts: tuple[str, ...] = ("attention",)) -> dict[str, str | list[str]]:
    """`target_modules` (a pattern) and `target_parameters` of a `LoraConfig` for parts of a `MiMoV2ForCausalLM`.

    Args:
        parts: of LORA_PARTS: "attention" (the fused `qkv_proj`, and `o_proj`), "experts" (97 % of MiMo-V2.5), "mlp"
            (the dense layers), "vision" and "audio" (towers), "projectors", "mtp".

    Raises:
        ValueError: no part, an unknown one, or one that this model does not have.
    """
    if isinstance(parts, str) or not parts or not set(parts) <= set(LORA_PARTS):
        raise ValueError(f"`parts`: expected some of {list(LORA_PARTS)}, got {parts!r}.")
    names = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    patterns = dict(_LINEARS)
    if "audio_encoder.projection" in names:
        # a single layer in some configs, two in the releases
        patterns["projectors"] += r"|audio_encoder\.projection"
    present = {part for part, pattern in patterns.items() if any(re.fullmatch(pattern, name) for name in names)}
    if any(isinstance(module, MiMoV2Experts) for module in model.modules()):
        present.add("experts")
    if missing := [part for part in parts if part not in present]:
        raise ValueError(f"`parts`: expected some of {[p for p in LORA_PARTS if p in present]}, got {missing[0]!r}.")
    chosen = [f"({patterns[part]})" for part in parts if part in patterns]
    return {
        # an empty list is what PEFT takes for "no module"
        "target_modules": "|".join(chosen) if chosen else [],
        "target_parameters": list(_EXPERT_PARAMETERS) if "experts" in parts else None,
    }


def lora_config(model: nn.Module, parts: tuple[str, ...] = ("attention",), **settings) -> LoraConfig:
    """A `LoraConfig` for parts of `model`, whose weights may be floats, FP8, MXFP4 or those of bitsandbytes.

    Experts get adapters that work on the hidden states of each expert: PEFT's own add up the weights of all experts
    in every forward, 13 GB per layer of MiMo-V2.5. The files are the same, and load with plain PEFT as well.

    Args:
        parts: as for `lora_targets`.
        settings: of `LoraConfig`: `r`, `lora_alpha`, `modules_to_save`, ...

    Raises:
        ValueError: as `lora_targets`; weights of these parts on disk.

    ```python
    >>> model = get_peft_model(model, lora_config(model, ("attention", "experts"), r=16, lora_alpha=32))
    ```
    """
    targets = lora_targets(model, parts)
    pattern = re.compile(targets["target_modules"] or "no module")
    experts = tuple(targets["target_parameters"] or ())
    adapted = [
        name
        for name, _ in model.named_parameters()
        if pattern.fullmatch(name.rpartition(".")[0]) or name.endswith(experts)
    ]
    if is_on_disk(model, adapted):
        raise ValueError(ON_DISK)
    return with_own_layers(LoraConfig(**{**targets, **settings}))


def load_adapter(model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` with the adapter layers of `lora_config`; every tensor of the file is loaded.

    Raises:
        ValueError: `model` has adapters already, or weights on disk; one error that lists all tensors that are
            missing, unknown or of another shape.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "`model`: expected one without adapters, got one with; its own `load_adapter(folder, adapter_name=...)` "
            "adds another."
        )
    if is_on_disk(model, [name for name, _ in model.named_parameters()]):
        raise ValueError("`device_map`: expected weights in memory, got some on disk, where model.load_adapter works.")
    config = with_own_layers(PeftConfig.from_pretrained(folder))
    config.inference_mode = not is_trainable
    tensors = Checkpoint.from_files([cached_file(folder, ADAPTER_SAFE_WEIGHTS_NAME)]).tensors
    # PEFT warns of what does not fit, or drops it
    adapted = PeftModel.from_pretrained(
        model, folder, config=config, is_trainable=is_trainable, ignore_mismatched_sizes=True
    )
    try:
        check_adapter_tensors(adapted, adapted.active_adapter, {name: info.shape for name, info in tensors.items()})
    except CheckpointError:
        if not config.is_prompt_learning:
            # the model as it was, for another try
            adapted.unload()
        raise
    return adapted


__all__ = ["LORA_PARTS", "load_adapter", "lora_config", "lora_targets"]
