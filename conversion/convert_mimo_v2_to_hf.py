"""Converts a checkpoint between the released format and the Hub's, and between dtypes, tensor by tensor.

    convert("/models/MiMo-V2.5", "/models/MiMo-V2.5-bf16", dtype="bf16")

The way: plan everything and check every name, shape and dtype; see that the disk has room; write shards into
`<dst>.partial`, each noted in a journal when it is whole; last index and config.json; then the folder gets its name.
A folder called `dst` is therefore always complete, and an interrupted run goes on with `resume=True`.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from modeling_mimo.checkpoint_mimo_v2 import INDEX_NAME

from .checkpoint import Source, open_headers, open_source, repository_revision
from .companions import Companions, find_companions
from .converters import PARTS, Plan, is_exact, parse_parts, plan_conversions
from .journal import JOURNAL_NAME, Journal
from .shard_plan import Shard, index_of, plan_shards
from .shard_worker import ShardWorker
from .stored_weight import FP8, Difference
from .target_config import target_config


MAX_MEMORY = 4 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass
class ConversionReport:
    """What a conversion did, or with `dry_run` would do.

    `files`: name, bytes, sha256 and number of tensors of every file (sha256 is None in a dry run). `total_size`: bytes
    of all tensors, as the index says. `peak_memory`: most bytes of tensors in flight. `errors`: per group of weights
    that were requantized, the number of tensors, the largest difference relative to the largest value of its tensor,
    and the mean difference relative to the mean value. `changes`: everything that is not as in the source, in words.
    """

    source: str
    revision: str | None
    to: str
    dtype: str
    layout: str
    parts: list[str]
    total_size: int
    tensors: int
    peak_memory: int
    files: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, dict[str, float | int]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Work(NamedTuple):
    """Everything that is known before the first byte is written."""

    source: Source
    plan: Plan
    shards: list[Shard]
    companions: Companions
    config: dict[str, Any]
    index: dict[str, Any]
    report: ConversionReport


def parse_size(size: str | int | None, name: str) -> int | None:
    """`"5GB"`, `"32GiB"` or a number of bytes -> bytes. ValueError names the argument `name`."""
    if size is None or isinstance(size, int):
        value = size
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size.strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        value = None if unit is None else int(float(match[1]) * unit)
    if size is not None and (value is None or value < 1):
        raise ValueError(f"{name}: expected a size such as 5GB, 500MB or 32GiB, got {size!r}.")
    return value


def convert(
    src: str | os.PathLike | Source,
    dst: str | os.PathLike | None,
    to: str = "hub",
    dtype: str = "keep",
    layout: str | None = None,
    shard_size: int | str | None = None,
    only: str | Collection[str] | None = None,
    jobs: int = 1,
    max_memory: int | str = MAX_MEMORY,
    dry_run: bool = False,
    resume: bool = False,
    rank_layout: str | os.PathLike | None = None,
    progress: bool = True,
) -> ConversionReport:
    """Writes the checkpoint `src` to the new folder `dst` in another form.

    Args:
        src: a folder, a Hub repository or a `Source`.
        to: "hub" (standard names and shards, for `from_pretrained`) or "xiaomi" (released names, chunked QKV and
            expert ranks, for vLLM and SGLang).
        dtype: of the weights that the releases quantize: "keep" copies bytes, "fp8", "mxfp4" (experts; the rest FP8);
            of all weights but the router: "bf16", "fp16".
        layout: attention projections "split" or "fused"; None leaves them as they are.
        shard_size: bytes of a file, e.g. "5GB" (hub, the default) or "32GiB" (xiaomi, the default).
        only: parts out of "text", "mtp", "vision", "audio"; None for all there are.
        jobs: files that are written at the same time.
        max_memory: ceiling for tensors in flight, beside the interpreter and its libraries.
        dry_run: plan and report only; config.json and index are enough, `dst` may be None.
        resume: go on with an interrupted run of the same arguments.
        rank_layout: a description of rank folders, see `open_source`.

    Raises:
        ValueError: an unknown, missing or mis-shaped tensor, a choice the target does not have, a destination that is
            not empty, no room on the disk, a source that changed: nothing is left that loads as a checkpoint.
        OSError: the disk is full or fails; `<dst>.partial` is kept for `resume`.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}.")
    limit = parse_size(max_memory, "max_memory")
    if isinstance(src, (str, os.PathLike)):
        src = (open_headers if dry_run else open_source)(src, rank_layout)
    work = _prepare(src, to, dtype, layout, parse_size(shard_size, "shard_size"), parse_parts(only), jobs, limit)
    if dry_run:
        work.report.dry_run = True
        return work.report
    _write(work, Path(dst), jobs, limit, resume, progress)
    return work.report


