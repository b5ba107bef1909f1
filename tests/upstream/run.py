"""Runs Transformers' own test mixins on this package and writes docs/upstream-tests.md.

    python tests/upstream/run.py

The mixins are not in Transformers' wheel; the source distribution of the installed version has most of them. It is
downloaded once, with pip, to a cache folder.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path


# before Transformers is imported: no test may look for anything on the Hub
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers


FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent.parent / "docs" / "upstream-tests.md"
ADAPTERS = ("models.py", "processors.py")
# name of the package that the mixins become: they import one another relatively
PACKAGE = "transformers_tests"

# what the mixins import and the source distribution lacks
MISSING_MODULES = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "distributed_testing_utils.py": "from ranks import run_distributed\n\n__all__ = ['run_distributed']\n",
}


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "modeling-mimo", f"transformers-{transformers.__version__}")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def download(target: Path) -> None:
    """Fills `target` with the mixins and with `parameterized`, which they import."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"transformers=={transformers.__version__}"
        pip("download", "--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", folder, name)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            members = [member for member in file.getmembers() if "/tests/" in member.name]
            file.extractall(folder, members=members, filter="data")
        part = target.with_name(f"{target.name}.partial")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(next(Path(folder).glob("*/tests")), part / PACKAGE)
        pip("install", "--no-deps", "--target", str(part), "parameterized")
    for name, text in MISSING_MODULES.items():
        path = part / PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


class Recorder:
    """A pytest plugin: the outcome of every test and why."""

    def __init__(self):
        # (class, test) -> (outcome, reason)
        self.outcomes: dict[tuple[str, str], tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report):
        _, kind, test = report.nodeid.split("::")
        name = kind, re.sub(r"^test_", "", test)
        if report.skipped:
            self.outcomes[name] = "skipped", report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            self.outcomes[name] = "failed", report.longrepr.reprcrash.message.split("\n")[0]
        elif report.when == "call":
            # a failed subtest is reported before its test is
            self.outcomes.setdefault(name, ("passed", ""))


def reasons_table(outcomes: dict, outcome: str) -> list[str]:
    """Rows of reason, classes and tests, the most frequent reason first."""
    grouped = defaultdict(lambda: defaultdict(list))
    for (kind, test), (found, reason) in outcomes.items():
        if found == outcome:
            grouped[reason.strip()][test].append(kind)
    rows = ["| why | tests |", "|---|---|"]
    for reason, tests in sorted(grouped.items(), key=lambda item: -len(item[1])):
        by_classes = defaultdict(list)
        for test, kinds in tests.items():
            by_classes[", ".join(sorted(kinds))].append(f"`{test}`")
        cell = "; ".join(f"{kinds}: {', '.join(sorted(names))}" for kinds, names in sorted(by_classes.items()))
        rows.append(f"| {reason.replace('|', '/')} | {cell} |")
    return rows


def page(outcomes: dict, seconds: float) -> str:
    kinds = sorted({kind for kind, _ in outcomes})
    counts = Counter((kind, outcome) for (kind, _), (outcome, _) in outcomes.items())
    lines = [
        "# Transformers' own tests",
        "",
        f"The test mixins of transformers {transformers.__version__}, torch {torch.__version__}, run on this package "
        f"by `python tests/upstream/run.py` in {seconds:.0f} s. The classes are in `tests/upstream/`.",
        "",
        "| class | passed | skipped | failed |",
        "|---|---:|---:|---:|",
    ]
    for kind in kinds:
        numbers = [str(counts[kind, outcome]) for outcome in ("passed", "skipped", "failed")]
        lines.append(f"| `{kind}` | {' | '.join(numbers)} |")
    lines += ["", "## Skipped", "", *reasons_table(outcomes, "skipped")]
    failed = any(outcome == "failed" for outcome, _ in outcomes.values())
    lines += ["", "## Failed", "", *(reasons_table(outcomes, "failed") if failed else ["None."])]
    lines += ["", "## Not run", "", (FOLDER / "not_run.md").read_text(encoding="utf-8").strip(), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status, 1 if a test failed."""
    options = argparse.ArgumentParser(description="Run Transformers' test mixins and write docs/upstream-tests.md.")
    options.add_argument("--output", type=Path, default=PAGE)
    options.add_argument("--only", default=None, help="run the tests that this pytest -k expression chooses, no page")
    options = options.parse_args(arguments)
    cache = cache_folder()
    if not cache.exists():
        download(cache)
    sys.path[:0] = [str(cache), str(FOLDER), str(FOLDER.parent)]
    # for tests that run in a process of their own
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
    recorder, start = Recorder(), time.perf_counter()
    # without the project's conftest.py, whose poisoned memory is for its own tests
    flags = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "--noconftest",
        "-c",
        os.devnull,
        "--rootdir",
        str(FOLDER),
    ]
    chosen = ["-k", options.only] if options.only else []
    status = pytest.main([*flags, *chosen, *(str(FOLDER / name) for name in ADAPTERS)], plugins=[recorder])
    if not options.only:
        options.output.write_text(page(recorder.outcomes, time.perf_counter() - start), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
