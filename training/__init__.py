"""Fine-tuning of MiMo-V2: data collator, stage presets, LoRA, router balance, a Trainer. Imported name by name, so
that PEFT and TRL are needed only by what uses them."""

import importlib


_MODULES = {
    "AudioCodeCache": "audio_cache",
    "ConversationCollator": "collator",
    "MTPLossLogs": "trainer",
    "MiMoV2SFTTrainer": "trl_trainer",
    "MiMoV2Trainer": "trainer",
    "RouterBalancer": "router_balance",
    "RouterBiasCallback": "router_balance",
    "STAGES": "stages",
    "LORA_PARTS": "lora",
    "apply_stage": "stages",
    "load_adapter": "lora",
    "lora_config": "lora",
    "lora_targets": "lora",
    "training_chat_template": "chat_template",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


__all__ = sorted(_MODULES)
