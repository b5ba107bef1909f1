"""Throughput of `mimo convert --dtype keep`, as a ratio to copying the same bytes and reading them back.

    python benchmarks/convert.py --repeats 3

Three ways take turns on the same disk: the conversion to the Hub format; a copy of the same weight files that is
flushed to the disk file by file, as the conversion's files are, and read back (the bar); and the same without the
flush, for comparison: what it leaves to the disk is written after its time has stopped. The source was just written,
so that it comes out of the page cache for all three. Rates are bytes of tensors per second.
"""

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import Bar, finish, parse, parser, progress, seconds
from safetensors.torch import save_file

from modeling_mimo.conversion.checkpoint import parse_config
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert
from modeling_mimo.conversion.random_checkpoint import released_config
from modeling_mimo.conversion.random_common import write_json
from modeling_mimo.conversion.verify import verify
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


# one MoE layer of released width with an eighth of its experts: 0.9 GB in FP8
LAYER = {
    "hidden_size": 4096,
    "hybrid_layer_pattern": [0],
    "moe_layer_freq": [1],
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 32,
}
QUICK = LAYER | {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 8}
READ = 2**24
MIB = 2**20


def write_source(folder: Path, overrides: dict) -> int:
    """A checkpoint in two files, of random bytes; returns the bytes of its tensors."""
    config = released_config("tiny", "fp8", overrides=overrides)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in released_tensors(parse_config(config)).items():
        if spec.quantized:
            # every code but the two NaNs
            codes = torch.randint(0, 127, spec.shape, generator=generator, dtype=torch.uint8)
            tensors[name] = codes.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(spec.scale_shape, generator=generator)
        else:
            dtype = torch.float32 if spec.part == "router" else torch.bfloat16
            tensors[name] = torch.randn(spec.shape, generator=generator).to(dtype)
    folder.mkdir()
    write_json(folder / "config.json", config)
    names = sorted(tensors)
    files = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return sum(tensor.nbytes for tensor in tensors.values())


def read_back(path: Path) -> None:
    buffer = bytearray(READ)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def copy(source: Path, target: Path, flush: bool) -> None:
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        if flush:
            with (target / path.name).open("rb") as file:
                os.fsync(file.fileno())
        read_back(target / path.name)


def measure(source: Path, root: Path, repeats: int, jobs: int) -> dict[str, float]:
    """Median seconds of each way; one repetition runs all of them in turn, after one that does not count."""
    ways = {
        "convert --dtype keep": lambda: convert(source, root / "out", jobs=jobs, shard_size="500MB", progress=False),
        "copyfile, fsync, read back": lambda: copy(source, root / "out", flush=True),
        "copyfile, read back": lambda: copy(source, root / "out", flush=False),
    }
    times = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            progress(f"{repeat}/{repeats} {name}")
            # what the way before left to the disk is no business of this one
            os.sync()
            took = seconds(way)
            if repeat:
                times[name].append(took)
            shutil.rmtree(root / "out")
    progress("")
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Throughput of converting with --dtype keep.", "convert.py --repeats 3")
    options.add_argument("--jobs", type=int, default=2, help="files written at once (default: 2)")
    options.add_argument("--folder", help="where to work, to choose the disk (default: the system's temporary folder)")
    options = parse(options, arguments, repeats=3)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = write_source(Path(folder) / "source", QUICK if options.quick else LAYER)
        times = measure(Path(folder) / "source", Path(folder), options.repeats, options.jobs)
        convert(Path(folder) / "source", Path(folder) / "out", jobs=options.jobs, shard_size="500MB", progress=False)
        report = verify(Path(folder) / "source", Path(folder) / "out", progress=False)
    ours, flushed, _ = times.values()
    rows = [[name, took, size / took / MIB, flushed / took] for name, took in times.items()]
    setting = f"{size / MIB:,.0f} MiB of tensors; {options.jobs} jobs; median of {options.repeats} repeats."
    bars = [
        Bar("differences that `mimo verify` finds", len(report.problems), 0, at_least=False),
        Bar("keep over copying, flushing and reading back", None if options.quick else flushed / ours, 0.7),
    ]
    return finish(options.json, setting, ["way", "s", "MiB/s", "against the flushed copy"], rows, bars)


if __name__ == "__main__":
    sys.exit(main())
