"""Floats to block-scaled FP8 codes, and back (the way back lives in `modeling_mimo.fp8_mimo_v2`)."""

import torch

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
    block_rows, block_cols = scale_shape(rows, cols, block)
    tiles = weight.new_zeros(*lead, block_rows * block, block_cols * block, dtype=torch.float32)
    tiles[..., :rows, :cols] = weight
    tiles = tiles.unflatten(-1, (block_cols, block)).unflatten(-3, (block_rows, block))
    amax = tiles.abs().amax((-3, -1))
    if not torch.isfinite(amax).all():
        raise ValueError(f"weight {list(weight.shape)} has NaN or infinite values, expected finite ones")
    bits = (amax / LARGEST_CODE).clamp_(min=SMALLEST_SCALE).view(torch.int32)
    scale = torch.where(amax == 0, 1.0, ((bits + 15) & ~15).view(torch.float32))
    codes = (tiles / scale[..., :, None, :, None]).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
    return codes.flatten(-4, -3).flatten(-2, -1)[..., :rows, :cols].contiguous(), scale


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
