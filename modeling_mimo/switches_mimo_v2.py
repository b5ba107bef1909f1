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
"""Which implementations of attention, experts and casts this model takes: equal numbers, or a refusal by name."""

import torch


# kernels whose signature takes sinks; any other would drop them without a word
SINK_KERNELS = ["flash_attention_4", "kernels-community/vllm-flash-attn3"]
ATTENTION_CHOICES = ("sdpa", "eager", *SINK_KERNELS)

# experts functions of Transformers that are kernels of a CUDA device
CUDA_EXPERTS = ("deepgemm", "deepgemm_megamoe", "sonicmoe")


class MiMoV2SwitchesMixin:
    """`attn_implementation`, `experts_implementation` and dtype casts of every MiMo-V2 model."""

    # the decode step in a static cache (tests/test_compile.py)
    _can_compile_fullgraph = True
    # quantizers set it on the model
    is_quantized = False
    # its kernels know neither sinks nor values narrower than keys
    _supports_context_parallel = False

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        if attn_implementation is not None and attn_implementation not in ATTENTION_CHOICES:
            raise ValueError(
                f"`attn_implementation`: expected one of {list(ATTENTION_CHOICES)}, got {attn_implementation!r}, "
                "which would drop the attention sinks of the sliding layers."
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks for the decorator in the source of the model's file; it is in modeling_mimo_v2_text.py
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if requested_experts in CUDA_EXPERTS and not torch.cuda.is_available():
            raise ValueError(
                f"`experts_implementation`: expected 'eager', 'grouped_mm' or 'batched_mm' without a CUDA device, got "
                f"{requested_experts!r}."
            )
        # the sorted loop of MiMoV2Experts is faster than grouped_mm on a CPU (docs/benchmarks.md)
        if requested_experts is None and not torch.cuda.is_available():
            requested_experts = "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def check_cast(self) -> None:
        """Raises a `ValueError` for a quantized model: its codes, and the scales beside them, would be rounded."""
        if self.is_quantized:
            raise ValueError(
                "dtype: expected a quantized model to stay as it is; `from_pretrained(..., dtype=...)` decides what "
                "it computes in."
            )

    def to(self, *args, **kwargs):
        """As in Transformers; a quantized model moves, and is not cast."""
        if any(isinstance(value, torch.dtype) for value in (*args, kwargs.get("dtype"))):
            self.check_cast()
        return super().to(*args, **kwargs)

    def half(self):
        self.check_cast()
        return super().half()

    def float(self):
        self.check_cast()
        return super().float()

    def bfloat16(self):
        self.check_cast()
        return super().bfloat16()

    def double(self):
        self.check_cast()
        return super().double()
