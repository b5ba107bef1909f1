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
"""Adapter layers for PEFT: stacked experts of any storage, and linear layers that stay FP8."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import is_peft_available

from .modeling_mimo_v2_text import MiMoV2Experts
from .quantization_mimo_v2 import MiMoV2FP8Linear


# imported by whoever has PEFT; the condition is for copies on the Hub, whose imports Transformers would all ask for
if is_peft_available():
    from peft import LoraConfig, PeftConfig
    from peft.tuners.lora import layer as peft_layers


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class ParamWrapper(peft_layers.ParamWrapper):
    """LoRA on one of the stacked parameters of experts, applied to the hidden states of each expert that is hit.

    Names and shapes of the adapter are PEFT's: `lora_A` [experts * r, in], `lora_B` [out, experts * r]. PEFT adds the
    product to the weights of all experts in every forward, which needs floats and as much memory again as the layer.
    Experts run one by one, whatever `experts_implementation` says. PEFT knows its wrappers by the name of this class.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        # of what the parameter stands for: the stored one may be packed; PEFT swaps the two for stacked experts
        experts = self.get_base_layer()
        self.num_experts, self._param_ndim = experts.num_experts, 3
        experts.takes_adapters = True
        if self.parameter_name == "gate_up_proj":
            return 2 * experts.intermediate_dim, experts.hidden_dim
        return experts.hidden_dim, experts.intermediate_dim

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        check_mergeable(self.get_param())
        super().merge(safe_merge, adapter_names)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self._check_forward_args(hidden_states, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(hidden_states, *args, **kwargs)
        experts = self.get_base_layer()
        if type(experts).run_expert is not MiMoV2Experts.run_expert:
            raise NotImplementedError("LoRA on experts: expected experts in memory, got offloaded ones.")
        outer = vars(experts).get("project")
        experts.project = self._adapted(experts.project, adapters)
        try:
            if self.base_layer is not experts:
                return self.base_layer(hidden_states, *args, **kwargs)
            # the interchangeable experts functions of Transformers read the weights themselves
            return MiMoV2Experts.forward.__wrapped__(experts, hidden_states, *args, **kwargs)
        finally:
            if outer is None:
                del experts.project
            else:
                experts.project = outer

    def _adapted(self, project, adapters: list[str]):
        """`project` of the experts, with what the adapters add to products with this parameter."""
        factors = []
        for adapter in adapters:
            down = self.lora_A[adapter].weight.unflatten(0, (self.num_experts, -1))
            up = self.lora_B[adapter].weight.unflatten(1, (-1, self.num_experts))
            factors.append((down, up, self.scaling[adapter]))

        def adapted(name: str, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
            output = project(name, expert, hidden_states)
            if name == self.parameter_name:
                for down, up, scaling in factors:
                    low = F.linear(hidden_states.to(down.dtype), down[expert])
                    output = output + (F.linear(low, up[..., expert]) * scaling).to(output.dtype)
            return output

        return adapted

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        move_adapter(self, adapter_name, self.get_param())


class FrozenLinearLora(peft_layers.Linear):
    """LoRA beside a linear layer that stays FP8."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        check_mergeable(self.get_base_layer().weight)
        super().merge(safe_merge, adapter_names)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        move_adapter(self, adapter_name, self.get_base_layer().weight)


def move_adapter(layer: peft_layers.LoraLayer, adapter_name: str, weight: torch.Tensor) -> None:
    """To the device of `weight`, and to its dtype if it computes in it: PEFT would round adapters to FP8."""
    for modules in (layer.lora_A, layer.lora_B):
        if weight.device.type != "meta":
            modules[adapter_name].to(weight.device, weight.dtype if weight.dtype in FLOATS else None)


def check_mergeable(weight: torch.Tensor) -> None:
    """Raises a `ValueError` for weights that a product cannot be added to."""
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"merge: expected floating-point weights, got {weight.dtype}; load_adapter on a base in bfloat16 (of FP8 "
            "files: MiMoV2FP8Config(dequantize=True)) and merge there."
        )


def with_own_layers(config: "PeftConfig") -> "PeftConfig":
    """`config`, by which LoRA takes the layers of this file; other kinds of adapters keep PEFT's."""
    if isinstance(config, LoraConfig):
        # what PEFT offers for layers of one's own; it is not part of the saved config
        config._register_custom_module({MiMoV2Experts: ParamWrapper, MiMoV2FP8Linear: FrozenLinearLora})
    return config


__all__ = ["FrozenLinearLora", "ParamWrapper", "with_own_layers"]
