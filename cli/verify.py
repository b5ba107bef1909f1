"""`mimo verify`: whether a checkpoint is complete and sound, alone or against another one."""

import argparse
import json


EXAMPLE = """\
examples:
  mimo verify /models/MiMo-V2.5 --headers           (names, shapes, dtypes, index; seconds)
  mimo verify /models/MiMo-V2.5 --write-manifest sums.sha256
  mimo verify /models/MiMo-V2.5 /models/MiMo-V2.5-bf16 --json
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "verify",
        help="check every tensor of a checkpoint, or compare two checkpoints",
        description=(
            "Checks names, shapes, dtypes, index and audio_tokenizer/, then reads every value. With B, every tensor "
            "of both is compared: by bytes, or after dequantization where dtype or row order differ. Exit status: "
            "0 sound and equal, 1 problems found, 2 not readable."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="a folder, or one .safetensors file")
    parser.add_argument("b", metavar="B", nargs="?", help="a folder to compare A with")
    parser.add_argument("--headers", action="store_true", help="read no values")
    parser.add_argument("--manifest", metavar="FILE", help="check sha256 sums, in the format of `sha256sum`")
    parser.add_argument("--write-manifest", metavar="FILE", help="write the sha256 sums of all files of A")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """0, or 1 if there are problems. Raises ValueError or OSError if A or B cannot be read."""
    from modeling_mimo.conversion.verify import verify

    from .releases import Release, match_release

    report = verify(args.a, args.b, args.headers, args.manifest, write_sums=args.write_manifest)
    totals = Release(report.tensors, report.elements, report.parameters, report.bytes)
    result = report.to_dict() | {"known_release": match_release(totals)}
    print(json.dumps(result, indent=2) if args.json else as_text(result))
    return 1 if report.problems else 0


def as_text(result: dict) -> str:
    """The same for people."""
    lines = [
        result["name"],
        f"{result['files']} files, {result['tensors']:,} tensors, {result['parameters']:,} parameters, "
        f"{result['bytes']:,} bytes" + (", headers alone" if result["headers_only"] else ""),
        f"attention projections: {result['layout'] or 'unknown'}",
    ]
    if (known := result["known_release"]) is None:
        lines.append("known release: none with these totals")
    else:
        differ = f", {', '.join(known['differ'])} differ" if known["differ"] else ""
        lines.append(f"known release: {known['name']}: {', '.join(known['match'])} match{differ}")
    if result["audio_tokenizer"] is not None:
        lines.append(f"audio_tokenizer: {result['audio_tokenizer']} tensors")
    lines += [f"FP8 scales, {part}: {low:.3g} to {high:.3g}" for part, (low, high) in result["scales"].items()]
    if (sums := result["manifest"]) is not None:
        done = [f"{what} {sums[what]}" for what in ("checked", "written") if what in sums]
        lines.append(f"sha256 of {sums['files']} files: {', '.join(done)}")
    if result["comparison"] is not None:
        lines += comparison_lines(result["comparison"])
    lines += ["problems:", *(f"  {line}" for line in result["problems"])] if result["problems"] else ["problems: none"]
    return "\n".join(lines)


def comparison_lines(comparison: dict) -> list[str]:
    """A table: one line per group of tensors; errors are of B against A, over the tensors that are not equal."""
    lines = [
        f"compared: {comparison['equal']:,} tensors equal by bytes, {comparison['dequantized']:,} equal after "
        f"dequantization, {comparison['different']:,} different",
        f"  {'group':<16}{'equal':>8}{'deq.':>8}{'differ':>8}{'max abs':>12}{'mean abs':>12}{'rms rel.':>12}",
    ]
    for group, sums in comparison["groups"].items():
        errors = [sums["errors"][name] for name in ("max_abs", "mean_abs", "rms_relative")]
        shown = "".join(f"{'not finite' if error is None else format(error, '.3g'):>12}" for error in errors)
        lines.append(f"  {group:<16}{sums['equal']:>8,}{sums['dequantized']:>8,}{sums['different']:>8,}{shown}")
    return lines
