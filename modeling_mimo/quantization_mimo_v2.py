"""FP8 checkpoints: dequantized while loading, kept as FP8 and dequantized at use, or handed to Hopper's FP8 kernels.

Transformers' own FP8 quantizer cannot read these files (its blocks are counted over the whole tensor, not per QKV
chunk) and always dequantizes off CUDA; its linear and expert kernels are used as they are where the GPU has FP8.

The MXFP4 experts of V2.6 are dequantized while loading, or kept packed and dequantized at use. Transformers' MXFP4
quantizer is not used: it knows the transposed tensors of GPT-OSS alone, and its experts need Triton kernels.
"""

import functools

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.utils import is_dtensor
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import FineGrainedFP8Config

from .configuration_mimo_v2 import QUANT_METHOD, MiMoV2Config
from .fp8_mimo_v2 import dequantize_blocks, dequantize_chunks, frozen_linear, pad_chunks, unpad_chunks
from .modeling_mimo_v2_text import MiMoV2Attention, MiMoV2Experts
from .mxfp4_mimo_v2 import EXPONENT_NAN, dequantize_mxfp4
from .weight_mapping_mimo_v2 import FP8_BLOCK, MXFP4_GROUP, MXFP4_PER_BYTE, expert_conversions, weight_name


LINEAR_NAMES = ("qkv_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
BLOCK_SIZE = (FP8_BLOCK, FP8_BLOCK)


class MiMoV2FP8Config(FineGrainedFP8Config):
    """How to load a released FP8 checkpoint, or one with MXFP4 experts and everything else in FP8.

    Args:
        dequantize (`bool`, *optional*):
            `True`: weights become the model's dtype while loading. `False`: they stay FP8 (MXFP4) in memory and are
            dequantized at use, with exactly the same numbers; on Hopper and later GPUs Transformers' FP8 kernels run
            instead, which also quantize activations (MXFP4 experts are dequantized at use there too). `None`: `False`
            on Hopper and later, else `True`.
        released (`dict`):
            The entries of the checkpoint's own `quantization_config`, written again on save.

    ```python
    >>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=MiMoV2FP8Config(dequantize=False))
    ```
    """

    def __init__(self, dequantize: bool | None = None, **released):
        released.pop("quant_method", None)
        super().__init__(weight_block_size=tuple(released.get("weight_block_size", BLOCK_SIZE)))
        self.quant_method = QUANT_METHOD
        self.dequantize = dequantize
        self.released = released
        if self.weight_block_size != BLOCK_SIZE:
            raise ValueError(f"`weight_block_size`: expected {BLOCK_SIZE}, got {self.weight_block_size}.")
        # CODEPATH: V2.6 stores its experts as mxfp4, V2.5-Pro says nothing, every other release fp8
        store_dtype = released.get("store_dtype", "fp8")
        if store_dtype not in ("fp8", "mxfp4"):
            raise ValueError(f"`store_dtype`: expected 'fp8' or 'mxfp4', got {store_dtype!r}.")
        if (group := released.get("mxfp4_block_size", MXFP4_GROUP)) != MXFP4_GROUP:
            raise ValueError(f"`mxfp4_block_size`: expected {MXFP4_GROUP}, got {group!r}.")
        self.mxfp4_experts = store_dtype == "mxfp4"

    def to_dict(self):
        return {**self.released, "quant_method": self.quant_method}

    def get_loading_attributes(self):
        return {"dequantize": self.dequantize}


class MiMoV2FP8Linear(nn.Module):
    """A linear layer whose weight stays FP8 with the scale grid of the files; dequantized at use.

    Args:
        chunks: row groups the scale blocks are counted in; the last block of a group may be partial.
    """

    # Transformers' tensor parallelism runs it on this rank's share, as its own FP8 layers
    _hf_quantized_needs_local_tp = True

    def __init__(self, in_features: int, out_features: int, chunks: int = 1):
        super().__init__()
        self.in_features, self.out_features, self.chunks = in_features, out_features, chunks
        scale_rows = chunks * -(-out_features // chunks // FP8_BLOCK)
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        scale = torch.empty(scale_rows, -(-in_features // FP8_BLOCK), dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # tensor parallelism leaves a rank whole chunks
        chunks = max(1, self.chunks * self.weight.shape[0] // self.out_features)
        stored = (self.weight, self.weight_scale_inv, chunks)
        return frozen_linear(hidden_states, functools.partial(dequantize_chunks, *stored, hidden_states.dtype))


class CodedExpertsMixin:
    """For stacked experts whose parameters are codes: refuses PEFT's own `target_parameters`.

    PEFT would add its product to the codes as if they were weights, and on integers train nothing without a word.
    """

    # set by adapters that work on hidden states instead, those of `modeling_mimo.training.lora_config`
    takes_adapters = False

    @property
    def is_transposed(self) -> bool:
        """Asked by whoever takes the stacked matrices for floats, as PEFT does before it adds a product.

        Raises:
            ValueError: unless the adapters know codes.
        """
        if not self.takes_adapters:
            raise ValueError(
                "`target_parameters`: expected none on experts whose parameters are codes; make the LoraConfig with "
                "modeling_mimo.training.lora_config, which adapts them."
            )
        return False

    @is_transposed.setter
    def is_transposed(self, value: bool) -> None:
        """Transformers' decorator sets it; there is nothing to keep."""


class MiMoV2FP8Experts(CodedExpertsMixin, MiMoV2Experts):
    """Stacked experts that stay FP8; each hit expert is dequantized when it runs."""

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        for name in ("gate_up_proj", "down_proj"):
            experts, rows, columns = getattr(self, name).shape
            # gate and up are two row groups with a scale grid each
            chunks = 2 if name == "gate_up_proj" else 1
            scale_rows = chunks * -(-rows // chunks // FP8_BLOCK)
            weight = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn)
            scale = torch.empty(experts, scale_rows, -(-columns // FP8_BLOCK), dtype=torch.float32)
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
            setattr(self, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        chunks = 2 if name == "gate_up_proj" else 1
        return dequantize_chunks(
            getattr(self, name)[expert], getattr(self, f"{name}_scale_inv")[expert], chunks, dtype
        )

    def project(self, name: str, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = functools.partial(self.expert_weight, name, expert, hidden_states.dtype)
        return frozen_linear(hidden_states, weight)

    # the interchangeable experts functions of Transformers read the weights themselves: only the eager form knows FP8
    forward = MiMoV2Experts.forward.__wrapped__


class MiMoV2MXFP4Experts(CodedExpertsMixin, MiMoV2Experts):
    """Stacked experts that stay MXFP4, 4.25 bits per weight; each hit expert is dequantized when it runs."""

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        for name in ("gate_up_proj", "down_proj"):
            experts, rows, columns = getattr(self, name).shape
            packed = torch.empty(experts, rows, columns // MXFP4_PER_BYTE, dtype=torch.uint8)
            scale = torch.empty(experts, rows, columns // MXFP4_GROUP, dtype=torch.uint8)
            setattr(self, name, nn.Parameter(packed, requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_mxfp4(getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert], dtype)

    # as in MiMoV2FP8Experts
    project = MiMoV2FP8Experts.project

    # as in MiMoV2FP8Experts
    forward = MiMoV2Experts.forward.__wrapped__


class Dequantize(ConversionOps):
    """`[weight, weight_scale_inv]` of one linear layer -> `weight` in the dtype of the model's parameter."""

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name=None, model=None, **kwargs):
        weight, scale = (_only(input_dict.get(pattern)) for pattern in source_patterns)
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        dtype = module.weight.dtype
        if scale is None:
            return {full_layer_name: weight.to(dtype)}
        return {full_layer_name: dequantize_chunks(weight, scale, _chunks(model, full_layer_name), dtype)}


class DequantizeExperts(ConversionOps):
    """Per-expert weights and scales -> one stacked tensor, written expert by expert into its final place."""

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name=None, model=None, **kwargs):
        weight_patterns = [pattern for pattern in source_patterns if weight_name(pattern) == pattern]
        target = model.get_parameter(full_layer_name)
        # a rank of a parallel model was handed its share of the experts, or of their rows
        target = target.to_local() if is_dtensor(target) else target
        stacked = torch.empty(target.shape, dtype=target.dtype, device=input_dict[weight_patterns[0]][0].device)
        for part, pattern in zip(stacked.chunk(len(weight_patterns), dim=1), weight_patterns):
            # CODEPATH: V2.6 has MXFP4 experts and their scales, every other release FP8
            scales = input_dict.pop(f"{pattern}_scale_inv", None) or input_dict.pop(f"{pattern}_scale", None)
            weights = input_dict.pop(pattern)
            for expert in range(len(stacked)):
                # dropping each source at once keeps the peak at one layer plus its FP8 codes
                weight, weights[expert] = weights[expert], None
                if scales is None:
                    part[expert].copy_(weight)
                elif weight.dtype == torch.uint8:
                    dequantize_mxfp4(weight, scales[expert], target.dtype, out=part[expert])
                else:
                    dequantize_blocks(weight, scales[expert], target.dtype, out=part[expert])
        return {full_layer_name: stacked}


class PadChunks(ConversionOps):
    """Fused QKV rows in FP8 -> each chunk padded to whole scale blocks, which makes the scale grid regular."""

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name=None, model=None, **kwargs):
        (tensor,) = (_only(tensors) for tensors in input_dict.values())
        chunks = _chunks(model, full_layer_name)
        # one chunk has a regular grid as it is
        if chunks == 1:
            return {target_patterns[0]: tensor}
        # tensor parallelism hands a rank its share of the chunks
        geometry = model.get_submodule(full_layer_name.rpartition(".qkv_proj")[0]).geometry
        return {target_patterns[0]: pad_chunks(tensor, chunks * tensor.shape[0] // sum(geometry.qkv_sizes))}

    @property
    def reverse_op(self):
        return UnpadChunks()


class UnpadChunks(ConversionOps):
    """Inverse of `PadChunks`."""

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name=None, model=None, **kwargs):
        (tensor,) = (_only(tensors) for tensors in input_dict.values())
        attention = model.get_submodule(full_layer_name.rpartition(".qkv_proj")[0])
        chunks = _chunks(model, full_layer_name)
        return {target_patterns[0]: unpad_chunks(tensor, chunks, sum(attention.geometry.qkv_sizes) // chunks)}

    @property
    def reverse_op(self):
        return PadChunks()


def _only(tensors):
    return tensors[0] if isinstance(tensors, list) else tensors


def _is_named(module: nn.Module, kind: type) -> bool:
    """By name: a model of a second copy of these files (Hub remote code) has classes of its own."""
    return type(module).__name__ == kind.__name__


def _chunks(model: nn.Module, name: str) -> int:
    """Row groups that the scale grid of the named projection is counted in; `name` may end with a tensor's name."""
    prefix, fused, _ = name.rpartition(".qkv_proj")
    if not fused:
        return 1
    attention = model.get_submodule(prefix)
    return attention.geometry.qkv_chunks if model.config.fused_qkv_layout != "plain" else 1


def check_scales(slices: dict) -> None:
    """Raises one `ValueError` naming every FP8 or MXFP4 scale tensor that is not finite and non-negative.

    `slices`: name -> lazy tensor of a checkpoint. A bad scale would spread NaN through one block of weights.
    """
    bad = []
    for name, part in slices.items():
        if weight_name(name) != name:
            scale = part[...]
            is_mxfp4 = scale.dtype == torch.uint8
            good = scale != EXPONENT_NAN if is_mxfp4 else scale.isfinite() & (scale >= 0)
            if not bool(good.all()):
                bad.append(name)
    if bad:
        listed = ", ".join(bad[:20]) + (f" and {len(bad) - 20} more" if len(bad) > 20 else "")
        raise ValueError(f"scales: expected finite, non-negative numbers, got others in {listed}.")


def has_fp8_kernels() -> bool:
    """Hopper or later: the compute capability that Transformers' FP8 matrix kernels are built for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


class MiMoV2FP8Quantizer(HfQuantizer):
    """Loads the released FP8 files; see `MiMoV2FP8Config` for the modes."""

    requires_calibration = True

    def validate_environment(self, *args, **kwargs):
        if self.quantization_config.dequantize is None:
            self.quantization_config.dequantize = not has_fp8_kernels()

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if dtype is None else dtype

    def get_new_dtype(self, converter, param, dtype):
        # converters see the codes and scales as they are on disk; everything else is cast like in any checkpoint
        return None if isinstance(converter, WeightConverter) else dtype

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.quantization_config.dequantize:
            return
        for name, module in list(model.named_modules()):
            # no release quantizes vision tower and audio encoder, whose projections have the same leaf names
            if name.startswith(("visual.", "audio_encoder.")):
                continue
            parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if _is_named(module, MiMoV2Experts):
                setattr(parent, leaf, self._quantized_experts(model.config))
            elif isinstance(module, nn.Linear) and leaf in LINEAR_NAMES:
                setattr(parent, leaf, self._fp8_linear(module.in_features, module.out_features, _chunks(model, name)))

    def _quantized_experts(self, config: MiMoV2Config) -> nn.Module:
        # CODEPATH: V2.6 has MXFP4 experts, every other release FP8
        if self.quantization_config.mxfp4_experts:
            return MiMoV2MXFP4Experts(config)
        aligned = config.moe_intermediate_size % FP8_BLOCK == 0
        return FP8Experts(config, BLOCK_SIZE) if has_fp8_kernels() and aligned else MiMoV2FP8Experts(config)

    def _fp8_linear(self, in_features: int, out_features: int, chunks: int) -> nn.Module:
        if not has_fp8_kernels():
            return MiMoV2FP8Linear(in_features, out_features, chunks)
        if chunks > 1:
            out_features = -(-out_features // chunks // FP8_BLOCK) * FP8_BLOCK * chunks
        linear = FP8Linear(in_features, out_features, BLOCK_SIZE)
        linear._hf_quantized_needs_local_tp = True
        return linear

    def update_parallel_plan(self, model, plan: dict[str, str]) -> None:
        # the scales of stacked experts are parameters of their own and are shared out like the weights
        params = {replace_layer_number_by_wildcard(name) for name, _ in model.named_parameters()}
        scales = {f"{name}{suffix}": style for name, style in plan.items() for suffix in ("_scale_inv", "_scale")}
        plan.update({name: style for name, style in scales.items() if name in params})

    def set_plain_layout(self, model) -> None:
        """The files turned out to hold plain `[Q; K; V]` rows: FP8 projections get the one regular scale grid."""
        model.config.fused_qkv_layout = "plain"
        if self.quantization_config.dequantize:
            return
        with torch.device("meta"):
            for module in model.modules():
                if _is_named(module, MiMoV2Attention):
                    rows = sum(module.geometry.qkv_sizes)
                    module.qkv_proj = self._fp8_linear(module.qkv_proj.in_features, rows, chunks=1)

    def update_weight_conversions(self, weight_conversions, model):
        """The FP8 form of the checkpoint's table; it takes the place of the plain expert conversions."""
        others = [entry for entry in weight_conversions if not isinstance(entry, WeightConverter)]
        if self.quantization_config.dequantize:
            experts = [
                WeightConverter(
                    [source + suffix for source in plain.source_patterns for suffix in ("", "_scale_inv", "_scale")],
                    plain.target_patterns,
                    [DequantizeExperts()],
                )
                for plain in expert_conversions()
            ]
            linears = [
                WeightConverter([f"{name}.weight", f"{name}.weight_scale_inv"], f"{name}.weight", [Dequantize()])
                for name in LINEAR_NAMES
            ]
            return others + experts + linears
        padded = [WeightConverter("qkv_proj.weight", "qkv_proj.weight", [PadChunks()])] if has_fp8_kernels() else []
        scales = expert_conversions("_scale" if self.quantization_config.mxfp4_experts else "_scale_inv")
        return others + expert_conversions() + scales + padded

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.quantization_config.dequantize:
            # saving then reverses the plain table: the loader's own reversal fails on dequantizing converters
            vars(model).pop("_weight_conversions", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # of adapters: gradients go through the frozen weights
        return True


# a second copy of this file (Hub remote code) finds the first one's registration and leaves it
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(MiMoV2FP8Config)
    register_quantizer(QUANT_METHOD)(MiMoV2FP8Quantizer)


__all__ = ["MiMoV2FP8Config", "MiMoV2FP8Quantizer"]
