"""Quantized weights of a checkpoint that read as floats, whichever rectangle of them is asked for.

A rank of a parallel model reads its rows or columns of a weight, and Transformers hands conversions nothing else. The
edge of a share may lie inside a scale block, so scales are applied here, where the place of the share is known: the
blocks that it touches are read, dequantized, and cut to size. Where shares are whole blocks or whole QKV chunks, as in
every release, no byte is read in vain.
"""

from collections.abc import Collection
from typing import Any

import torch

from .fp8_mimo_v2 import dequantize_blocks
from .mxfp4_mimo_v2 import dequantize_mxfp4
from .weight_mapping_mimo_v2 import FP8_BLOCK, MXFP4_GROUP, MXFP4_PER_BYTE, ReleasedTensor, weight_name


class LazyWeight:
    """What `safetensors` calls a slice, of a quantized matrix and its scales: `part[a:b, c:d]` is in `dtype`.

    Args:
        weight, scale: lazy tensors of the files.
        spec: shape, and the row groups (`chunks`) that FP8 blocks are counted in.
    """

    def __init__(self, weight: Any, scale: Any, spec: ReleasedTensor, dtype: torch.dtype):
        self.weight, self.scale, self.spec, self.dtype = weight, scale, spec, dtype

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        index = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (2 - len(index)))
        (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(index, self.spec.shape))
        # CODEPATH: the experts of V2.6 are MXFP4, all other quantized weights of every release are FP8
        read = self._read_mxfp4 if self.weight.get_dtype() == "U8" else self._read_fp8
        return read(top, bottom, left, right)

    def _read_fp8(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        rows, columns = self.spec.shape[0] // self.spec.chunks, self.spec.shape[1]
        grid_rows = -(-rows // FP8_BLOCK)
        first_column, end_column = left // FP8_BLOCK, -(-right // FP8_BLOCK)
        column = first_column * FP8_BLOCK
        parts = []
        for chunk in range(top // rows, -(-bottom // rows)):
            start, stop = max(top - chunk * rows, 0), min(bottom - chunk * rows, rows)
            first, end = start // FP8_BLOCK, -(-stop // FP8_BLOCK)
            row, shift = first * FP8_BLOCK, chunk * rows
            codes = self.weight[
                shift + row : shift + min(end * FP8_BLOCK, rows), column : min(end_column * FP8_BLOCK, columns)
            ]
            grid = self.scale[chunk * grid_rows + first : chunk * grid_rows + end, first_column:end_column]
            values = dequantize_blocks(codes, grid, self.dtype)
            parts.append(values[start - row : stop - row, left - column : right - column])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_mxfp4(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        first, end = left // MXFP4_GROUP, -(-right // MXFP4_GROUP)
        per_group = MXFP4_GROUP // MXFP4_PER_BYTE
        codes = self.weight[top:bottom, first * per_group : end * per_group]
        values = dequantize_mxfp4(codes, self.scale[top:bottom, first:end], self.dtype)
        return values[:, left - first * MXFP4_GROUP : right - first * MXFP4_GROUP]


def lazy_weights(
    slices: dict[str, Any], table: dict[str, ReleasedTensor], parameters: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """`slices` for a model that shares its weights out among ranks: scales are kept only for the parameters that have
    a place for them, every other quantized weight reads as floats of its parameter's dtype.

    Args:
        slices: name -> lazy tensor of the files.
        table: name -> entry of `released_tensors`, with the row order of the files.
        parameters: the model's state dict.
    """
    scales = {weight_name(name): name for name in slices if weight_name(name) != name}
    reads = {}
    for name, part in slices.items():
        weight = weight_name(name)
        target = _target(table[weight].target, parameters)
        suffix = scales[weight].removeprefix(weight) if weight in scales else None
        if suffix is None or target + suffix in parameters:
            reads[name] = part
        elif name == weight:
            reads[name] = LazyWeight(part, slices[scales[name]], table[name], parameters[target].dtype)
    return reads


def _target(target: str, parameters: Collection[str]) -> str:
    """The backbone alone has no `model.` in its names."""
    return target if target in parameters else target.removeprefix("model.")


__all__ = ["LazyWeight", "lazy_weights"]
