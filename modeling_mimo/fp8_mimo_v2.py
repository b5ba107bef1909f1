"""Block-scaled FP8 weights to ordinary floats, bit for bit, fast on a CPU.

The released MiMo-V2 checkpoints store most linear weights as `float8_e4m3fn` codes with one float32 scale per
128 x 128 block (`<name>.weight_scale_inv`). The value of a weight is

    (weight.to(float32) * scale[row // 128, col // 128]).to(dtype)

and every function here returns exactly these bits. Tensors in, tensors out: nothing here knows a file or a name.

Why not write the formula down and be done: PyTorch casts float8 on a CPU one element at a time. The fast way makes
the same numbers from integer operations that are vectorised:

    e4m3 code              s eeee mmm
    the same bits as fp16  s 0eeee mmm0000000      = value / 256, exact for every finite code, subnormals included

fp16 to fp32 is one instruction, which no denormal setting affects, and the missing factor 256 is a power of two,
so it goes into the scale without rounding: (value / 256) * (256 * scale) rounds as value * scale does.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F


BLOCK = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements per step. On a CPU the scratch of one step (6 bytes per element) stays in the last-level cache and one
# operation still outweighs waking the threads; elsewhere a step only bounds the memory of the float32 intermediate.
_STEP_CPU = 2**20
_STEP_OTHER = 2**26

# Below 2**-117 the smallest code (2**-9) times the scale is a float32 denormal, above 2**120 the factor 256 overflows.
# Such scales take the plain formula, so no denormal ever meets the fast path, whatever set_flush_denormal says.
_SMALLEST_SCALE = 2.0**-117
_LARGEST_SCALE = 2.0**119


def scale_shape(rows: int, cols: int, block: int = BLOCK) -> tuple[int, int]:
    """Shape of the scale grid of a [rows, cols] weight: (ceil(rows / block), ceil(cols / block))."""
    return math.ceil(rows / block), math.ceil(cols / block)


@torch.no_grad()
def dequantize_blocks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    block: int = BLOCK,
) -> torch.Tensor:
    """`(weight.to(float32) * scale[..., row // block, col // block]).to(dtype)`, bit for bit.

    weight: [..., rows, cols] float8_e4m3fn; rows and cols need not be multiples of `block`.
    scale:  [..., ceil(rows / block), ceil(cols / block)] float32, any value.
    dtype:  float32, bfloat16 or float16.
    out:    a tensor of weight's shape and device and of `dtype`, written and returned; allocated when None. Memory
            that was in use before is filled about twice as fast as new memory.

    A CPU tensor takes the fast way; a step with a NaN code in it, or a scale outside [2**-117, 2**119] in magnitude
    (zero is fine), takes the plain formula. Tensors on other devices always take the plain formula.
    With `torch.set_flush_denormal(True)` the result is what the formula gives under the same setting.

    ValueError: wrong dtype of weight, scale, or result; a scale or `out` of the wrong shape.
    """
    _check_blocks(weight, scale, dtype, out, block)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel() == 0:
        return out
    step = _STEP_CPU if weight.device.type == "cpu" else _STEP_OTHER
    fast = weight.device.type == "cpu" and _scales_are_ordinary(scale)
    scratch = _Scratch()
    for codes, grid, part in _steps(weight, scale, out, block, step):
        if fast and not _has_nan_code(codes):
            _dequantize_fast(codes, grid, part, block, scratch)
        else:
            _dequantize_plain(codes, grid, part, block)
    return out


def dequantize_chunks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    chunks: int,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    block: int = BLOCK,
) -> torch.Tensor:
    """Dequantize a weight whose scale grid starts anew at each of `chunks` equal row groups.

    This is the released fused `qkv_proj`: block row b of chunk c is scale row c * ceil(rows_per_chunk / block) + b,
    and the last block of a chunk may cover fewer than `block` rows (MiMo-V2.5 global layers: 4 chunks of 3392 rows,
    27 scale rows each, the last one over 64 rows).

    weight: [..., rows, cols] float8_e4m3fn, rows divisible by `chunks`.
    scale:  [..., chunks * ceil(rows / chunks / block), ceil(cols / block)] float32.
    Returns [..., rows, cols] in `dtype`, rows in the same order. ValueError as `dequantize_blocks`.
    """
    rows_per_chunk = _rows_per_chunk(weight, chunks)
    block_rows, block_cols = scale_shape(rows_per_chunk, weight.shape[-1], block)
    expected = (*weight.shape[:-2], chunks * block_rows, block_cols)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale of a weight {list(weight.shape)} in {chunks} chunks of {rows_per_chunk} rows: "
            f"got {list(scale.shape)}, expected {list(expected)}"
        )
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _check_out(weight, dtype, out)
    dequantize_blocks(
        weight.unflatten(-2, (chunks, rows_per_chunk)),
        scale.unflatten(-2, (chunks, block_rows)),
        dtype,
        out.unflatten(-2, (chunks, rows_per_chunk)),
        block,
    )
    return out


def pad_chunks(weight: torch.Tensor, chunks: int, block: int = BLOCK) -> torch.Tensor:
    """Zero rows after each of `chunks` equal row groups, up to a multiple of `block`.

    [..., rows, cols] -> [..., chunks * ceil(rows / chunks / block) * block, cols]; 3392 rows per chunk become 3456.
    The scales tiled per chunk are then the one regular grid of the padded weight, which stock FP8 kernels take.
    A weight that needs no padding is returned as it is. ValueError: rows not divisible by `chunks`.
    """
    rows_per_chunk = _rows_per_chunk(weight, chunks)
    padded = math.ceil(rows_per_chunk / block) * block
    if padded == rows_per_chunk:
        return weight
    *lead, _, cols = weight.shape
    result = weight.new_zeros(*lead, chunks, padded, cols)
    result[..., :rows_per_chunk, :] = weight.unflatten(-2, (chunks, rows_per_chunk))
    return result.flatten(-3, -2)


def unpad_chunks(weight: torch.Tensor, chunks: int, rows_per_chunk: int) -> torch.Tensor:
    """Inverse of `pad_chunks`: keep the first `rows_per_chunk` rows of each of `chunks` equal row groups.

    [..., chunks * padded, cols] -> [..., chunks * rows_per_chunk, cols].
    ValueError: rows not divisible by `chunks`, or fewer than `rows_per_chunk` rows in a group.
    """
    padded = _rows_per_chunk(weight, chunks)
    if padded < rows_per_chunk:
        raise ValueError(
            f"weight {list(weight.shape)} has {padded} rows in each of {chunks} chunks, "
            f"expected at least rows_per_chunk = {rows_per_chunk}"
        )
    if padded == rows_per_chunk:
        return weight
    return weight.unflatten(-2, (chunks, padded))[..., :rows_per_chunk, :].flatten(-3, -2)


def _rows_per_chunk(weight: torch.Tensor, chunks: int) -> int:
    if weight.dim() < 2 or chunks < 1 or weight.shape[-2] % chunks:
        raise ValueError(
            f"weight {list(weight.shape)}: expected [..., rows, cols] with rows divisible by {chunks} chunks"
        )
    return weight.shape[-2] // chunks


def _check_blocks(weight, scale, dtype, out, block) -> None:
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [..., rows, cols]")
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight {list(weight.shape)} has dtype {weight.dtype}, expected torch.float8_e4m3fn")
    if scale.dtype != torch.float32:
        raise ValueError(f"scale of weight {list(weight.shape)} has dtype {scale.dtype}, expected torch.float32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
    expected = (*weight.shape[:-2], *scale_shape(*weight.shape[-2:], block))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale of weight {list(weight.shape)} with {block} x {block} blocks: "
            f"got {list(scale.shape)}, expected {list(expected)}"
        )
    if out is not None:
        _check_out(weight, dtype, out)


def _check_out(weight: torch.Tensor, dtype: torch.dtype, out: torch.Tensor) -> None:
    if out.shape != weight.shape or out.dtype != dtype or out.device != weight.device:
        raise ValueError(
            f"out is {list(out.shape)} {out.dtype} on {out.device}, "
            f"expected {list(weight.shape)} {dtype} on {weight.device}"
        )


def _scales_are_ordinary(scale: torch.Tensor) -> bool:
    """True when every scale is zero or its magnitude is within the fast path's range (NaN and infinity are not)."""
    # Compared as integers: float bits order like their magnitudes, and no denormal setting reads them as zero.
    bits = scale.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF)
    low, high = torch.tensor([_SMALLEST_SCALE, _LARGEST_SCALE], device="cpu").view(torch.int32).tolist()
    return bool((((bits >= low) & (bits <= high)) | (bits == 0)).all())


