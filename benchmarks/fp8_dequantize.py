"""Speed of block-scaled FP8 dequantization, as ratios to PyTorch's own cast measured side by side.

    python benchmarks/fp8_dequantize.py --repeats 7

Rates are gigabytes of FP8 weight per second (one byte per weight), medians of interleaved repetitions. "new" writes
into memory that the operation allocates, "out" into memory that was written before: a fresh page costs the operating
system about as much as its share of the arithmetic, and every way pays it alike.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_mimo.fp8_mimo_v2 import BLOCK, dequantize_blocks, scale_shape


CAST = "PyTorch cast, no scales"
CASES = {"experts": (16, 2048, 4096), "qkv": (13568, 4096)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def naive(weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The reference formula with the scales spread to the weight's shape."""
    rows, cols = weight.shape[-2:]
    spread = scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :cols]
    values = weight.to(torch.float32) * spread
    return out.copy_(values)


def ways(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Callable[[], object]]:
    """What is measured, by name, on one random weight of `shape`."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 60).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], *scale_shape(*shape[-2:]), generator=generator) * 1e-3
    out = torch.zeros(shape, dtype=dtype)
    other = torch.zeros(shape, dtype=dtype)
    return {
        CAST + ", new": lambda: weight.to(dtype),
        CAST + ", out": lambda: out.copy_(weight),
        "reference formula, out": lambda: naive(weight, scale, out),
        "dequantize_blocks, new": lambda: dequantize_blocks(weight, scale, dtype),
        "dequantize_blocks, out": lambda: dequantize_blocks(weight, scale, dtype, out=out),
        f"bound: copy of {torch.finfo(dtype).dtype}, out": lambda: other.copy_(out),
        f"bound: fill of {torch.finfo(dtype).dtype}, new": lambda: torch.empty(shape, dtype=dtype).zero_(),
    }


def measure(functions: dict[str, Callable[[], object]], repeats: int, label: str) -> dict[str, float]:
    """Median seconds of each function; one repetition runs all of them in turn, after one that does not count."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            if sys.stderr.isatty():
                print(f"\r{label}: {repeat}/{repeats} {name:40s}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    if sys.stderr.isatty():
        print("\r" + " " * 79 + "\r", end="", file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}


def processor() -> str:
    """The processor's name; Linux hides it from the platform module."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run(cases: dict[str, tuple[int, ...]], dtype: torch.dtype, repeats: int) -> dict:
    """All measurements and what they were taken on."""
    results = []
    for case, shape in cases.items():
        times = measure(ways(shape, dtype), repeats, case)
        gigabytes = torch.Size(shape).numel() / 1e9
        for name, seconds in times.items():
            # Compared with the cast that allocates as this way does.
            cast = times[f"{CAST}, {name[-3:]}"]
            results.append(
                {"case": case, "shape": shape, "way": name, "gb_per_s": gigabytes / seconds, "ratio": cast / seconds}
            )
    return {
        "hardware": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "command": shlex.join(["python", *sys.argv]),
        "results": results,
    }


def markdown(report: dict) -> str:
    """The report as a table with a heading of facts."""
    lines = [
        f"{report['hardware']}; {report['threads']} threads; torch {report['torch']}, Python {report['python']}; "
        f"float8_e4m3fn to {report['dtype']}; median of {report['repeats']}; `{report['command']}`",
        "",
        "| case | way | GB/s of FP8 | against PyTorch's cast |",
        "|---|---|---:|---:|",
    ]
    for row in report["results"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {row['case']} {shape} | {row['way']} | {row['gb_per_s']:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Measure FP8 dequantization against PyTorch's own cast, side by side.",
        epilog="example: python benchmarks/fp8_dequantize.py --case qkv --repeats 5 --json",
    )
    parser.add_argument("--case", choices=CASES, action="append", help="one shape only; may be given twice")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="PyTorch threads; its own choice by default")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--repeats and --threads must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = {case: CASES[case] for case in options.case or CASES}
    report = run(cases, DTYPES[options.dtype], options.repeats)
    print(json.dumps(report, indent=2) if options.json else markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
