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
"""Stacked experts in the formats of bitsandbytes, which itself knows linear layers alone.

Imported by quantization_bnb_mimo_v2.py when a model is quantized: importing bitsandbytes takes a second and may log.
"""

import functools

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers.core_model_loading import WeightConverter

from .configuration_mimo_v2 import MiMoV2Config
from .modeling_mimo_v2_text import MiMoV2Experts
from .quantization_mimo_v2 import CodedExpertsMixin, MiMoV2FP8Experts
from .saved_bnb_mimo_v2 import BLOCK, NESTED_BLOCK


@functools.cache
def _nested_code(device: torch.device) -> torch.Tensor:
    """[256] float32: the values of quantized scales."""
    return bnb.functional.create_dynamic_map().to(device)


class MiMoV2BnbExperts(CodedExpertsMixin, MiMoV2Experts):
    """Experts whose codes and scales are stacked, so that no block of scales reaches from one expert to the next.

    Subclasses say what is `stored` of a matrix, as suffix -> (shape, dtype) per expert, and how to `quantize` one and
    give it back in floats as `expert_weight`; `project` lets gradients through to hidden states alone.
    """

    def __init__(self, config: MiMoV2Config, quantization_config):
        super().__init__(config)
        self.quantization_config = quantization_config
        self.shapes = {name: tuple(parameter.shape[1:]) for name, parameter in self.named_parameters()}
        for name, shape in self.shapes.items():
            for suffix, (stored_shape, dtype) in self.stored(*shape).items():
                stacked = torch.empty(self.num_experts, *stored_shape, dtype=dtype)
                setattr(self, name + suffix, nn.Parameter(stacked, requires_grad=False))

    def parts(self, name: str, expert: int) -> dict[str, torch.Tensor]:
        """suffix -> what is stored of one expert's matrix."""
        return {suffix: getattr(self, name + suffix)[expert] for suffix in self.stored(*self.shapes[name])}

    # as in MiMoV2FP8Experts
    forward = MiMoV2Experts.forward.__wrapped__


class MiMoV2Bnb4bitExperts(MiMoV2BnbExperts):
    """NF4 or FP4 codes, two to a byte, with a scale per 64 weights: 4.5 bits per weight, 4.13 with double quant."""

    def stored(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = -(-rows * columns // BLOCK)
        codes = {"": ((-(-rows * columns // 2),), torch.uint8)}
        if not self.quantization_config.bnb_4bit_use_double_quant:
            return codes | {"_absmax": ((blocks,), torch.float32)}
        return codes | {
            "_absmax": ((blocks,), torch.uint8),
            "_nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32),
            "_offset": ((), torch.float32),
        }

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        settings = self.quantization_config
        codes, state = bnb.functional.quantize_4bit(
            weight,
            blocksize=BLOCK,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_type=settings.bnb_4bit_quant_type,
        )
        parts = {"": codes.flatten(), "_absmax": state.absmax}
        if state.nested:
            parts |= {"_nested_absmax": state.state2.absmax, "_offset": state.offset}
        return parts

    def _state(self, name: str, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> QuantState:
        quant_type, device = self.quantization_config.bnb_4bit_quant_type, parts[""].device
        nested = None
        if "_offset" in parts:
            code = _nested_code(device)
            nested = QuantState(parts["_nested_absmax"], code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        return QuantState(
            parts["_absmax"],
            shape=torch.Size(self.shapes[name]),
            code=bnb.functional.get_4bit_type(quant_type, device=device),
            blocksize=BLOCK,
            quant_type=quant_type,
            dtype=dtype,
            offset=parts.get("_offset"),
            state2=nested,
        )

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        parts = self.parts(name, expert)
        return bnb.functional.dequantize_4bit(parts[""][:, None], self._state(name, parts, dtype))

    def project(self, name: str, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        # as Linear4bit does: its fused kernels where there are any, and a backward pass that dequantizes once more
        dtype, parts = self.quantization_config.bnb_4bit_compute_dtype, self.parts(name, expert)
        state = self._state(name, parts, dtype)
        return bnb.matmul_4bit(hidden_states.to(dtype), parts[""][:, None], state).to(hidden_states.dtype)


class MiMoV2Bnb8bitExperts(MiMoV2BnbExperts):
    """Int8 codes with a scale per row. Activations stay floats, other than in LLM.int8() linear layers."""

    def stored(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"": ((rows, columns), torch.int8), "_SCB": ((rows,), torch.float32)}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"": codes, "_SCB": scale}

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        parts = self.parts(name, expert)
        return bnb.functional.int8_vectorwise_dequant(parts[""], parts["_SCB"]).to(dtype)

    # gradients go through to hidden states, and int8 rows are dequantized once more for them
    project = MiMoV2FP8Experts.project


class ExpertConverter(WeightConverter):
    """Per-expert tensors -> stacked codes and scales, read and quantized one expert after the other.

    Transformers' own conversion would hold a layer's experts as floats twice over: 17 GB in V2.5.
    """

    __slots__ = ()

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        experts = model.get_submodule(layer_name.rpartition(".")[0])
        if not isinstance(experts, MiMoV2BnbExperts):
            # left out by `llm_int8_skip_modules`
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        name = layer_name.rpartition(".")[2]
        readers = [self.collected_tensors.pop(pattern) for pattern in self.source_patterns]
        stacked = {}
        for expert, parts in enumerate(zip(*readers, strict=True)):
            weights = [read() for read in parts]
            for suffix, part in experts.quantize(torch.cat(weights)).items():
                if expert == 0:
                    meta = getattr(experts, name + suffix)
                    stacked[suffix] = torch.empty(meta.shape, dtype=meta.dtype, device=part.device)
                stacked[suffix][expert] = part
        return {layer_name + suffix: nn.Parameter(part, requires_grad=False) for suffix, part in stacked.items()}


__all__ = ["ExpertConverter", "MiMoV2Bnb4bitExperts", "MiMoV2Bnb8bitExperts", "MiMoV2BnbExperts"]
