"""Speed of block-scaled FP8 dequantization, as ratios to PyTorch's own cast measured side by side.

    python benchmarks/fp8_dequantize.py --repeats 7

Rates are gigabytes of FP8 weight per second (one byte per weight), medians of interleaved repetitions. "new" writes
into memory that the operation allocates, "out" into memory that was written before: a fresh page costs the operating
system about as much as its share of the arithmetic, and every way pays it alike.
"""

import sys
from collections.abc import Callable

import torch
from common import Bar, finish, interleaved, parse, parser

from modeling_mimo.fp8_mimo_v2 import BLOCK, dequantize_blocks, scale_shape


CAST, OURS, REFERENCE = "PyTorch cast, no scales", "dequantize_blocks", "reference formula, out"
CASES = {"experts": (16, 2048, 4096), "qkv": (13568, 4096)}
QUICK = {"experts": (2, 256, 512), "qkv": (848, 256)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def naive(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The reference formula with the scales spread to the weight's shape."""
    rows, cols = weight.shape[-2:]
    spread = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :cols]
    values = weight.to(torch.float32) * spread
    return out.copy_(values)


def ways(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """What is measured, by name, on one random weight of `shape`."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 60).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], *scale_shape(*shape[-2:]), generator=generator) * 1e-3
    out = torch.zeros(shape, dtype=dtype)
    other = torch.zeros(shape, dtype=dtype)
    return {
        CAST + ", new": lambda: weight.to(dtype),
        CAST + ", out": lambda: out.copy_(weight),
        REFERENCE: lambda: naive(weight, scale, out),
        OURS + ", new": lambda: dequantize_blocks(weight, scale, dtype),
        OURS + ", out": lambda: dequantize_blocks(weight, scale, dtype, out=out),
        f"bound: copy of {torch.finfo(dtype).dtype}, out": lambda: other.copy_(out),
        f"bound: fill of {torch.finfo(dtype).dtype}, new": lambda: torch.empty(shape, dtype=dtype).zero_(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("FP8 dequantization against PyTorch's own cast.", "fp8_dequantize.py --case qkv --repeats 5")
    options.add_argument("--case", choices=CASES, action="append", help="one shape only; may be given twice")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parse(options, arguments, repeats=7)
    shapes = QUICK if options.quick else CASES
    rows, largest = [], 0.0
    for case in options.case or CASES:
        functions = ways(shapes[case], DTYPES[options.dtype])
        exact = functions[REFERENCE]().clone()
        for way in ("new", "out"):
            apart = (functions[f"{OURS}, {way}"]().float() - exact.float()).abs().max().item()
            largest = max(largest, apart)
        times = interleaved(functions, options.repeats)
        for name, took in times.items():
            # compared with the cast that allocates as this way does
            cast = times[f"{CAST}, {name[-3:]}"]
            size = torch.Size(shapes[case]).numel()
            rows.append([f"{case} {' x '.join(map(str, shapes[case]))}", name, size / took / 1e9, cast / took])
    setting = f"Gigabytes of FP8 weight per second, float8_e4m3fn to {options.dtype}; median of {options.repeats}."
    bars = [Bar("largest difference from the reference formula", largest, 0, at_least=False)]
    return finish(options.json, setting, ["case", "way", "GB/s", "against PyTorch's cast"], rows, bars)


if __name__ == "__main__":
    sys.exit(main())
