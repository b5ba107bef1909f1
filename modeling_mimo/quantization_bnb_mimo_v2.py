# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""bitsandbytes: 4 and 8 bits for linear layers and for the stacked experts, which are 97 % of the weights.

Transformers' quantizers replace linear layers alone, and refuse a checkpoint that is stored in FP8. Here a
`BitsAndBytesConfig` becomes one of a quantizer of this family, and quantized files are read as floats, one matrix at
a time. Saved folders have stacked experts and a method name of their own, so that nothing else takes them for its own.
"""

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from .configuration_mimo_v2 import BNB_METHODS, QUANT_METHOD
from .lazy_weights_mimo_v2 import LazyWeight
from .modeling_mimo_v2_text import MiMoV2Experts
from .quantization_mimo_v2 import MiMoV2FP8Quantizer
from .saved_bnb_mimo_v2 import check_quant_states
from .weight_mapping_mimo_v2 import ReleasedTensor, weight_name


# always as they are: heads and embeddings, the other modalities, and a projection that the FP8 releases leave in bf16
KEPT_MODULES = ["lm_head", "visual", "speech_embeddings", "audio_encoder", "eh_proj"]

# arguments of `from_pretrained` that say where a checkpoint is, and those that a config must not take for its own
PLACE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
MODEL_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "experts_implementation")


class MiMoV2BitsAndBytesConfig(BitsAndBytesConfig):
    """A `BitsAndBytesConfig` of this family's quantizer; `from_pretrained` makes it of a plain one.

    Raises:
        ValueError: a setting that stacked experts do not have.
    """

    def __init__(self, quant_method: str | None = None, **settings):
        for bits, method in BNB_METHODS.items():
            if quant_method == method:
                settings[f"load_in_{bits}bit"] = True
        super().__init__(**settings)
        if not self.is_quantizable():
            raise ValueError("`quantization_config`: expected load_in_4bit=True or load_in_8bit=True, got neither.")
        self.quant_method = BNB_METHODS[self.bits]
        for name, value, expected in (
            ("bnb_4bit_quant_type", self.bnb_4bit_quant_type, ("nf4", "fp4")),
            ("bnb_4bit_quant_storage", self.bnb_4bit_quant_storage, (torch.uint8,)),
            ("llm_int8_has_fp16_weight", self.llm_int8_has_fp16_weight, (False,)),
        ):
            if value not in expected:
                raise ValueError(f"`{name}`: expected {' or '.join(map(repr, expected))}, got {value!r}.")

    @property
    def bits(self) -> int:
        return 4 if self.load_in_4bit else 8

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # by these keys Transformers would choose its own quantizer
        for name in ("_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit"):
            del output[name]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class MiMoV2BnbQuantizerMixin:
    """What the 4-bit and the 8-bit quantizer of Transformers lack for this family."""

    def validate_environment(self, *args, device_map=None, **kwargs):
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "`device_map`: expected no module on disk with bitsandbytes, which quantizes into memory, got 'disk'; "
                "released FP8 and MXFP4 files can stay on disk without it."
            )
        super().validate_environment(*args, device_map=device_map, **kwargs)

    def update_attn_implementation(self, config):
        # the one hook that sees what was asked for before it is resolved
        experts = config._experts_implementation
        if experts not in (None, "eager"):
            raise ValueError(
                f"`experts_implementation`: expected 'eager' with bitsandbytes, got {experts!r}, which reads the "
                "experts as floats; load in bf16 or FP8 for it."
            )
        config._experts_implementation = "eager"
        if vars(config).get("distributed_config") is not None:
            raise ValueError(
                "`distributed_config`: expected none with bitsandbytes, whose blocks do not follow the ranks' shares; "
                "load the FP8 or bf16 weights for parallelism, or spread a quantized model with `device_map`."
            )
        return super().update_attn_implementation(config)

    @staticmethod
    def get_modules_to_not_convert(model, skip_modules=None, keep_in_fp32_modules=None, add_default_skips=False):
        return [*KEPT_MODULES, *(skip_modules or []), *(keep_in_fp32_modules or [])]

    def preprocess_model(self, model, **kwargs):
        super().preprocess_model(model, **kwargs)
        # by this name Transformers, PEFT and accelerate know what such a model can do
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES

    def _process_model_before_weight_loading(self, model, device_map=None, **kwargs):
        from .experts_bnb_mimo_v2 import MiMoV2Bnb4bitExperts, MiMoV2Bnb8bitExperts

        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        kind = MiMoV2Bnb4bitExperts if self.quantization_config.load_in_4bit else MiMoV2Bnb8bitExperts
        for name, module in list(model.named_modules()):
            if type(module).__name__ == MiMoV2Experts.__name__ and should_convert_module(
                name, self.modules_to_not_convert
            ):
                model.set_submodule(name, kind(model.config, self.quantization_config))
            elif type(module).__name__ == "Linear4bit":
                # on a CPU with AVX-512 the first forward would repack the weights for good: with scales rounded to
                # bf16, without gradients, in a form that is saved wrongly, and not for rows that 32 does not divide
                module.support_avx512bf16_for_cpu = False

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        from .experts_bnb_mimo_v2 import MiMoV2BnbExperts

        module, name = get_module_from_name(model, param_name)
        if isinstance(module, MiMoV2BnbExperts):
            return name in module.shapes
        return super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        # the experts' parameters have their final shape and dtype already
        if param_name.rpartition(".")[0].endswith(".experts"):
            return param.element_size()
        return super().param_element_size(model, param_name, param)

    def get_new_dtype(self, converter, param, dtype):
        # codes and scales of a saved folder stay as they are, everything else follows the model's dtype
        return dtype if dtype is not None and dtype.is_floating_point else None

    def update_weight_conversions(self, weight_conversions, model):
        from .experts_bnb_mimo_v2 import ExpertConverter

        others = [entry for entry in weight_conversions if not isinstance(entry, WeightConverter)]
        if self.pre_quantized:
            return others + self.get_weight_conversions()
        converters = [entry for entry in weight_conversions if isinstance(entry, WeightConverter)]
        return others + [
            ExpertConverter(entry.source_patterns, entry.target_patterns, entry.operations) for entry in converters
        ]

    def _process_model_after_weight_loading(self, model, **kwargs):
        from .experts_bnb_mimo_v2 import MiMoV2BnbExperts

        super()._process_model_after_weight_loading(model, **kwargs)
        check_quant_states(model)
        for module in model.modules():
            if isinstance(module, MiMoV2BnbExperts):
                # the loader makes scales trainable, being floats
                module.requires_grad_(False)
        # codes are saved stacked, as they are
        model._weight_conversions = []
        return model

    def _dequantize(self, model, dtype=None):
        from .experts_bnb_mimo_v2 import MiMoV2BnbExperts

        model = super()._dequantize(model, dtype=dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, MiMoV2BnbExperts):
                with torch.device("meta"):
                    experts = MiMoV2Experts(model.config)
                for projection in module.shapes:
                    weights = [module.expert_weight(projection, expert, dtype) for expert in range(module.num_experts)]
                    setattr(experts, projection, nn.Parameter(torch.stack(weights)))
                model.set_submodule(name, experts.train(module.training))
        # saving reverses the released table again
        vars(model).pop("_weight_conversions", None)
        return model


class MiMoV2Bnb4BitQuantizer(MiMoV2BnbQuantizerMixin, Bnb4BitHfQuantizer):
    """NF4 and FP4."""


class MiMoV2Bnb8BitQuantizer(MiMoV2BnbQuantizerMixin, Bnb8BitHfQuantizer):
    """LLM.int8() in linear layers, int8 weights in experts."""

    def _process_model_after_weight_loading(self, model, **kwargs):
        # in bf16 every layer would say for every token that it quantizes activations from float16
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_new)
        return super()._process_model_after_weight_loading(model, **kwargs)


_logged: set[str] = set()


def _is_new(record: logging.LogRecord) -> bool:
    """A filter for messages that were logged before."""
    message = record.getMessage()
    is_new = message not in _logged
    _logged.add(message)
    return is_new


def choose_quantization(config_class: type, name_or_path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` in which `quantization_config` fits what the checkpoint is stored in.

    A `BitsAndBytesConfig` becomes this family's; an FP8 entry of the checkpoint gives way to another quantization, for
    which its files are read as floats.

    Raises:
        ValueError: another quantization for a checkpoint that bitsandbytes has quantized already; FP8 for one without.
    """
    wanted, config = kwargs["quantization_config"], kwargs.get("config")
    if isinstance(wanted, dict):
        wanted = AutoQuantizationConfig.from_dict(wanted)
    if isinstance(wanted, BitsAndBytesConfig):
        wanted = MiMoV2BitsAndBytesConfig(**wanted.to_dict())
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = _load_config(config_class, name_or_path, kwargs)
    config = copy.deepcopy(config)
    stored = vars(config).get("quantization_config") or {}
    if not isinstance(stored, dict):
        # the config of a model that was loaded before
        stored = config.quantization_config = stored.to_dict()
    method = stored.get("quant_method")
    if method in BNB_METHODS.values():
        _check_same(stored, wanted)
        config.quantization_config, wanted = wanted.to_dict(), None
    elif method is None and wanted.quant_method == QUANT_METHOD:
        raise ValueError(
            "`quantization_config`: expected FP8 files for MiMoV2FP8Config, got floats; `mimo convert --dtype fp8` "
            "writes such files, and BitsAndBytesConfig quantizes while loading."
        )
    elif method == QUANT_METHOD and wanted.quant_method != QUANT_METHOD:
        del config.quantization_config
    return {**kwargs, "config": config, "quantization_config": wanted}


