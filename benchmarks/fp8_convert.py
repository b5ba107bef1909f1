"""Speed of the weight formats that conversion reads and writes, as ratios measured side by side.

    python benchmarks/fp8_convert.py --repeats 9

FP8 and MXFP4 to bfloat16 against PyTorch's own cast of the same bytes, which knows no scales. bfloat16 to FP8 against
the bare tensor arithmetic: largest magnitude of each tile, division by its scale, clamp and cast, over steps of the
same size with buffers that are made once, and without any look at the values. Every way allocates its result.
"""

import sys
from collections.abc import Callable

import torch
from common import Bar, finish, interleaved, parse, parser

from modeling_mimo.conversion import fp8
from modeling_mimo.conversion.fp8 import BLOCK, LARGEST_CODE, dequantize_blocks, quantize_blocks
from modeling_mimo.conversion.mxfp4 import MXFP4_GROUP, dequantize_mxfp4, quantize_mxfp4


CASES = {"experts": (8, 2048, 4096), "qkv": (14848, 4096)}
QUICK = {"experts": (2, 512, 1024), "qkv": (1024, 1024)}

CAST = "float8 to bfloat16, PyTorch's cast"
DEQUANTIZE = "FP8 to bfloat16"
BARE = "bfloat16 to FP8, bare arithmetic"
QUANTIZE = "bfloat16 to FP8"
DEQUANTIZE_MXFP4 = "MXFP4 to bfloat16"
QUANTIZE_MXFP4 = "bfloat16 to MXFP4"


def bare_arithmetic(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What no block quantizer can leave out; rows and columns of `weight` are multiples of the block."""
    rows = weight.flatten(0, -2)
    height = max(1, fp8._STEP // (BLOCK * rows.shape[1])) * BLOCK
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(len(rows) // BLOCK, rows.shape[1] // BLOCK)
    values, magnitudes = torch.empty(2, height, rows.shape[1])
    for start in range(0, len(rows), height):
        part = rows[start : start + height]
        values.copy_(part)
        torch.abs(values, out=magnitudes)
        tiles = magnitudes.view(-1, BLOCK, scale.shape[1], BLOCK)
        grid = tiles.amax((1, 3)).div_(LARGEST_CODE)
        scale[start // BLOCK : (start + height) // BLOCK] = grid
        values.view(tiles.shape).div_(grid[:, None, :, None]).clamp_(-LARGEST_CODE, LARGEST_CODE)
        codes[start : start + height].copy_(values)
    return codes, scale


def random_weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def lost(shape: tuple[int, ...]) -> dict[str, float]:
    """What is lost of a weight on its way to a format and back, relative; of FP8 by the bare arithmetic, too."""
    weight = random_weight(shape)
    ways = {
        "FP8": dequantize_blocks(*quantize_blocks(weight)),
        "bare FP8": dequantize_blocks(
            *(part.view(*shape[:-2], -1, part.shape[-1]) for part in bare_arithmetic(weight))
        ),
        "MXFP4": dequantize_mxfp4(*quantize_mxfp4(weight)),
    }
    return {name: ((back - weight).float().norm() / weight.float().norm()).item() for name, back in ways.items()}


def ways(shape: tuple[int, ...]) -> dict[str, tuple[Callable[[], object], int, str]]:
    """name -> (what is measured, bytes of quantized weight, the way it is compared with)."""
    weight = random_weight(shape)
    codes, scale = quantize_blocks(weight)
    packed, exponents = quantize_mxfp4(weight)
    # as many bytes as the MXFP4 weight
    half = codes.flatten()[: packed.numel()]
    return {
        CAST: (lambda: codes.to(torch.bfloat16), codes.numel(), CAST),
        DEQUANTIZE: (lambda: dequantize_blocks(codes, scale), codes.numel(), CAST),
        f"{CAST}, half": (lambda: half.to(torch.bfloat16), half.numel(), f"{CAST}, half"),
        DEQUANTIZE_MXFP4: (lambda: dequantize_mxfp4(packed, exponents), packed.numel(), f"{CAST}, half"),
        BARE: (lambda: bare_arithmetic(weight), codes.numel(), BARE),
        QUANTIZE: (lambda: quantize_blocks(weight), codes.numel(), BARE),
        QUANTIZE_MXFP4: (lambda: quantize_mxfp4(weight), packed.numel(), None),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Conversion of FP8 and MXFP4 weights against bare tensor operations.", "fp8_convert.py --quick")
    options = parse(options, arguments, repeats=7)
    rows, ratios, losses = [], {}, []
    for case, shape in (QUICK if options.quick else CASES).items():
        measured = ways(shape)
        losses.append(lost(shape))
        times = interleaved({name: function for name, (function, _, _) in measured.items()}, options.repeats)
        for name, (_, size, other) in measured.items():
            ratio = None if other is None else times[other] / times[name]
            rows.append([f"{case} {' x '.join(map(str, shape))}", name, size / times[name] / 1e9, ratio])
            ratios.setdefault(name, []).append(ratio)
    setting = (
        f"Gigabytes of quantized weight per second; FP8 in {BLOCK} x {BLOCK} blocks, MXFP4 in groups of "
        f"{MXFP4_GROUP}; median of {options.repeats}."
    )
    most = {name: max(loss[name] for loss in losses) for name in losses[0]}
    bars = [
        # 3 bits of mantissa round by at most 1/16, by half of that in the mean; FP4 has one
        Bar("FP8 and back, relative loss", most["FP8"], 0.03, at_least=False),
        Bar(
            "FP8 and back, loss over that of the bare arithmetic", most["FP8"] / most["bare FP8"], 1.01, at_least=False
        ),
        Bar("MXFP4 and back, relative loss", most["MXFP4"], 0.15, at_least=False),
    ]
    bars += [
        Bar(f"{name}, against {what}", None if options.quick else min(ratios[name]), limit)
        for name, what, limit in (
            (DEQUANTIZE, "PyTorch's cast of the same bytes", 2.0),
            (QUANTIZE, "the bare arithmetic", 0.8),
            (DEQUANTIZE_MXFP4, "PyTorch's cast of the same bytes", 1.0),
        )
    ]
    return finish(options.json, setting, ["case", "way", "GB/s", "ratio to its bound"], rows, bars)


if __name__ == "__main__":
    sys.exit(main())
