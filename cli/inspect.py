"""`mimo inspect`: what a checkpoint holds and whether it is complete, from its headers alone."""

import argparse
import json
import math


EXAMPLE = """\
examples:
  mimo inspect /models/MiMo-V2.5
  mimo inspect /models/MiMo-V2.5/model_mtp.safetensors
  mimo inspect MiMo-V2.5 --json      (the tensor list that comes with the package)
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "inspect",
        help="list what a checkpoint holds and check it, without reading weights",
        description="Reads headers only. Exit status: 0 complete, 1 problems found, 2 not readable.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a folder, a .safetensors file, or the name of a release")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """0, or 1 if the files do not match their config. Raises ValueError or OSError if they cannot be read."""
    from tqdm import tqdm

    from .releases import read_target

    # disable=None: no bar where stderr is not a terminal
    target = read_target(args.path, lambda files: tqdm(files, "headers", unit="file", disable=None))
    if target.tensors is None:
        raise ValueError(f"{target.name}: expected safetensors files, got only a config; `mimo plan` reads configs.")
    result = inspect_target(target)
    print(json.dumps(result, indent=2) if args.json else as_text(result))
    return 1 if result["problems"] else 0


def inspect_target(target) -> dict:
    """The JSON object of `mimo inspect`: totals of `target.tensors`, layout, known release and problems."""
    from modeling_mimo.checkpoint_mimo_v2 import (
        CheckpointError,
        check_tensors,
        find_layout,
        sum_parts,
        take_mtp_layers_from_files,
    )
    from modeling_mimo.weight_mapping_mimo_v2 import released_tensors

    from .releases import Release, match_release

    tensors, config = target.tensors, target.config
    if config is not None:
        take_mtp_layers_from_files(config, tensors)
    parts = sum_parts(released_tensors(config) if config else {}, tensors)
    dtypes: dict[str, dict[str, int]] = {}
    for info in tensors.values():
        sums = dtypes.setdefault(info.dtype, {"tensors": 0, "elements": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["elements"] += math.prod(info.shape)
        sums["bytes"] += info.nbytes
    layout, problems = None, []
    try:
        if config is not None:
            layout = dict(zip(("found", "source"), find_layout(config, tensors)))
            check_tensors(config, tensors)
        elif target.kind == "folder":
            problems.append(f"{target.name}: expected config.json beside the files, got none; names are not checked")
    except CheckpointError as error:
        problems += error.problems
    except (ValueError, NotImplementedError) as error:
        problems.append(str(error))
    parameters = {"total": sum(totals["parameters"] for totals in parts.values())}
    totals = Release(
        len(tensors),
        sum(sums["elements"] for sums in dtypes.values()),
        parameters["total"],
        sum(sums["bytes"] for sums in dtypes.values()),
    )
    return {
        "name": target.name,
        "files": len({info.file for info in tensors.values()}),
        **totals._asdict(),
        "parameters": parameters | {part: sums["parameters"] for part, sums in parts.items()},
        "parts": parts,
        "dtypes": dtypes,
        "layout": layout,
        "known_release": match_release(totals),
        "problems": problems,
    }


def as_text(result: dict) -> str:
    """The same for people."""
    gib = result["bytes"] / 2**30
    lines = [
        result["name"],
        f"{result['files']} files, {result['tensors']:,} tensors, {result['bytes']:,} bytes ({gib:,.2f} GiB)",
        f"{result['parameters']['total']:,} parameters",
    ]
    for part, sums in result["parts"].items():
        lines.append(f"  {part:<12}{sums['parameters']:>20,}  {sums['tensors']:>7,} tensors")
    for dtype, sums in result["dtypes"].items():
        lines.append(f"  {dtype:<12}{sums['elements']:>20,}  {sums['tensors']:>7,} tensors  {sums['bytes']:,} bytes")
    layout, known = result["layout"], result["known_release"]
    lines.append(f"attention projections: {layout['found']}, from: {layout['source']}" if layout else "no config.json")
    if known is None:
        lines.append("known release: none with these totals")
    else:
        differ = f", {', '.join(known['differ'])} differ" if known["differ"] else ""
        lines.append(f"known release: {known['name']}: {', '.join(known['match'])} match{differ}")
    lines += ["problems:", *(f"  {line}" for line in result["problems"])] if result["problems"] else ["problems: none"]
    return "\n".join(lines)
