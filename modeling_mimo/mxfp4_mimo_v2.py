"""MXFP4 weights to ordinary floats, exactly, fast on a CPU.

The routed experts of MiMo-V2.6 are stored as e2m1 codes, two per byte, the low nibble being the even column, with one
e8m0 exponent per 32 columns (`<name>.weight_scale`, bias 127). The value of a weight is

    (e2m1 value * 2 ** (exponent - 127)).to(dtype),    exponent 255 is NaN

and the product is exact in float32. Tensors in, tensors out: nothing here knows a file or a name.

PyTorch has no e2m1 cast, and a table of the 256 bytes costs an index per byte. The fast way makes both values of a
byte from integer operations that are vectorised, as `fp8_mimo_v2` does:

    e2m1 code              s ee m
    the same bits as fp16  s 000ee m000000000      = value / 2**14, exact for every code, subnormals included

The missing factor 2**14 is a power of two and goes into the scale.
"""

import torch


# columns that share one exponent
MXFP4_GROUP = 32
MXFP4_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# e2m1 values by code; the codes 8 to 15 are their negatives
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

EXPONENT_BIAS = 127
EXPONENT_NAN = 255

# values per step, as in `fp8_mimo_v2`: the scratch (6 bytes per value) stays in the last-level cache of a CPU
_STEP_CPU = 2**20
_STEP_OTHER = 2**26

# 2**14 * 2**(exponent - 127) is a float32 up to here
_LARGEST_FAST_EXPONENT = 2 * EXPONENT_BIAS - 14


@torch.no_grad()
def dequantize_mxfp4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(e2m1 value * 2 ** (scale - 127)).to(dtype)`, exact; bfloat16 and float32 hold every product below 2**128.

    packed: [..., rows, cols / 2] uint8, the low nibble of a byte is the even column.
    scale:  [..., rows, cols / 32] uint8 exponents; 255 makes its 32 values NaN.
    dtype:  float32, bfloat16 or float16.
    out:    a contiguous tensor [..., rows, cols] of `dtype`, written and returned; allocated when None.

    ValueError: wrong dtype of packed, scale or result; a scale or `out` of the wrong shape.
    """
    _check(packed, scale, dtype, out)
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    if packed.numel() == 0:
        return out
    fast = scale.amax().item() <= _LARGEST_FAST_EXPONENT
    factors = _factors(fast, packed.device)
    step = (_STEP_CPU if packed.device.type == "cpu" else _STEP_OTHER) // MXFP4_GROUP
    pieces = zip(
        packed.reshape(-1, MXFP4_GROUP // 2).split(step),
        scale.reshape(-1).split(step),
        out.view(-1, MXFP4_GROUP).split(step),
    )
    scratch = None
    for codes, exponents, part in pieces:
        if scratch is None:
            scratch = (
                torch.empty(codes.shape, dtype=torch.int32, device=packed.device),
                torch.empty(codes.shape, dtype=torch.int32, device=packed.device),
                torch.empty(part.shape, dtype=torch.float32, device=packed.device),
            )
        values = _unpack(codes, *(buffer[: len(codes)] for buffer in scratch))
        if not fast:
            values.mul_(2.0**14)
        target = part if dtype == torch.float32 else values
        torch.mul(values, factors[exponents.int()][:, None], out=target)
        if target is not part:
            part.copy_(values)
    return out


def _unpack(codes: torch.Tensor, bits: torch.Tensor, signs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Bytes [n, 16] -> values [n, 32] / 2**14 in `values`; `bits` and `signs` [n, 16] int32 are scratch.

    The two halves of an int32 are the two values of a byte `SEEM seem`: multiplying by two powers of two puts a copy
    of the byte where its low nibble is in place for the low half and one where its high nibble is for the high half.
    """
    signs.copy_(codes)
    torch.mul(signs, (1 << 9) + (1 << 21), out=bits).bitwise_and_(0x0E000E00)
    signs.mul_((1 << 12) + (1 << 24)).bitwise_and_(-0x7FFF8000)
    return values.copy_(bits.bitwise_or_(signs).view(torch.float16))


def _factors(fast: bool, device: torch.device) -> torch.Tensor:
    """[256] float32: what the values of `_unpack` are multiplied by, times 2**14 in the fast way."""
    exponents = torch.arange(256, dtype=torch.float64, device=device) - EXPONENT_BIAS + (14 if fast else 0)
    # beyond the range of float32 only where no exponent asks for it
    factors = torch.exp2(exponents).float()
    factors[EXPONENT_NAN] = torch.nan
    return factors


def _check(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> None:
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ValueError(f"packed, scale: expected torch.uint8, got {packed.dtype} and {scale.dtype}")
    if dtype not in MXFP4_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, MXFP4_DTYPES))}, got {dtype}")
    if packed.dim() < 1 or packed.shape[-1] % (MXFP4_GROUP // 2):
        raise ValueError(f"packed: expected [..., cols / 2] with cols divisible by 32, got {list(packed.shape)}")
    groups = (*packed.shape[:-1], packed.shape[-1] // (MXFP4_GROUP // 2))
    if tuple(scale.shape) != groups:
        raise ValueError(f"scale of packed {list(packed.shape)}: expected {list(groups)}, got {list(scale.shape)}")
    if out is not None:
        shape = (*packed.shape[:-1], 2 * packed.shape[-1])
        if tuple(out.shape) != shape or out.dtype != dtype or out.device != packed.device or not out.is_contiguous():
            raise ValueError(
                f"out: expected contiguous {list(shape)} {dtype} on {packed.device}, "
                f"got {list(out.shape)} {out.dtype} on {out.device}"
            )


__all__ = ["MXFP4_GROUP", "MXFP4_VALUES", "dequantize_mxfp4"]
