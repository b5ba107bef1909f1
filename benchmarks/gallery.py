"""The plots of docs/gallery.md, each from a real run: measured, kept as JSON, drawn, and put into the page.

    python benchmarks/gallery.py --only kv_bytes --only time

Each plot is NAME.json and NAME.png in the folder of --out; the page is made of all that lie there, and its numbers are
those of the JSON files. Needs matplotlib: pip install -e ".[plots]".
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import environment
from gallery_cost import draw_kv_bytes, draw_time, measure_kv_bytes, measure_time, text_kv_bytes, text_time
from gallery_drafts import draw_acceptance, measure_acceptance, text_acceptance
from gallery_inside import draw_experts, draw_sinks, measure_experts, measure_sinks, text_experts, text_sinks
from gallery_quality import draw_quality, measure_quality, text_quality
from gallery_style import save, write_json
from tqdm import tqdm
from transformers.utils import logging

import modeling_mimo


FOLDER = Path(__file__).resolve().parent.parent
# what decides what is measured
MEASURING = ("model", "original", "longest", "repeats", "count", "threads")
INTRODUCTION = """\
# Gallery

Written by `python benchmarks/gallery.py`; every plot and every number comes from a run of it, whose data lies beside
the picture. The model is MiMo-Micro, the small model with real weights that is part of the package, unless a plot says
otherwise. It shows how the parts work, not how good a released model is.

"""


@dataclass(frozen=True)
class Plot:
    """measure(options) -> data for JSON; draw(data) -> figure; text(data) -> paragraphs below it.

    of_weights: whether other weights would give other data.
    """

    heading: str
    alt: str
    measure: Callable
    draw: Callable
    text: Callable
    of_weights: bool = True


PLOTS = {
    "kv_bytes": Plot(
        "Bytes of the KV cache",
        "Bytes of the KV cache by context, hybrid and all layers global",
        measure_kv_bytes,
        draw_kv_bytes,
        text_kv_bytes,
        of_weights=False,
    ),
    "time": Plot(
        "Time of prefill and decoding",
        "Seconds of a prefill and of a decoded token by context, beside Transformers",
        measure_time,
        draw_time,
        text_time,
        of_weights=False,
    ),
    "acceptance": Plot(
        "Accepted drafts and entropy",
        "Share of accepted drafts and tokens per step by entropy, beside the published curve",
        measure_acceptance,
        draw_acceptance,
        text_acceptance,
    ),
    "experts": Plot(
        "Experts by modality",
        "Heat maps of expert choices by layer and modality",
        measure_experts,
        draw_experts,
        text_experts,
    ),
    "sinks": Plot(
        "Attention sinks",
        "Share of attention that goes to sinks by layer, head and modality",
        measure_sinks,
        draw_sinks,
        text_sinks,
    ),
    "quality": Plot(
        "Quality in bf16, FP8 and nf4",
        "Accuracy per task and loss in bf16, FP8 and nf4",
        measure_quality,
        draw_quality,
        text_quality,
    ),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure and draw the plots of docs/gallery.md.",
        epilog="example: python benchmarks/gallery.py --only experts --only sinks --quick",
    )
    parser.add_argument("--only", choices=PLOTS, action="append", help="these plots; may be given more than once")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--replot", action="store_true", help="draw and write the page from the JSON files alone")
    parser.add_argument(
        "--out", type=Path, help="folder of plots and data (default: docs/images/gallery, quick: build/gallery)"
    )
    parser.add_argument(
        "--page", type=Path, help="page to write (default: docs/gallery.md, quick: gallery.md in --out)"
    )
    parser.add_argument("--model", help="checkpoint (default: MiMo-Micro, which is part of the package)")
    parser.add_argument("--original", help="quality: the trained weights before FP8, as bf16")
    parser.add_argument("--longest", type=int, help="longest context of the model's own runs (default: 8192)")
    parser.add_argument("--repeats", type=int, help="time: runs per median (default: 5)")
    parser.add_argument(
        "--count",
        type=int,
        default=100,
        help="quality: held-out examples per task; experts and sinks: a quarter of so many (default: 100)",
    )
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: 2)")
    options = parser.parse_args(arguments)
    given = {name: vars(options)[name] for name in MEASURING if vars(options)[name] != parser.get_default(name)}
    options.given = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    defaults = {"longest": (8192, 1024), "repeats": (5, 1)}
    for name, (usual, quick) in defaults.items():
        if vars(options)[name] is None:
            setattr(options, name, quick if options.quick else usual)
    for name in ("longest", "repeats", "count", "threads"):
        if vars(options)[name] < 1:
            parser.error(f"--{name}: expected at least 1, got {vars(options)[name]}")
    if options.longest < 256:
        parser.error(f"--longest: expected at least 256, got {options.longest}")
    usual = FOLDER / "docs" / "images" / "gallery"
    options.out = options.out or (FOLDER / "build" / "gallery" if options.quick else usual)
    options.page = options.page or (options.out / "gallery.md" if options.quick else FOLDER / "docs" / "gallery.md")
    options.only = options.only or list(PLOTS)
    for path in (options.out / f"{name}.json" for name in options.only if options.replot):
        if not path.is_file():
            parser.error(f"--replot: expected {path}, got no such file; measure it without --replot")
    options.model = options.model or modeling_mimo.micro()
    return options


def measured(name: str, options: argparse.Namespace) -> dict:
    """What NAME.json holds: how it was made, and the data."""
    quick = ["--quick"] if options.quick else []
    facts = environment()
    facts["command"] = shlex.join(["python", "benchmarks/gallery.py", "--only", name, *quick, *options.given])
    facts["weights"] = fingerprint(options.model) if PLOTS[name].of_weights else None
    return facts | {"data": PLOTS[name].measure(options)}


def fingerprint(checkpoint: str) -> str:
    """Eight hex digits of the sha256 of all weights of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(Path(checkpoint).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def section(name: str, kept: dict, folder: str) -> str:
    plot = PLOTS[name]
    machine = f"{kept['hardware']}; {kept['threads']} thread{'s' if kept['threads'] > 1 else ''}"
    weights = f"weights {kept['weights']}; " if kept["weights"] else ""
    paragraphs = [
        f"## {plot.heading}",
        f"![{plot.alt}]({folder}/{name}.png)",
        *plot.text(kept["data"]),
        f"`{kept['command']}`, {kept['date']}; {machine}; torch {kept['torch']}, transformers {kept['transformers']}; "
        f"{weights}[data]({folder}/{name}.json)",
    ]
    return "\n\n".join(paragraphs)


def page(options: argparse.Namespace) -> str:
    """The text of the page, of all plots whose data lies in the folder."""
    folder = Path(os.path.relpath(options.out, options.page.parent)).as_posix()
    kept = {name: options.out / f"{name}.json" for name in PLOTS}
    sections = [
        section(name, json.loads(path.read_text(encoding="utf-8")), folder)
        for name, path in kept.items()
        if path.is_file()
    ]
    return INTRODUCTION + "\n\n".join(sections) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.page.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(options.only, desc="plots", unit="plot", disable=None):
        path = options.out / f"{name}.json"
        picture = path.with_suffix(".png")
        # a run takes long: what was measured is kept, drawn or not, and after each plot the page is whole
        if not options.replot:
            write_json(path, measured(name, options))
        # if drawing fails, no picture of other data stays beside them
        picture.unlink(missing_ok=True)
        save(PLOTS[name].draw(json.loads(path.read_text(encoding="utf-8"))["data"]), picture)
        options.page.write_text(page(options), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
