"""`mimo doctor`: what is wrong with a checkpoint's folder or too small on this machine, in plain words and the fix."""

import argparse
import json
import shlex


EXAMPLE = """\
examples:
  mimo doctor /models/MiMo-V2.5
  mimo doctor /models/MiMo-V2.5 --json
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "doctor",
        help="find what is wrong with a checkpoint's folder, with the fix",
        description="Reads headers and small files. Exit status: 0 healthy (notes may be printed), 1 findings.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="a folder as downloaded or converted")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(args: argparse.Namespace) -> int:
    """0 without findings other than notes, else 1. Raises FileNotFoundError if there is no such folder."""
    from modeling_mimo.conversion.doctor import diagnose
    from modeling_mimo.conversion.findings import SEVERITIES

    from .plan import machine

    diagnosis = diagnose(args.path)
    findings = diagnosis.findings
    memory = None
    if diagnosis.config is not None:
        memory = memory_needed(diagnosis)
        findings += check_memory(args.path, memory, **machine()) + check_gpus(memory)
        findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    result = {
        "name": args.path,
        "healthy": all(finding.severity == "note" for finding in findings),
        "memory": memory,
        "findings": [finding._asdict() for finding in findings],
    }
    print(json.dumps(result, indent=2) if args.json else as_text(result))
    return 0 if result["healthy"] else 1


def memory_needed(diagnosis) -> dict[str, int]:
    """Bytes of the weights in memory as they are stored and as bf16, by the arithmetic of `mimo plan`."""
    from .plan import plan_weights

    tensors = diagnosis.tensors if diagnosis.is_complete else None
    needed = {}
    for dtype in (None, "bf16"):
        try:
            plan = plan_weights(diagnosis.config, tensors, dtype)
        except NotImplementedError:
            continue
        needed[plan["dtype"]] = plan["total"]
    return needed


def check_memory(path: str, needed: dict[str, int], ram: int, gpus: list[dict]) -> list:
    """Whether the weights fit into the GPUs, into the RAM, or nowhere."""
    from modeling_mimo.conversion.findings import Finding

    from .plan import verdict

    here = f"{_gib(ram)} of RAM" + (f" and {_gib(sum(gpu['bytes'] for gpu in gpus))} on GPUs" if gpus else "")
    verdicts = {dtype: verdict(size, ram, gpus) for dtype, size in needed.items()}
    sizes = ", ".join(f"{dtype} takes {_gib(size)}" for dtype, size in needed.items())
    why = "weights that do not fit are read from disk for every token, or the process is killed"
    fix = f"mimo plan {shlex.quote(path)} --context 32K says what is needed; use more GPUs, or a smaller dtype"
    if needed and all(text.startswith("does not fit") for text in verdicts.values()):
        return [Finding("warning", f"no room in memory: {sizes}; here are {here} free", why, fix)]
    narrow = [dtype for dtype, text in verdicts.items() if text.startswith("does not fit")]
    if narrow:
        fits = [dtype for dtype in needed if dtype not in narrow]
        what = f"room in memory for {' and '.join(fits)} only: {sizes}; here are {here} free"
        return [Finding("note", what, why, fix)]
    return []


def check_gpus(needed: dict[str, int]) -> list:
    """GPUs that cannot multiply FP8 numbers get the weights dequantized, which takes twice the memory."""
    import torch

    from modeling_mimo.conversion.findings import Finding

    old = {
        f"{torch.cuda.get_device_name(index)} ({major}.{minor})"
        for index in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(index)]
        if (major, minor) < (9, 0)
    }
    if not old or "fp8" not in needed:
        return []
    what = f"no FP8 kernels for {', '.join(sorted(old))}: they need compute capability 9.0"
    why = f"weights are dequantized to bf16 while loading: {_gib(needed['bf16'])} instead of {_gib(needed['fp8'])}"
    return [Finding("note", what, why, "nothing to do if it fits; else use GPUs of the Hopper generation or later")]


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def as_text(result: dict) -> str:
    """The same for people."""
    lines = [result["name"]]
    for finding in result["findings"]:
        # parts of it may come from the files: nothing in them may move the cursor
        what, why, fix = ("".join(filter(str.isprintable, finding[key])) for key in ("what", "why", "fix"))
        lines += ["", f"{finding['severity']}: {what}", f"  why: {why}", f"  fix: {fix}"]
    counts = [
        f"{count} {severity}{'' if count == 1 else 's'}"
        for severity in ("error", "warning", "note")
        if (count := sum(finding["severity"] == severity for finding in result["findings"]))
    ]
    lines += ["", f"{'healthy' if result['healthy'] else 'not healthy'}{': ' if counts else ''}{', '.join(counts)}"]
    return "\n".join(lines)
