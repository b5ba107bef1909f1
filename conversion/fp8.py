"""Floats to block-scaled FP8 codes, and back (the way back lives in `modeling_mimo.fp8_mimo_v2`)."""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from modeling_mimo.fp8_mimo_v2 import (
    BLOCK,
    dequantize_blocks,
    dequantize_chunks,
    pad_chunks,
    scale_shape,
    unpad_chunks,
)


__all__ = [
    "BLOCK",
    "LARGEST_CODE",
    "dequantize_blocks",
    "dequantize_chunks",
    "pad_chunks",
    "quantize_blocks",
    "quantize_chunks",
    "scale_shape",
    "unpad_chunks",
]

# Largest finite float8_e4m3fn.
LARGEST_CODE = 448.0

# A smaller scale would make denormals of a block's smallest codes (2**-9 each); blocks below 3e-33 lose precision.
SMALLEST_SCALE = 2.0**-117

# Elements per step: the float32 scratch of 4 MB stays in the cache from one operation to the next.
_STEP = 2**20


@torch.no_grad()
def quantize_blocks(weight: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each block x block tile by its largest magnitude: scale = amax / 448, codes = weight / scale.

    weight: [..., rows, cols] floating point and finite. Returns (codes [..., rows, cols] float8_e4m3fn,
    scale [..., ceil(rows / block), ceil(cols / block)] float32). A block of zeros gets scale 1.

    The scale is rounded up to 20 significant bits. A code has 4, so code * scale is exact in float32, and
    quantizing a float32-dequantized weight gives the same codes and scales again, bit for bit.
    ValueError: not [..., rows, cols], not floating point, or a NaN or infinite value.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}, expected [..., rows, cols] floating point")
    *lead, rows, cols = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(*lead, *scale_shape(rows, cols, block), dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        return codes, scale
    width = min(cols, max(1, _STEP // block**2) * block)
    height = min(rows, max(1, _STEP // (block * width)) * block)
    scratch = torch.empty(height * width, dtype=torch.float32, device=weight.device)
    matrices = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (weight, codes, scale))
    for source, target, grid in zip(*matrices):
        for place, blocks in _pieces(rows, cols, height, width, block):
            _quantize_piece(source[place], target[place], grid[blocks], block, scratch)
    # one look at the end: what is not finite in the weight is not finite in the scale of its block
    if not torch.isfinite(scale).all():
        raise ValueError(f"weight {list(weight.shape)} has NaN or infinite values, expected finite ones")
    return codes, scale


def _pieces(rows: int, cols: int, height: int, width: int, block: int) -> Iterator[tuple[tuple[slice, slice], ...]]:
    """Where a piece of at most [height, width] lies in the weight and in the grid; a short last block is its own."""
    whole = rows - rows % block
    for top, bottom in pairwise((*range(0, whole, height), whole, rows)):
        for left in range(0, cols, width) if bottom > top else ():
            right = min(left + width, cols)
            blocks = [slice(start // block, -(-stop // block)) for start, stop in ((top, bottom), (left, right))]
            yield (slice(top, bottom), slice(left, right)), tuple(blocks)


def _quantize_piece(
    source: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, block: int, scratch: torch.Tensor
) -> None:
    """source [n * block or fewer, cols] -> codes of the same shape, scale [n, ceil(cols / block)]."""
    cols = source.shape[1]
    values = scratch[: source.numel()].view(len(scale), -1, cols)
    values.copy_(source.view(values.shape))
    # as fast as the largest magnitude, which would take a second buffer's share of the cache
    columns = torch.maximum(values.amax(dim=1), values.amin(dim=1).neg_())
    if cols % block:
        columns = F.pad(columns, (0, -cols % block))
    amax = columns.view(len(scale), -1, block).amax(dim=2)
    factors = (amax / LARGEST_CODE).clamp_(min=SMALLEST_SCALE)
    factors.view(torch.int32).add_(15).bitwise_and_(~15)
    scale.copy_(factors.masked_fill_(amax == 0, 1.0))
    # cheaper than repeat_interleave by several small operations
    spread = scale[..., None].expand(-1, -1, block).reshape(len(scale), 1, -1)[..., :cols]
    codes.copy_(values.div_(spread).clamp_(-LARGEST_CODE, LARGEST_CODE).view(codes.shape))


def quantize_chunks(weight: torch.Tensor, chunks: int, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_blocks` with a grid that starts anew at each of `chunks` equal row groups.

    weight: [..., rows, cols], rows divisible by `chunks`. Returns (codes [..., rows, cols],
    scale [..., chunks * ceil(rows / chunks / block), ceil(cols / block)]): the released fused `qkv_proj` layout.
    """
    if weight.dim() < 2 or chunks < 1 or weight.shape[-2] % chunks:
        raise ValueError(
            f"weight {list(weight.shape)}: expected [..., rows, cols] with rows divisible by {chunks} chunks"
        )
    codes, scale = quantize_blocks(weight.unflatten(-2, (chunks, -1)), block)
    return codes.flatten(-3, -2), scale.flatten(-3, -2)