def _prepare(
    source: Source,
    to: str,
    dtype: str,
    layout: str | None,
    shard_size: int | None,
    parts: tuple[str, ...],
    jobs: int,
    max_memory: int,
) -> _Work:
    plan = plan_conversions(source, to, dtype, layout, parts)
    largest = max(plan.conversions, key=lambda conversion: conversion.peak_bytes)
    if largest.peak_bytes > max_memory:
        raise ValueError(
            f"max_memory: expected at least {largest.peak_bytes} bytes for {largest.source[0].name}, got {max_memory}."
        )
    shards = plan_shards(plan, source, to, dtype, shard_size)
    companions = find_companions(source, to, plan.parts)
    config, index = target_config(source.config, plan, to, dtype), index_of(shards, plan, to)
    report = ConversionReport(
        source=source.name,
        revision=repository_revision(source.folder),
        to=to,
        dtype=dtype,
        layout=plan.layout,
        parts=list(plan.parts),
        total_size=index["metadata"]["total_size"],
        tensors=len(index["weight_map"]),
        peak_memory=min(max_memory, jobs * largest.peak_bytes),
        files=_planned_files(shards, companions),
        changes=_changes(source, plan, config, companions),
    )
    return _Work(source, plan, shards, companions, config, index, report)


def _planned_files(shards: list[Shard], companions: Companions) -> list[dict[str, Any]]:
    files = [
        {"name": shard.file, "bytes": shard.size, "sha256": None, "tensors": len(shard.tensors)} for shard in shards
    ]
    for name, path in companions.copies.items():
        files.append({"name": name, "bytes": path.stat().st_size, "sha256": None})
    return files


def _changes(source: Source, plan: Plan, config: dict[str, Any], companions: Companions) -> list[str]:
    """Everything that is not as in the source, one line each."""
    dtypes = Counter(
        (item.source[0].dtype, item.target[0].dtype)
        for item in plan.conversions
        if item.source[0].dtype != item.target[0].dtype
    )
    lines = [f"{count} weights {before} -> {after}" for (before, after), count in sorted(dtypes.items())]
    if plan.layout != plan.source_layout:
        moved = [item for item in plan.conversions if item.sizes is not None]
        line = f"{len(moved)} attention projections {plan.source_layout} -> {plan.layout}"
        fp8 = [item for item in moved if item.source[0].dtype == item.target[0].dtype == FP8]
        inexact = [item for item in fp8 if not is_exact(item)]
        lines.append(f"{line}, FP8 blocks requantized in {len(inexact)} of them" if inexact else line)
    for key in sorted(source.config.keys() | config.keys()):
        if key not in config:
            lines.append(f"config.json: {key} removed")
        elif key not in source.config or source.config[key] != config[key]:
            value = json.dumps(config[key])
            lines.append(f"config.json: {key} = {value if len(value) <= 60 else '(changed)'}")
    lines += [f"{name} added" for name in companions.texts]
    lines += [f"left out: {name}" for name in companions.left_out]
    missing = [part for part in PARTS if part not in plan.parts and part in _parts_of(source)]
    if missing:
        note = "" if "text" in plan.parts else "; from_pretrained needs the rest of the checkpoint beside it"
        lines.append(f"left out: the tensors of {', '.join(missing)}{note}")
    return lines


