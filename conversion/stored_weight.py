"""How files hold one weight (dtype, scales, row groups), and what changes when it is stored in another way.

Tensors in, tensors out; the names are those of the files.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from .fp8 import BLOCK, dequantize_chunks, quantize_blocks, scale_shape
from .mxfp4 import MXFP4_GROUP, dequantize_mxfp4, quantize_mxfp4
from .row_reader import TORCH_DTYPES
from .shard_writer import Planned


FP8, MXFP4 = "F8_E4M3", "U8"
QUANTIZED = (FP8, MXFP4)

# values that are quantized or compared at once: 33 MB as float32
_STEP = 2**23


class StoredWeight(NamedTuple):
    """One weight in a file.

    `shape` counts values: an MXFP4 weight has half as many bytes in a row. `dtype` is spelled as in the header, U8
    meaning MXFP4. `chunks`: row groups in which an FP8 scale grid is counted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: int = 1

    def tensors(self) -> dict[str, Planned]:
        """The weight, and its scales if it has some, by name."""
        if self.dtype == FP8:
            rows, columns = self.shape
            block_rows, block_columns = scale_shape(rows // self.chunks, columns)
            scale = Planned("F32", (self.chunks * block_rows, block_columns))
            return {self.name: Planned(FP8, self.shape), f"{self.name}_scale_inv": scale}
        if self.dtype == MXFP4:
            rows, columns = self.shape
            scale = Planned("U8", (rows, columns // MXFP4_GROUP))
            return {self.name: Planned("U8", (rows, columns // 2)), f"{self.name}_scale": scale}
        return {self.name: Planned(self.dtype, self.shape)}

    def load(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The values in `dtype`, as loading the checkpoint in `dtype` gives them.

        ValueError: an FP8 scale that is not finite and non-negative.
        """
        if self.dtype == FP8:
            scale = tensors[f"{self.name}_scale_inv"]
            if not bool((scale.isfinite() & (scale >= 0)).all()):
                raise ValueError(f"{self.name}_scale_inv: expected finite, non-negative scales, got others.")
            return dequantize_chunks(tensors[self.name], scale, self.chunks, dtype)
        if self.dtype == MXFP4:
            return dequantize_mxfp4(tensors[self.name], tensors[f"{self.name}_scale"], dtype)
        return tensors[self.name].to(dtype)

    def store(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`values` in the form of this weight, scales included. ValueError: values that this form cannot hold."""
        if self.dtype == FP8:
            # a slab at a time bounds the float32 intermediates; chunk borders start a new grid
            slabs = [slab for chunk in values.chunk(self.chunks) for slab in _slabs(chunk)]
            codes, scales = zip(*(self._quantized(quantize_blocks, slab) for slab in slabs))
            return {self.name: torch.cat(codes), f"{self.name}_scale_inv": torch.cat(scales)}
        if self.dtype == MXFP4:
            codes, scale = self._quantized(quantize_mxfp4, values)
            return {self.name: codes, f"{self.name}_scale": scale}
        result = values.to(TORCH_DTYPES[self.dtype])
        if self.dtype == "F16" and not bool(result.isfinite().all()):
            raise ValueError(f"{self.name}: expected values that float16 holds, got larger ones; bf16 holds them.")
        return {self.name: result}

    def _quantized(self, quantize: Callable, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return quantize(values)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


class Difference(NamedTuple):
    """Requantization error over some weights: differences, and the magnitudes of the values before."""

    tensors: int = 0
    largest_difference: float = 0.0
    largest_magnitude: float = 0.0
    sum_difference: float = 0.0
    sum_magnitude: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.tensors + other.tensors,
            max(self.largest_difference, other.largest_difference),
            max(self.largest_magnitude, other.largest_magnitude),
            self.sum_difference + other.sum_difference,
            self.sum_magnitude + other.sum_magnitude,
        )

    def to_dict(self) -> dict[str, float | int]:
        """`max_relative`: largest difference over largest magnitude; `mean_relative`: mean over mean."""
        return {
            "tensors": self.tensors,
            "max_relative": self.largest_difference / (self.largest_magnitude or 1.0),
            "mean_relative": self.sum_difference / (self.sum_magnitude or 1.0),
        }


def difference(before: torch.Tensor, after: torch.Tensor) -> Difference:
    """`Difference` of two float32 tensors of one shape, as of one weight."""
    total = Difference()
    for old, new in zip(_slabs(before), _slabs(after)):
        error, size = (new - old).abs(), old.abs()
        sums = (part.sum(dtype=torch.float64).item() for part in (error, size))
        total += Difference(0, error.max().item(), size.max().item(), *sums)
    return total._replace(tensors=1)


def _slabs(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pieces of whole rows, as many as whole FP8 blocks have."""
    columns = max(1, values.numel() // len(values))
    return values.split(max(1, _STEP // columns // BLOCK) * BLOCK)


__all__ = ["FP8", "MXFP4", "QUANTIZED", "Difference", "StoredWeight", "difference"]
