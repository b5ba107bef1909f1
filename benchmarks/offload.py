"""Weights on disk: bytes written once and read per token, and time per token, beside accelerate's `disk_offload`.

    python benchmarks/offload.py --repeats 5

accelerate's way writes every parameter in bf16 and reads each layer whole. `device_map` reads the released FP8 files,
and of the experts those that the token hits; `expert_device_map` keeps everything else in memory. The three models
take turns at the same token without a cache. Cold: the pages of all files were dropped before (Linux; counted bytes
are those asked for, whether the page cache had them or not).
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import disk_offload
from common import Bar, bench_checkpoint, finish, parse, parser, random_tokens, seconds
from transformers import AutoModelForCausalLM

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.offload_mimo_v2 import expert_device_map


MIB = 2**20

ACCELERATE, DISK, EXPERTS = "accelerate, bf16 written", "all on disk, as released", "experts on disk, as released"


def load(folder: Path, dequantize: bool, **options):
    quantization = MiMoV2FP8Config(dequantize=dequantize)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, **options
    ).eval()


def load_all(folder: Path, written: Path) -> dict[str, torch.nn.Module]:
    """The three models; accelerate's copy of the weights is in `written`."""
    model = load(folder, dequantize=True)
    disk_offload(model, written, execution_device=torch.device("cpu"))
    return {
        ACCELERATE: model,
        DISK: load(folder, False, device_map={"": "disk"}),
        EXPERTS: load(folder, False, device_map=expert_device_map(model.config)),
    }


def drop_pages(*folders: Path) -> None:
    """Makes the next read of every file one of the disk."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            # pages that are not yet on disk stay
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bytes_per_token(model, step: Callable[[], object]) -> int:
    """Bytes that one step asks the files for."""
    if model.released_weights is not None:
        before = model.released_weights.bytes_read
        step()
        return model.released_weights.bytes_read - before
    # accelerate's hooks read the parameters of every module that runs, which the MTP heads do not
    return sum(part.nbytes for name, part in model.named_parameters() if ".mtp." not in name)


def hit_share(config) -> float:
    return config.num_experts_per_tok / config.n_routed_experts


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Reading weights from disk for every token.", "offload.py --repeats 5")
    options = parse(options, arguments, repeats=5)
    with tempfile.TemporaryDirectory() as place:
        folder, written = bench_checkpoint(Path(place, "fp8"), options.quick, dtype="fp8"), Path(place, "written")
        files = folder_bytes(folder)
        models, token = load_all(folder, written), random_tokens(1)
        added = {ACCELERATE: folder_bytes(written), DISK: folder_bytes(folder) - files}
        steps = {name: lambda model=model: model(token, use_cache=False).logits for name, model in models.items()}
        with torch.inference_mode():
            logits = {name: step() for name, step in steps.items()}
            read = {name: bytes_per_token(model, steps[name]) for name, model in models.items()}
            cold, warm = {name: [] for name in steps}, {name: [] for name in steps}
            for _ in range(options.repeats):
                for name, step in steps.items():
                    drop_pages(folder, written)
                    cold[name].append(seconds(step))
                    warm[name].append(seconds(step))
        config = models[DISK].config
    rows = [
        [
            name,
            added.get(name, 0) / MIB,
            read[name] / MIB,
            read[ACCELERATE] / read[name],
            statistics.median(cold[name]) * 1000,
            statistics.median(warm[name]) * 1000,
        ]
        for name in steps
    ]
    setting = (
        f"{models[DISK].num_parameters() / 1e6:.0f}M parameters, FP8 files of {files / MIB:.0f} MiB, a token hits "
        f"{hit_share(config):.2%} of the experts (MiMo-V2.5: 3.12%); median of {options.repeats}."
    )
    bars = [
        Bar("bytes written for a model on disk", float(added[DISK]), 0.0, at_least=False),
        Bar(
            "bytes per token, experts on disk over accelerate's",
            read[EXPERTS] / read[ACCELERATE],
            0.25,
            at_least=False,
        ),
        Bar(
            "largest logit difference to accelerate's bf16",
            max((logits[name] - logits[ACCELERATE]).abs().max().item() for name in steps),
            0.0,
            at_least=False,
        ),
    ]
    headings = ["way", "written, MiB", "read per token, MiB", "accelerate / this", "ms per token, cold", "warm"]
    return finish(options.json, setting, headings, rows, bars)


if __name__ == "__main__":
    sys.exit(main())