def _parts_of(source: Source) -> set[str]:
    """Which of PARTS the source has, by its names."""
    prefixes = {"model.mtp.": "mtp", "visual.": "vision", "speech_embeddings.": "audio", "audio_encoder.": "audio"}
    found = set()
    for name in source.tensors:
        found.add(next((part for prefix, part in prefixes.items() if name.startswith(prefix)), "text"))
    return found


def _write(work: _Work, dst: Path, jobs: int, max_memory: int, resume: bool, progress: bool) -> None:
    partial = _partial_folder(work.source, dst, resume)
    header = {"source": _fingerprint(work), "plan": _plan_hash(work)}
    partial.mkdir(parents=True, exist_ok=True)
    journal = Journal(partial / JOURNAL_NAME, header, resume)
    try:
        open_files = [file for file in work.report.files if file["name"] not in journal.done]
        needed = sum(file["bytes"] for file in open_files)
        free = shutil.disk_usage(partial).free
        if needed > free:
            raise ValueError(f"{dst}: expected {needed} bytes free on its disk, got {free}.")
        total = sum(file["bytes"] for file in work.report.files)
        with tqdm(
            desc="convert", total=total, initial=total - needed, unit="B", unit_scale=True, disable=_quiet(progress)
        ) as bar:
            worker = ShardWorker(work.source, partial, journal, max_memory, bar.update)
            worker.run(work.shards, work.companions.copies, jobs)
        if _fingerprint(work) != header["source"]:
            raise ValueError(f"source: expected files that stay as they are, got a change while {dst} was written.")
        _complete_report(work, journal)
        _write_texts(work, partial)
    finally:
        journal.close()
    if dst.is_dir():
        dst.rmdir()
    os.rename(partial, dst)
    (dst / JOURNAL_NAME).unlink()


def _quiet(progress: bool) -> bool | None:
    # None: no bar where stderr is not a terminal
    return None if progress else True


def _partial_folder(source: Source, dst: Path, resume: bool) -> Path:
    """`<dst>.partial`. ValueError: something is in the way."""
    partial = dst.with_name(dst.name + ".partial")
    if source.folder is not None and dst.resolve().is_relative_to(source.folder.resolve()):
        raise ValueError(f"{dst}: expected a folder outside of the source {source.folder}, got one inside.")
    if resume and (dst / JOURNAL_NAME).is_file() and not partial.exists():
        # the run ended between its last two steps
        os.rename(dst, partial)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: expected a new or an empty folder, got one with files.")
    if partial.exists() and not resume:
        raise ValueError(f"{partial}: expected none, got what an interrupted run left: --resume goes on with it.")
    return partial


def _fingerprint(work: _Work) -> dict[str, list[int]]:
    stats = {name: path.stat() for name, path in work.companions.copies.items()}
    return work.source.fingerprint() | {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _plan_hash(work: _Work) -> str:
    """One value for everything that decides what is written."""
    shards = [[shard.file, shard.metadata, list(shard.tensors.items())] for shard in work.shards]
    what = [shards, work.config, work.index["metadata"], work.plan.layout, sorted(work.companions.copies)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _complete_report(work: _Work, journal: Journal) -> None:
    totals: dict[str, Difference] = {}
    for file in work.report.files:
        line = journal.done[file["name"]]
        file["sha256"] = line["sha256"]
        # in the order of the plan, so that the sums do not depend on which worker was first
        for group, values in line.get("errors", {}).items():
            totals[group] = totals.get(group, Difference()) + Difference(*values)
    work.report.errors = {group: total.to_dict() for group, total in sorted(totals.items())}


def _write_texts(work: _Work, folder: Path) -> None:
    """Everything small; index and config.json last."""
    texts = dict(work.companions.texts)
    if work.report.to == "hub" and "text" in work.plan.parts:
        from .model_card import model_card

        texts["README.md"] = model_card(work.config, work.report.to_dict(), None, None)
    texts[INDEX_NAME] = json.dumps(work.index, indent=2)
    texts["config.json"] = json.dumps(work.config, indent=2)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


__all__ = ["MAX_MEMORY", "ConversionReport", "convert", "parse_size"]
