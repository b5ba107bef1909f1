"""The stages in which MiMo-V2.5 was trained, as what learns and what is frozen."""

from collections import Counter

import torch
from torch import nn


# stage -> parts that learn
STAGES = {
    "projector": ("projectors",),
    "multimodal": ("text", "mtp", "vision", "audio", "projectors"),
    "sft": ("text", "mtp", "projectors"),
}
# beginning of a parameter's name -> its part; the first that fits
_PARTS = {
    "visual.merger.": "projectors",
    "audio_encoder.projection.": "projectors",
    "visual.": "vision",
    "audio_encoder.": "audio",
    "speech_embeddings.": "audio",
    "model.mtp.": "mtp",
    "": "text",
}
_TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)


def apply_stage(model: nn.Module, stage: str, train_mtp: bool | None = None) -> dict[str, int]:
    """Freezes all parameters of a `MiMoV2ForCausalLM` but those of a stage.

    Args:
        stage: "projector" (warm-up of what maps images and sound into the language model, which is frozen with both
            towers), "multimodal" (everything), "sft" (language model and projectors; towers frozen).
        train_mtp: whether the MTP heads learn where the language model does. By default if they have a loss, that is
            `config.mtp_loss_weight` above 0: parameters without gradients are an error in distributed training.

    Returns:
        Part -> parameters that learn; parts that are frozen or not there are left out.

    Raises:
        ValueError: an unknown stage; a stage whose weights are quantized or that leaves nothing to learn.
    """
    if stage not in STAGES:
        raise ValueError(f"`stage`: expected one of {list(STAGES)}, got {stage!r}.")
    if train_mtp is None:
        train_mtp = model.config.mtp_loss_weight > 0
    learns = [part for part in STAGES[stage] if part != "mtp" or train_mtp]
    parameters = {name: (part_of(name), parameter) for name, parameter in model.named_parameters()}
    for name, (part, parameter) in parameters.items():
        if part in learns and parameter.dtype not in _TRAINABLE:
            raise ValueError(
                f"`stage`: expected floating-point weights to train in {stage!r}, got {name} in {parameter.dtype}; "
                "load with MiMoV2FP8Config(dequantize=True), or train adapters (lora_config)."
            )
    counts = Counter()
    for part, parameter in parameters.values():
        parameter.requires_grad_(part in learns)
        if part in learns:
            counts[part] += parameter.numel()
    if not counts:
        raise ValueError(f"`stage`: expected a model with {' or '.join(learns)} for {stage!r}, got one without.")
    return dict(counts)


def part_of(name: str) -> str:
    """Part of the model that the named parameter belongs to."""
    return next(part for beginning, part in _PARTS.items() if name.startswith(beginning))


__all__ = ["STAGES", "apply_stage", "part_of"]
