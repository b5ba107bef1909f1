"""Floats to MXFP4 codes, and back (the way back lives in `modeling_mimo.mxfp4_mimo_v2`)."""

import torch

from modeling_mimo.mxfp4_mimo_v2 import EXPONENT_BIAS, MXFP4_GROUP, MXFP4_VALUES, dequantize_mxfp4


__all__ = ["MXFP4_GROUP", "MXFP4_VALUES", "dequantize_mxfp4", "quantize_mxfp4"]

# 6 * 2**125 is the largest product that float32 and bfloat16 hold
_LARGEST_EXPONENT = 125 + EXPONENT_BIAS

# bits of 2**-129 as float32, a quarter of the smallest scale: it and all below become zero
_LARGEST_ZERO = 1 << 20

# values per step: the float32 intermediates stay in the cache
_STEP = 2**18


@torch.no_grad()
def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups of 32 columns to e2m1 codes (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) and one exponent.

    weight: [..., rows, cols] floating point and finite, cols divisible by 32. Returns (packed [..., rows, cols / 2]
    uint8 with the even column in the low nibble, scale [..., rows, cols / 32] uint8 with bias 127). A group of zeros
    gets exponent 127, that is 1.

    The exponent is the smallest one at which the largest magnitude still rounds to 6 or less, i.e. lies below 7:
    floor(log2(amax)) - 2 with amax rounded to e2m1's two bits first. The OCP MX specification 1.0 (section 6.3) takes
    floor(log2(amax)) - 2 of amax as it is, which differs only for 7 <= amax / 2**exponent < 8: there it saturates to
    6, an error of up to a quarter, while here the next exponent keeps it within half a step. (torchao calls the
    two rules FLOOR and EVEN.) Under both the largest code of a group is 4 or 6, which makes the exponent a function of
    the dequantized values: quantizing them again gives the same bytes.

    Codes are rounded to nearest, ties to the even code. ValueError: not floating point, cols not divisible by 32, or
    a NaN or infinite value.
    """
    if weight.dim() < 1 or not weight.is_floating_point() or weight.shape[-1] % MXFP4_GROUP:
        raise ValueError(
            f"weight: expected floating point [..., cols] with cols divisible by 32, "
            f"got {list(weight.shape)} {weight.dtype}"
        )
    *lead, cols = weight.shape
    packed = torch.empty(*lead, cols // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(*lead, cols // MXFP4_GROUP, dtype=torch.uint8, device=weight.device)
    step = _STEP // MXFP4_GROUP
    for part, codes, exponents in zip(
        weight.reshape(-1, MXFP4_GROUP).split(step),
        packed.view(-1, MXFP4_GROUP // 2).split(step),
        scale.view(-1).split(step),
    ):
        values = part.to(torch.float32, copy=True)
        amax = values.abs().amax(dim=1)
        if not amax.isfinite().all():
            raise ValueError(f"weight {list(weight.shape)}: expected finite values, got NaN or infinite ones")
        shared = _shared_exponents(amax)
        exponents.copy_(shared + EXPONENT_BIAS)
        pairs = _codes(values.mul_(torch.exp2(-shared.float())[:, None])).view(torch.int16)
        # a pair is the even code and, eight bits higher, the odd one; the copy keeps the low byte
        codes.copy_(pairs.bitwise_or_(pairs >> 4))
    return packed, scale


def _shared_exponents(amax: torch.Tensor) -> torch.Tensor:
    """[n] float32, finite -> [n] int32 without bias: see `quantize_mxfp4`."""
    # compared as integers: float bits order like their values, and no denormal setting reads them as zero
    bits = amax.view(torch.int32)
    # 2**21 is half a step of a mantissa of one bit: the sum carries into the exponent from 1.75 on
    exponents = (((bits + (1 << 21)) >> 23) - 2).clamp_(0, _LARGEST_EXPONENT) - EXPONENT_BIAS
    return torch.where(bits <= _LARGEST_ZERO, 0, exponents)


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    """Values in units of the group's scale -> e2m1 codes 0 to 15, uint8."""
    magnitude = scaled.abs()
    # codes step by 0.5 up to 2, by 1 up to 4, by 2 up to 6, and an even integer here is an even code
    codes = (magnitude * 2).round_()
    torch.minimum(codes, magnitude.round().add_(2), out=codes)
    torch.minimum(codes, magnitude.div_(2).round_().add_(4), out=codes)
    signs = scaled.view(torch.int32).bitwise_right_shift(28).bitwise_and_(8)
    return codes.clamp_(max=7).to(torch.int32).bitwise_or_(signs).to(torch.uint8)
