"""Hugging Face Transformers models of Xiaomi's MiMo-V2 family. Importing this package registers them."""

# isort: off
# first, so that a line of Transformers that is not supported is named before anything fails on it
from .versions_mimo_v2 import __version__

# isort: on
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto import modeling_auto

from .auto_mimo_v2 import route_any_to_any, route_auto_processor
from .cache_mimo_v2 import HybridCache
from .configuration_mimo_v2 import FLASH_MODEL_TYPE, MiMoV2Config
from .modeling_mimo_v2 import MiMoV2ForCausalLM, MiMoV2Model
from .quantization_mimo_v2 import MiMoV2FP8Config
from .shipped_mimo_v2 import micro


AutoConfig.register(MiMoV2Config.model_type, MiMoV2Config, exist_ok=True)
# V2-Flash is the same decoder; Transformers' own class for it has no SDPA and no bounded cache
CONFIG_MAPPING.register(FLASH_MODEL_TYPE, MiMoV2Config, exist_ok=True)
AutoModel.register(MiMoV2Config, MiMoV2Model, exist_ok=True)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MiMoV2Config, MiMoV2ForCausalLM, exist_ok=True)
# `register` leaves out the tables of names, by which Trainer, TRL and Transformers' server know what a class is
for _names in (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
):
    _names[MiMoV2Config.model_type] = MiMoV2ForCausalLM.__name__
route_auto_processor()
route_any_to_any()


__all__ = [
    "HybridCache",
    "MiMoV2Config",
    "MiMoV2FP8Config",
    "MiMoV2ForCausalLM",
    "MiMoV2Model",
    "__version__",
    "micro",
]
