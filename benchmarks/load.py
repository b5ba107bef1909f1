"""Load time and memory of `from_pretrained`: FP8 files dequantized, FP8 files kept as FP8, bf16 files.

    python benchmarks/load.py --repeats 5

Every load is a process of its own that has imported everything before; the three ways take turns, and the files
were just written, so the disk is not measured. Loaded parts: the tensors of the files, MTP layers included. Tensors:
the model's parameters and buffers. RSS: what the process grew by. Peak: the largest growth during the load; pages of
the mapped files count. Needs Linux.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import (
    Bar,
    bench_checkpoint,
    child_task,
    finish,
    parse,
    parser,
    progress,
    random_tokens,
    reset_peak,
    resident_bytes,
    run_child,
    seconds,
    settled_bytes,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from modeling_mimo import MiMoV2FP8Config


# way -> (files, value of `dequantize`)
WAYS = {
    "FP8 files, dequantized": ("fp8", True),
    "FP8 files, kept as FP8": ("fp8", False),
    "bf16 files": ("bf16", None),
}
MIB = 2**20


def loaded_file_bytes(folder: Path) -> int:
    """Bytes of the tensors in the files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


def load(task: dict) -> dict:
    """One measured load, and the logits of a few tokens."""
    folder, dequantize = task["folder"], task["dequantize"]
    extra = {} if dequantize is None else {"quantization_config": MiMoV2FP8Config(dequantize=dequantize)}
    before, result = reset_peak(), {}
    took = seconds(lambda: result.update(model=AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **extra)))
    peak = resident_bytes("VmHWM") - before
    kept = settled_bytes() - before
    model = result["model"].eval()
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    with torch.inference_mode():
        logits = model(random_tokens(32)).logits[0].float()
    return {
        "seconds": took,
        "peak": peak,
        "tensors": sum(tensor.nbytes for tensor in tensors.values()),
        "resident": kept,
        "parameters": model.num_parameters(),
        "logits": logits.flatten()[::97].tolist(),
    }


def measure(folder: Path, repeats: int, threads: int, quick: bool) -> dict[str, dict]:
    """The medians of each way, over processes that take turns."""
    runs = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way, (files, dequantize) in WAYS.items():
            progress(f"{repeat + 1}/{repeats} {way}")
            task = {"folder": str(folder / files), "dequantize": dequantize, "threads": threads}
            runs[way].append(run_child(__file__, task, load if quick else None))
    progress("")
    return {
        way: done[0] | {key: statistics.median(run[key] for run in done) for key in ("seconds", "peak", "resident")}
        for way, done in runs.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    if task := child_task(arguments):
        print(json.dumps(load(task)))
        return 0
    options = parser("Load time and memory of FP8 and bf16 checkpoints.", "load.py --repeats 3")
    options = parse(options, arguments, repeats=5)
    with tempfile.TemporaryDirectory() as folder:
        folders = {dtype: bench_checkpoint(Path(folder, dtype), options.quick, 16, dtype) for dtype in ("fp8", "bf16")}
        sizes = {dtype: loaded_file_bytes(path) for dtype, path in folders.items()}
        results = measure(Path(folder), options.repeats, options.threads, options.quick)
    rows, shares = [], {}
    for way, (files, _) in WAYS.items():
        facts = results[way]
        shares[way] = facts["tensors"] / sizes[files]
        sides = [sizes[files] / MIB, facts["tensors"] / MIB, shares[way], facts["resident"] / MIB, facts["peak"] / MIB]
        rows.append([way, facts["seconds"], *sides, facts["peak"] / facts["tensors"]])
    dequantized, kept = (torch.tensor(results[way]["logits"]) for way in list(WAYS)[:2])
    setting = (
        f"{results['bf16 files']['parameters'] / 1e6:.0f}M parameters; median of {options.repeats} processes each."
    )
    bars = [
        Bar(f"bytes of the tensors over bytes of the loaded parts, {way}", shares[way], 1.1, at_least=False)
        for way in ("FP8 files, kept as FP8", "bf16 files")
    ]
    difference = (dequantized - kept).abs().max().item()
    bars.append(Bar("largest logit difference, FP8 kept against dequantized", difference, 0.0, at_least=False))
    headings = ["way", "s", "loaded parts, MiB", "tensors, MiB", "tensors / parts", "RSS, MiB", "peak, MiB"]
    return finish(options.json, setting, [*headings, "peak / tensors"], rows, bars)


if __name__ == "__main__":
    sys.exit(main())