def _steps(weight, scale, out, block: int, elements: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """2-D pieces (codes, their scales, their part of out) of about `elements` elements each.

    A piece is some whole row blocks or rows of one block. Stacked matrices are cut as one when no block crosses
    their border.
    """
    if weight.dim() > 2:
        merge = weight.shape[-2] % block == 0 and all(t.is_contiguous() for t in (weight, scale, out))
        parts = [[t.flatten(0, -2) for t in (weight, scale, out)]] if merge else zip(weight, scale, out)
        for part in parts:
            yield from _steps(*part, block, elements)
        return
    rows, cols = weight.shape
    height = max(1, elements // cols)
    start = 0
    while start < rows:
        first = start // block
        # Up to the end of this row block, or over as many further whole ones as the step holds.
        stop = min(start + height, (first + max(1, height // block)) * block, rows)
        if stop - start > block:
            stop -= stop % block
        yield weight[start:stop], scale[first : math.ceil(stop / block)], out[start:stop]
        start = stop


class _Scratch:
    """Buffers for the intermediates of one call, kept from step to step: fresh pages cost more than the arithmetic."""

    def __init__(self):
        self.codes = torch.empty(0, dtype=torch.int16, device="cpu")
        self.values = torch.empty(0, dtype=torch.float32, device="cpu")

    def take(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """(int16, float32) contiguous buffers of `shape`, valid until the next take."""
        count = shape.numel()
        if self.codes.numel() < count:
            self.codes = torch.empty(count, dtype=torch.int16, device="cpu")
            self.values = torch.empty(count, dtype=torch.float32, device="cpu")
        return self.codes[:count].view(shape), self.values[:count].view(shape)


def _has_nan_code(codes: torch.Tensor) -> bool:
    """0x7f is the largest int8 and 0xff the largest uint8; both maxima are vectorised, a comparison is not."""
    return codes.view(torch.int8).amax().item() == 0x7F or codes.view(torch.uint8).amax().item() == 0xFF


def _dequantize_fast(codes, grid, out, block, scratch) -> None:
    """codes [n * block or fewer, cols], grid [n, ceil(cols / block)] -> out; no NaN code, ordinary scales."""
    bits, values = scratch.take(codes.shape)
    bits.copy_(codes.view(torch.int8))
    # Sign extension leaves the sign in bits 15..7 of the int16; after the shift by 7 it is in 15 and 14. Clear 14.
    bits.mul_(128).bitwise_and_(~0x4000)
    if out.dtype == torch.float32 and out.is_contiguous():
        values = out
    values.copy_(bits.view(torch.float16))
    values.view(len(grid), -1, codes.shape[1]).mul_(_scale_rows(grid * 256, codes.shape[1], block))
    if values is not out:
        out.copy_(values)


def _dequantize_plain(codes, grid, out, block) -> None:
    """The formula as it stands in the module's docstring; shapes as `_dequantize_fast`, any device, any value."""
    values = codes.to(torch.float32).view(len(grid), -1, codes.shape[1])
    out.copy_(values.mul_(_scale_rows(grid, codes.shape[1], block)).view(codes.shape))


def _scale_rows(grid: torch.Tensor, cols: int, block: int) -> torch.Tensor:
    """[n, ceil(cols / block)] -> [n, 1, cols]: the factor of each column, to broadcast over a block's rows."""
    return grid.repeat_interleave(block, dim=-1)[:, None, :cols]


def frozen_linear(hidden_states: torch.Tensor, dequantize: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`F.linear` with a frozen weight [out, in], which `dequantize` makes and the backward pass makes once more.

    Kept for the backward pass instead, the floats of all layers would need as much memory as a dequantized model.
    """
    if hidden_states.requires_grad:
        return _FrozenLinear.apply(hidden_states, dequantize)
    return F.linear(hidden_states, dequantize())


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, dequantize: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.dequantize = dequantize
        return F.linear(hidden_states, dequantize())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.dequantize(), None
