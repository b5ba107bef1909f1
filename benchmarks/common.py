"""What the benchmarks share: options, environment, timing, memory, child processes, bars and the table they end in."""

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


GIB = 2**30

# Half the heads of the "bench" checkpoint: Transformers' eager attention holds two score matrices
# heads x tokens x tokens at once, which at 16384 tokens is 8.6 GB with 8 heads and 17 GB with 16.
HEADS = 8
POSITIONS = 65536


@dataclass(frozen=True)
class Bar:
    """A required value. None: not judged in this run, which is neither a pass nor a failure.

    `--quick` judges what must be right (tokens, logits, counts) and neither speed nor memory.
    """

    name: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict = {True: "PASS", False: "FAIL", None: "SKIP"}[self.passed]
        got = "not judged in this run" if self.value is None else f"{self.value:.4g}"
        return f"{verdict}: {self.name}: {got}, required {'>=' if self.at_least else '<='} {self.limit:.4g}"


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    result = argparse.ArgumentParser(description=description, epilog=f"example: python benchmarks/{example}")
    result.add_argument("--threads", type=int, default=2, help="PyTorch threads (default: 2)")
    result.add_argument("--repeats", type=int, default=None, help="measurements per median")
    result.add_argument("--quick", action="store_true", help="small sizes; judges results, not speed")
    result.add_argument("--json", action="store_true", help="print JSON, not a table")
    return result


def parse(options: argparse.ArgumentParser, arguments: list[str] | None, repeats: int) -> argparse.Namespace:
    """Parses and sets the threads; `repeats` is the default (1 with --quick)."""
    parsed = options.parse_args(arguments)
    if parsed.repeats is None:
        parsed.repeats = 1 if parsed.quick else repeats
    if parsed.repeats < 1 or parsed.threads < 1:
        options.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(parsed.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return parsed


def processor_name() -> str:
    """Name of the CPU; Linux hides it from the platform module."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict:
    """Hardware, versions, threads and date of this run."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hardware": f"{processor_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{memory / GIB:.0f} GiB memory",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def progress(text: str) -> None:
    """One line of progress on a terminal, nothing elsewhere; an empty text clears it."""
    if sys.stderr.isatty():
        print(f"\r{text:79.79s}", end="\r" if not text else "", file=sys.stderr, flush=True)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function: all of them in turn, `repeats` times, after one turn that does not count."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            progress(f"{repeat}/{repeats} {name}")
            took = seconds(function)
            if repeat:
                times[name].append(took)
    progress("")
    return {name: statistics.median(values) for name, values in times.items()}


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process that is in RAM (`VmRSS`), or its maximum since `reset_peak` (`VmHWM`). Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: expected a line {field}, got none")


def settled_bytes() -> int:
    """What is resident after freed memory went back to the operating system, so that reusing it shows as growth."""
    gc.collect()
    # glibc only; without it the memory stays with the process
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def reset_peak() -> int:
    """Starts a new maximum for `resident_bytes("VmHWM")`; returns what is resident now."""
    settled_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def run_child(script: str, task: dict, here: Callable[[dict], dict] | None = None) -> dict:
    """`script --child TASK` in a fresh process; returns the JSON object of its last line of output.

    here: what the child would call, called in this process, for --quick: loading libraries takes longer than the task,
    and memory is not judged.
    """
    if here is not None:
        return json.loads(json.dumps(here(task)))
    command = [sys.executable, script, "--child", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {Path(script).name}: child for {task} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child_task(arguments: list[str] | None) -> dict | None:
    """The task when this process was started by `run_child`, with its threads set; else None."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] != ["--child"]:
        return None
    task = json.loads(arguments[1])
    torch.set_num_threads(task["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return task


def bench_checkpoint(folder: Path, quick: bool, heads: int = HEADS, dtype: str = "bf16", **overrides) -> Path:
    """A random checkpoint: "bench" with `heads` heads and twice the KV heads in sliding layers, or "tiny" if quick."""
    if not quick:
        overrides |= {
            "num_attention_heads": heads,
            "swa_num_attention_heads": heads,
            "num_key_value_heads": heads // 4,
            "swa_num_key_value_heads": heads // 2,
        }
    overrides |= {"max_position_embeddings": POSITIONS, "num_nextn_predict_layers": 3}
    size = "tiny" if quick else "bench"
    return write_random_checkpoint(folder, size, dtype=dtype, overrides=overrides, with_tokenizer=False)


def random_tokens(length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, length] below 2000, which every checkpoint here has."""
    return torch.randint(0, 2000, (1, length), generator=torch.Generator().manual_seed(seed))


def table(headings: list[str], rows: list[list]) -> str:
    """A markdown table; numbers are rounded to three digits and set right."""

    def cell(value) -> str:
        if isinstance(value, float):
            digits = 0 if value >= 1000 else max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
            return f"{value:.{digits}f}"
        return "" if value is None else str(value)

    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(headings))]
    lines = [headings, ["---:" if right else "---" for right in numeric], *([cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finish(as_json: bool, setting: str, headings: list[str], rows: list[list], bars: list[Bar], notes=()) -> int:
    """Prints the report; returns the exit status, 1 if a bar failed."""
    facts = environment()
    if as_json:
        results = [dict(zip(headings, row)) for row in rows]
        judged = [asdict(bar) | {"passed": bar.passed} for bar in bars]
        print(json.dumps(facts | {"setting": setting, "results": results, "bars": judged, "notes": notes}, indent=2))
    else:
        print(
            f"{facts['hardware']}; {facts['threads']} threads; torch {facts['torch']}, transformers "
            f"{facts['transformers']}, Python {facts['python']}; {facts['date']}; `{facts['command']}`\n"
        )
        print(f"{setting}\n\n{table(headings, rows)}\n")
        for line in (*notes, *bars):
            print(f"- {line}")
    return int(any(bar.passed is False for bar in bars))
