"""Runs every benchmark, one after the other, and writes their tables to docs/benchmarks.md.

    python benchmarks/run_all.py

Run it on a quiet machine. A script that fails or misses a bar is kept in the page with its status.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from common import environment


FOLDER = Path(__file__).resolve().parent

# arguments of a run for the page, where the script's own defaults would take longer than they tell more
ARGUMENTS = {
    "vision.py": ["--repeats", "1"],
    "hearing.py": ["--repeats", "2"],
    "mtp.py": ["--steps", "680"],
    "mtp_memory.py": ["--context", "16384"],
    "quantized.py": ["--steps", "450"],
}
# script -> heading
SCRIPTS = {
    "prefill.py": "Prefill against Transformers' `mimo_v2_flash`",
    "decode.py": "Decoding with HybridCache and with DynamicCache",
    "moe.py": "Experts against bare matrix products",
    "kv_cache.py": "KV cache of MiMo-V2.5 at 262144 tokens",
    "load.py": "Loading FP8 and bf16 checkpoints",
    "vision.py": "Vision tower on an image of 4,096 patches",
    "hearing.py": "Audio tokenizer: real time, matrix products, memory of an hour",
    "mtp.py": "Drafting with MTP heads trained on real text",
    "mtp_memory.py": "What a long prompt costs drafting, beside Transformers' loop",
    "quantized.py": "What quantization costs a trained model",
    "offload.py": "Weights on disk beside accelerate's disk offload",
    "lora_memory.py": "Memory of one training step",
    "compile.py": "The compiled decode step",
    "preprocess.py": "Preprocessing of a photo and a clip",
    "convert.py": "Conversion against copying",
    "fp8_convert.py": "FP8 and MXFP4 arithmetic of conversion",
    "fp8_dequantize.py": "FP8 dequantization",
}


def run(script: str, arguments: list[str]) -> tuple[str, int]:
    """The section of one script and its exit status."""
    command = f"python benchmarks/{shlex.join([script, *arguments])}"
    print(command, file=sys.stderr, flush=True)
    # From the repository's root by relative path: scripts print the command they were called with
    process = [sys.executable, f"benchmarks/{script}", *arguments]
    done = subprocess.run(process, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True)
    section = f"## {SCRIPTS[script]}\n\n```text\n{command}\n```\n\n{done.stdout.strip()}\n"
    if done.returncode:
        section += f"\nThis run ended with status {done.returncode}.\n"
    return section, done.returncode


def checked_out_commit() -> str:
    """Short name of the commit that is measured, with a mark if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True).stdout.strip()
    return found or "unknown, outside of a checkout"


def page(sections: list[str], threads: int, commit: str) -> str:
    facts = environment()
    return "\n".join(
        [
            "# Benchmarks\n",
            f"Written by `{facts['command']}` on {facts['date']}. Ratios are measured side by side in one run; "
            "seconds are this machine's.\n",
            f"- hardware: {facts['hardware']}",
            f"- versions: torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}",
            f"- threads: {threads}",
            f"- commit: {commit}\n",
            *sections,
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status, 1 if a script failed or missed a bar."""
    options = argparse.ArgumentParser(
        description="Run all benchmarks and write docs/benchmarks.md.",
        epilog="example: python benchmarks/run_all.py --only decode.py --only moe.py --output part.md",
    )
    options.add_argument("--only", choices=SCRIPTS, action="append", help="these scripts; may be given more than once")
    options.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: 2)")
    options.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    options.add_argument("--output", type=Path, default=FOLDER.parent / "docs" / "benchmarks.md")
    options = options.parse_args(arguments)
    sections, failed, commit = [], [], checked_out_commit()
    for script in options.only or SCRIPTS:
        size = ["--quick"] if options.quick else ARGUMENTS.get(script, [])
        section, status = run(script, ["--threads", str(options.threads), *size])
        sections.append(section)
        if status:
            failed.append(script)
        # Written after each script: a run takes long, and what was measured should survive its end
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page(sections, options.threads, commit), encoding="utf-8")
    if failed:
        print(f"error: a bar was missed or the script failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