def _load_config(config_class: type, name_or_path: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config as `PreTrainedModel.from_pretrained` would load it, and the arguments that it did not take."""
    place = {name: kwargs[name] for name in PLACE_ARGUMENTS if name in kwargs}
    held = {name: kwargs[name] for name in MODEL_ARGUMENTS if name in kwargs}
    source = kwargs.get("config") or name_or_path
    rest = {name: value for name, value in kwargs.items() if name not in {*held, "config"}}
    config, rest = config_class.from_pretrained(source, return_unused_kwargs=True, **rest)
    return config, {**rest, **place, **held}


def _check_same(stored: dict[str, Any], wanted: Any) -> None:
    known, asked = MiMoV2BitsAndBytesConfig(**stored).to_dict(), wanted.to_dict()
    # how to compute is no matter of the files
    known["bnb_4bit_compute_dtype"] = asked.get("bnb_4bit_compute_dtype")
    if known != asked:
        got = ", ".join(f"{name}={asked[name]!r}" for name in asked if asked[name] != known.get(name))
        raise ValueError(
            f"`quantization_config`: expected none or the same for a checkpoint of bitsandbytes, got {got}; "
            "another quantization starts from the checkpoint it was made of."
        )


def float_weights(slices: dict[str, Any], table: dict[str, ReleasedTensor], dtype: torch.dtype) -> dict[str, Any]:
    """FP8 and MXFP4 tensors of the files as lazy tensors of `dtype`, without their scales; others as they are.

    Args:
        slices: name -> lazy tensor of the files, scales included.
        table: name -> entry of `released_tensors`, with the row order of the files.
    """
    scales = {weight_name(name): part for name, part in slices.items() if weight_name(name) != name}
    return {
        name: LazyWeight(part, scales[name], table[name], dtype) if name in scales else part
        for name, part in slices.items()
        if weight_name(name) == name
    }


def check_saveable(quantizer: Any) -> None:
    """Raises a `ValueError` for a quantization whose saved folders `from_pretrained` would not read."""
    if quantizer is not None and not isinstance(quantizer, (MiMoV2FP8Quantizer, MiMoV2BnbQuantizerMixin)):
        method = quantizer.quantization_config.quant_method
        method = getattr(method, "value", method)
        raise ValueError(
            f"`save_pretrained`: expected FP8, bitsandbytes or no quantization, got {method!r}, "
            "which could not be read again; quantize while loading, or save a model of bitsandbytes."
        )


def is_saved_quantized(quantizer: Any) -> bool:
    """Whether a checkpoint is one that a bitsandbytes model of this family was saved to."""
    return isinstance(quantizer, MiMoV2BnbQuantizerMixin) and quantizer.pre_quantized


for _bits, _quantizer in ((4, MiMoV2Bnb4BitQuantizer), (8, MiMoV2Bnb8BitQuantizer)):
    # as in quantization_mimo_v2.py
    if BNB_METHODS[_bits] not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(BNB_METHODS[_bits])(MiMoV2BitsAndBytesConfig)
        register_quantizer(BNB_METHODS[_bits])(_quantizer)


__all__ = [
    "MiMoV2BitsAndBytesConfig",
    "check_saveable",
    "choose_quantization",
    "float_weights",
    "is_saved_quantized",
]
