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
"""Folders that a model quantized with bitsandbytes was saved to: what must be in them, checked before it is read."""

import math
from collections.abc import Collection

import torch
from torch import nn

from .checkpoint_mimo_v2 import (
    FLOAT_DTYPES,
    MAX_LISTED,
    CheckpointError,
    CheckpointReport,
    PartTotals,
    TensorInfo,
    find_layout,
)
from .weight_mapping_mimo_v2 import released_tensors


# as bitsandbytes' linear layers have it by default: weights per scale, and scales per scale of their own
BLOCK, NESTED_BLOCK = 64, 256

DTYPE_NAMES = {torch.uint8: "U8", torch.int8: "I8"}
# shape, or None where it may be any, and dtypes in the spelling of safetensors
Expected = tuple[list[int] | None, tuple[str, ...]]


def _linear_tensors(name: str, linear: nn.Module) -> dict[str, Expected]:
    """What bitsandbytes saves of one linear layer, whose parameters have not been read yet."""
    weight, count = f"{name}.weight", linear.in_features * linear.out_features
    if type(linear).__name__ == "Linear8bitLt":
        shape = [linear.out_features, linear.in_features]
        return {
            weight: (shape, ("I8",)),
            f"{name}.SCB": (shape[:1], ("F32",)),
            f"{name}.weight_format": ([], ("U8",)),
        }
    blocks, nested = math.ceil(count / BLOCK), linear.weight.compress_statistics
    expected: dict[str, Expected] = {
        weight: ([math.ceil(count / 2), 1], ("U8",)),
        f"{weight}.absmax": ([blocks], ("U8" if nested else "F32",)),
        f"{weight}.quant_map": ([16], ("F32",)),
        f"{weight}.quant_state.bitsandbytes__{linear.weight.quant_type}": (None, ("U8",)),
    }
    if nested:
        expected[f"{weight}.nested_absmax"] = [math.ceil(blocks / NESTED_BLOCK)], ("F32",)
        expected[f"{weight}.nested_quant_map"] = [256], ("F32",)
    return expected


def _expected_tensors(model: nn.Module) -> dict[str, Expected]:
    expected: dict[str, Expected] = {}
    for name, tensor in model.state_dict().items():
        dtypes = (DTYPE_NAMES[tensor.dtype],) if tensor.dtype in DTYPE_NAMES else FLOAT_DTYPES
        expected[name] = list(tensor.shape), dtypes
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            expected |= _linear_tensors(name, module)
    return expected


def check_saved_tensors(
    model: nn.Module, tensors: dict[str, TensorInfo], left_out: Collection[str] = ()
) -> tuple[CheckpointReport, set[str]]:
    """`check_tensors` for a folder of a quantized model: headers against the modules of `model`, on the meta device.

    Returns:
        The report, and the names that `model` has a place for.

    Raises:
        ValueError: one error that lists everything missing, unknown, mis-shaped or of a wrong dtype.
    """
    # the backbone alone has no `model.` in its names and no place for the head
    prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    expected = {f"{prefix}{name}": value for name, value in _expected_tensors(model).items()}
    table = released_tensors(model.config)
    places = {
        **{name: spec.part for name, spec in table.items()},
        **{spec.target: spec.part for spec in table.values()},
    }
    parts = {name: _part_of(name, places) for name in tensors}
    elsewhere = {name for name, part in parts.items() if part in left_out or (part and not name.startswith(prefix))}
    wrong = [
        f"{name} ({shape} {'/'.join(dtypes)}, {list(tensors[name].shape)} {tensors[name].dtype})"
        for name, (shape, dtypes) in expected.items()
        if name in tensors and not (tensors[name].dtype in dtypes and shape in (None, list(tensors[name].shape)))
    ]
    problems = [
        f"{what} ({len(names)}): {', '.join(names[:MAX_LISTED])}"
        for what, names in (
            ("missing", [name for name in expected if name not in tensors]),
            ("unknown", [name for name in tensors if name not in expected and name not in elsewhere]),
            ("mis-shaped or of a wrong dtype (expected, got)", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(["the files do not match the config", *problems])
    totals = _sum_parts(parts, tensors)
    for spec in table.values():
        if spec.part in totals:
            totals[spec.part]["parameters"] += math.prod(spec.shape)
    not_loaded = {part: totals[part]["tensors"] for part in left_out if part in totals}
    layout, source = find_layout(model.config, {})
    method = model.config.quantization_config.quantization_method()
    report = CheckpointReport(layout, source, False, False, totals, not_loaded, f"bitsandbytes {method}")
    return report, set(tensors) - elsewhere


def _part_of(name: str, places: dict[str, str]) -> str | None:
    """Part of a tensor by the weight that it is, or is a statistic of; None for a name that no release has."""
    for suffix in ("", ".SCB", ".weight_format", "_absmax", "_nested_absmax", "_offset", "_SCB"):
        owner = name.removesuffix(suffix)
        for weight in (owner, f"{owner}.weight", f"{owner.partition('.weight.')[0]}.weight"):
            if weight in places:
                return places[weight]
    return None


def _sum_parts(parts: dict[str, str | None], tensors: dict[str, TensorInfo]) -> dict[str, PartTotals]:
    totals: dict[str, PartTotals] = {}
    for name, info in tensors.items():
        entry = totals.setdefault(parts[name], {"tensors": 0, "bytes": 0, "parameters": 0, "dtypes": {}})
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
        entry["dtypes"][info.dtype] = entry["dtypes"].get(info.dtype, 0) + 1
    return totals


def check_quant_states(model: nn.Module) -> None:
    """Raises a `ValueError` for a linear layer whose own description in the files is not that of the model.

    bitsandbytes takes shape and block size from there, and its kernels read as much memory as they say.
    """
    settings = model.config.quantization_config
    for name, linear in model.named_modules():
        if type(linear).__name__ != "Linear4bit":
            continue
        state = linear.weight.quant_state
        nested = state.state2.blocksize if state.nested else None
        got = [tuple(state.shape), state.quant_type, state.blocksize, nested]
        nested = NESTED_BLOCK if settings.bnb_4bit_use_double_quant else None
        expected = [(linear.out_features, linear.in_features), settings.bnb_4bit_quant_type, BLOCK, nested]
        if got != expected:
            raise ValueError(f"{name}.weight.quant_state: expected {expected}, got {got}.")


def scale_bytes(model: nn.Module) -> int:
    """Bytes of the scales and code tables that bitsandbytes' linear layers keep outside of parameters and buffers."""
    total = 0
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state.as_dict()
            total += sum(part.nbytes for part in state.values() if isinstance(part, torch.Tensor))
        elif type(module).__name__ == "Linear8bitLt":
            total += module.out_features * torch.float32.itemsize
    return total


__all__ = ["check_quant_states", "check_saved_tensors", "scale_bytes"]
