"""`mimo convert`: a checkpoint in another format, dtype or layout."""

import argparse
import json


EXAMPLE = """\
examples:
  mimo convert /models/MiMo-V2.5 /models/MiMo-V2.5-hub --to hub
  mimo convert XiaomiMiMo/MiMo-V2.5 /models/MiMo-V2.5-bf16 --to hub --dtype bf16 --jobs 4
  mimo convert MiMo-V2.5 --to hub --dtype bf16 --dry-run      (the tensor list that comes with the package)

SRC is never changed. DST appears when everything in it is complete; until then its files are in DST.partial, and
--resume goes on with what is there. --publish uploads DST when it is complete.
"""

MOST_LISTED = 200


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert",
        help="write a checkpoint in another format, dtype or layout",
        description="Converts tensor by tensor under a ceiling of memory. Exit status: 0 done, 2 not possible.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="a folder or a Hub repository (--dry-run: also a release's name)")
    parser.add_argument("dst", metavar="DST", nargs="?", help="folder to write; must not exist or be empty")
    parser.add_argument("--to", choices=("hub", "xiaomi"), default="hub", help="format of DST (default: hub)")
    parser.add_argument(
        "--dtype",
        choices=("keep", "fp8", "bf16", "fp16", "mxfp4"),
        default="keep",
        help="of the weights (default: keep, which copies bytes; mxfp4: experts, the rest fp8)",
    )
    parser.add_argument("--layout", choices=("split", "fused"), help="of q, k and v (default: as in SRC)")
    parser.add_argument("--shard-size", metavar="SIZE", help="of a file (default: 5GB for hub, 32GiB for xiaomi)")
    parser.add_argument("--max-memory", metavar="SIZE", default="4GB", help="for tensors in flight (default: 4GB)")
    parser.add_argument(
        "--only", metavar="PART", action="append", help="text, mtp, vision or audio; repeatable (default: all)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="files written at once (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written; no weights needed")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--rank-layout", metavar="FILE", help="description of a folder of rank shards")
    parser.add_argument("--publish", metavar="REPO_ID", help="upload DST to this Hub repository when it is complete")
    parser.add_argument("--export-code", action="store_true", help="add code files for trust_remote_code to DST")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """0. Raises ValueError or OSError if the conversion is not possible."""
    from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert

    if args.dst is None and not args.dry_run:
        raise ValueError("DST: expected a folder to write, got none; only --dry-run needs none.")
    if args.publish:
        from modeling_mimo.conversion.publish import check_account

        # before hours are spent on what cannot be uploaded
        check_account(args.publish)
    report = convert(
        _source(args),
        args.dst,
        to=args.to,
        dtype=args.dtype,
        layout=args.layout,
        shard_size=args.shard_size,
        only=args.only,
        jobs=args.jobs,
        max_memory=args.max_memory,
        dry_run=args.dry_run,
        resume=args.resume,
        rank_layout=args.rank_layout,
    ).to_dict()
    if args.export_code and not args.dry_run:
        from modeling_mimo.conversion.export_code import export_code

        report["exported_code"] = [str(path) for path in export_code(args.dst)]
    if args.publish and not args.dry_run:
        from modeling_mimo.conversion.publish import publish

        report["published"] = publish(args.dst, args.publish)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0


def _source(args: argparse.Namespace):
    """SRC, or for a dry run the tensor list of a release by its name."""
    from pathlib import Path

    from .releases import DATA, shipped_manifest, shipped_names

    if not args.dry_run or Path(args.src).is_dir() or args.src not in shipped_names():
        return args.src
    from modeling_mimo.conversion.checkpoint import HeadersSource

    tensors = shipped_manifest(args.src)
    if tensors is None:
        raise ValueError(f"{args.src}: expected a release with a tensor list in the package, got one without.")
    return HeadersSource(args.src, json.loads((DATA / args.src / "config.json").read_bytes()), tensors)


def as_text(report: dict) -> str:
    """The report for people."""
    source = report["source"] + (f" @ {report['revision']}" if report["revision"] else "")
    verb = "would become" if report["dry_run"] else "became"
    lines = [
        f"{source} {verb} --to {report['to']} --dtype {report['dtype']}, attention projections {report['layout']}",
        f"parts: {', '.join(report['parts'])}",
    ]
    for file in report["files"][:MOST_LISTED]:
        tensors = f"{file['tensors']:>7,} tensors" if "tensors" in file else ""
        lines.append(f"  {file['name']:<44}{file['bytes']:>16,} bytes  {tensors}".rstrip())
    if len(report["files"]) > MOST_LISTED:
        lines.append(f"  and {len(report['files']) - MOST_LISTED} more files")
    gib = report["total_size"] / 2**30
    lines.append(f"{report['tensors']:,} tensors, {report['total_size']:,} bytes ({gib:,.2f} GiB)")
    lines.append(f"peak memory of tensors in flight: {report['peak_memory'] / 1e6:,.0f} MB")
    if report["errors"]:
        lines.append("requantization error, relative to the values of the source:")
    for group, error in report["errors"].items():
        lines.append(
            f"  {group:<28}{error['tensors']:>7,} tensors  max {error['max_relative']:.2e}  "
            f"mean {error['mean_relative']:.2e}"
        )
    lines += ["changed:", *(f"  {line}" for line in report["changes"])] if report["changes"] else ["changed: nothing"]
    lines += [f"code: {path}" for path in report.get("exported_code", ())]
    if "published" in report:
        lines.append(f"published: {report['published']}")
    return "\n".join(lines)
