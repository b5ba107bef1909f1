"""Whether a checkpoint is complete and sound, alone or against another one."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_mimo.checkpoint_mimo_v2 import (
    FP8_DTYPE,
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    check_tensors,
    find_layout,
    read_config,
    read_json_object,
    sum_parts,
    take_mtp_layers_from_files,
)
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors

from .audio_tokenizer_table import FOLDER, WEIGHTS_NAME, check_audio_tokenizer
from .checksums import check_manifest, files_below, read_manifest, write_manifest
from .compare import STEP, Comparison, Side, compare, listed
from .row_reader import RowReader


# A scale is the largest magnitude of a block over 448. Above 146 that magnitude overflows float16 (65504), which no
# trained weight comes near. Below 2**-50 a block is dead: exporters that bound the magnitude of an empty block do it
# at 1e-12 or above, which gives 2.2e-15.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-50, 65504 / 448

# The same for the exponents of MXFP4, where a code is at most 6 and an empty block may have any small exponent:
# 2**(140 - 127) * 6 = 49152. 255 is NaN.
LARGEST_EXPONENT = 140

# the bits of a NaN code of float8_e4m3fn, without its sign
NAN_CODE = 0x7F


@dataclass
class VerifyReport:
    """What `verify` looked at and found. `problems` is empty for a sound checkpoint.

    `scales` has the smallest and largest finite FP8 scale per part, `audio_tokenizer` the number of its tensors.
    """

    name: str
    headers_only: bool
    files: int
    tensors: int
    elements: int
    parameters: int
    bytes: int
    parts: dict[str, dict[str, Any]]
    layout: str | None = None
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    audio_tokenizer: int | None = None
    manifest: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def verify(
    a: str | Path,
    b: str | Path | None = None,
    headers_only: bool = False,
    manifest: str | Path | None = None,
    progress: bool = True,
    write_sums: str | Path | None = None,
) -> VerifyReport:
    """Checks the checkpoint in folder `a` (or one .safetensors file), and compares it with `b`.

    Names, shapes and dtypes against config.json, index against headers, `audio_tokenizer/`; then, unless
    `headers_only`, every value: FP8 scales, NaN codes, NaN and infinity in floats. Memory stays below some 200 MB.

    Args:
        manifest: a list of sha256 sums, as `sha256sum` writes it, to check the files of `a` against.
        progress: bars on stderr, where it is a terminal.
        write_sums: where to write such a list for the files of `a`.

    Raises:
        FileNotFoundError, ValueError: a folder that cannot be read as a checkpoint at all.
    """
    name, a = str(a), Path(a)
    config, checkpoint = read_checkpoint(a)
    report = _check_headers(name, config, checkpoint)
    report.headers_only = headers_only
    report.problems += _check_total_size(a, report.bytes)
    audio = _check_audio_folder(a, config, report)
    if not headers_only:
        _check_values([checkpoint, *audio], config, report, progress)
    if b is not None:
        _compare_with(Path(b), a, config, checkpoint, audio, headers_only, report, progress)
    if manifest is not None or write_sums is not None:
        _check_sums(a, manifest and Path(manifest), write_sums and Path(write_sums), report, progress)
    return report


def read_checkpoint(path: Path) -> tuple[MiMoV2Config | None, Checkpoint]:
    """Config (None without one) and headers of a folder or of one file; one shard of several has no config."""
    if path.is_file():
        folder, checkpoint = path.parent, Checkpoint.from_files([path])
        has_config = not (folder / INDEX_NAME).is_file() and (folder / "config.json").is_file()
    else:
        folder, checkpoint = path, Checkpoint.from_folder(path)
        has_config = (folder / "config.json").is_file()
    config = read_config(folder / "config.json") if has_config else None
    if config is not None:
        take_mtp_layers_from_files(config, checkpoint.tensors)
    return config, checkpoint


def _check_headers(name: str, config: MiMoV2Config | None, checkpoint: Checkpoint) -> VerifyReport:
    tensors = checkpoint.tensors
    parts = sum_parts(released_tensors(config) if config else {}, tensors)
    report = VerifyReport(
        name,
        headers_only=True,
        files=len(checkpoint.files),
        tensors=len(tensors),
        elements=sum(math.prod(info.shape) for info in tensors.values()),
        parameters=sum(sums["parameters"] for sums in parts.values()),
        bytes=sum(info.nbytes for info in tensors.values()),
        parts=parts,
    )
    if config is None:
        report.problems.append(f"{name}: expected config.json beside all files, got none; names are not checked")
        return report
    try:
        report.layout = find_layout(config, tensors)[0]
        check_tensors(config, tensors)
    except CheckpointError as error:
        report.problems += error.problems
    except (ValueError, NotImplementedError) as error:
        report.problems.append(str(error))
    return report


def _check_total_size(folder: Path, total: int) -> list[str]:
    """The sum that an index may give; the names in it are checked when headers are read."""
    if not (folder / INDEX_NAME).is_file():
        return []
    metadata = read_json_object(folder / INDEX_NAME).get("metadata")
    said = metadata.get("total_size", total) if isinstance(metadata, dict) else total
    return [] if said == total else [f"{INDEX_NAME}: expected `total_size` {total} bytes, got {str(said)[:40]}"]


def _check_audio_folder(folder: Path, config: MiMoV2Config | None, report: VerifyReport) -> list[Checkpoint]:
    """The audio tokenizer as a checkpoint, or nothing where there is none; its problems go to the report."""
    if not folder.is_dir() or config is None or (config.audio_config is None and not (folder / FOLDER).is_dir()):
        return []
    tensors, problems = check_audio_tokenizer(folder)
    report.audio_tokenizer = len(tensors)
    report.problems += problems
    return [Checkpoint([folder / WEIGHTS_NAME], tensors)] if tensors else []


def _bar(total: int, what: str, progress: bool) -> tqdm:
    # None: no bar where stderr is not a terminal
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if progress else True)


def _check_values(
    checkpoints: list[Checkpoint], config: MiMoV2Config | None, report: VerifyReport, progress: bool
) -> None:
    """Reads every tensor once, in the order of the files, and reports the unsound ones by name."""
    table = released_tensors(config) if config else {}
    found: dict[str, list[str]] = {}
    total = sum(info.nbytes for checkpoint in checkpoints for info in checkpoint.tensors.values())
    with _bar(total, "values", progress) as bar:
        for checkpoint in checkpoints:
            reader = RowReader(checkpoint.tensors)
            for name, info in checkpoint.tensors.items():
                check, what = _value_check(name, info, checkpoint.tensors)
                bad, zero = 0, math.prod(info.shape) > 0
                for rows in reader.blocks(name, STEP):
                    bad += check(rows) if check else 0
                    zero = zero and not bool(rows.contiguous().view(torch.uint8).any())
                    if name.endswith("_scale_inv") and info.dtype == "F32":
                        _note_scales(report, table, name, rows)
                if bad:
                    found.setdefault(what, []).append(f"{name} ({bad:,})")
                # biases, and rows of a codebook that was never used, may be zero
                elif zero and len(info.shape) > 1 and "_codebook." not in name:
                    found.setdefault("all zero: a hole of an incomplete download?", []).append(name)
                bar.update(info.nbytes)
    report.problems += [f"{what} ({len(names)}): {listed(names)}" for what, names in found.items()]


def _value_check(
    name: str, info: TensorInfo, tensors: dict[str, TensorInfo]
) -> tuple[Callable[[torch.Tensor], int] | None, str]:
    """A function that counts unsound values of a row block, and what they are."""
    if info.dtype == FP8_DTYPE:
        return _count_nan_codes, "NaN codes in FP8 weights"
    if name.endswith("_scale_inv") and info.dtype == "F32":
        return _count_odd_scales, f"FP8 scales outside [{SMALLEST_SCALE:.2g}, {LARGEST_SCALE:.4g}] or not finite"
    if info.dtype == "U8" and name.removesuffix("_scale") in tensors and name.endswith("_scale"):
        return lambda rows: int((rows > LARGEST_EXPONENT).sum()), f"MXFP4 exponents above {LARGEST_EXPONENT} or NaN"
    if info.dtype in ("F64", "F32", "F16", "BF16"):
        return lambda rows: int((~torch.isfinite(rows)).sum()), "NaN or infinite values"
    return None, ""


def _count_nan_codes(rows: torch.Tensor) -> int:
    # the maxima are vectorised: the slow count is for tensors that have NaN codes
    if int(rows.view(torch.int8).amax()) != NAN_CODE and int(rows.view(torch.uint8).amax()) != NAN_CODE | 0x80:
        return 0
    return int((rows.view(torch.uint8).bitwise_and(NAN_CODE) == NAN_CODE).sum())


def _count_odd_scales(rows: torch.Tensor) -> int:
    # NaN is in no range
    return int((~((rows >= SMALLEST_SCALE) & (rows <= LARGEST_SCALE))).sum())


def _note_scales(report: VerifyReport, table: dict, name: str, rows: torch.Tensor) -> None:
    weight = name.removesuffix("_scale_inv")
    part = table[weight].part if weight in table else "unknown"
    finite = rows[torch.isfinite(rows)]
    if finite.numel():
        low, high = report.scales.get(part, (math.inf, -math.inf))
        report.scales[part] = (min(low, finite.min().item()), max(high, finite.max().item()))


def _compare_with(
    b: Path,
    a: Path,
    config: MiMoV2Config | None,
    checkpoint: Checkpoint,
    audio: list[Checkpoint],
    headers_only: bool,
    report: VerifyReport,
    progress: bool,
) -> None:
    """Fills `report.comparison`; with headers alone only names, shapes and dtypes are compared."""
    other_config, other = read_checkpoint(b)
    other_report = _check_headers(str(b), other_config, other)
    other_audio = _check_audio_folder(b, other_config, other_report)
    report.problems += [f"{b}: {problem}" for problem in other_report.problems]
    if headers_only:
        report.problems += _compare_headers(checkpoint.tensors, other.tensors)
        return
    if len(audio) != len(other_audio):
        report.problems.append(f"{FOLDER}/: only in {a if audio else b}")
    pairs = [("", Side(checkpoint, config), Side(other, other_config))]
    pairs += [(f"{FOLDER}: ", Side(one, None), Side(two, None)) for one, two in zip(audio, other_audio)]
    total = sum(info.nbytes for _, left, _ in pairs for info in left.checkpoint.tensors.values())
    whole = Comparison()
    with _bar(total, "compared", progress) as bar:
        for where, left, right in pairs:
            result = compare(left, right, where, bar.update)
            whole.groups |= result.groups
            whole.problems += result.problems
    report.problems += whole.problems
    report.comparison = whole.to_dict()


def _compare_headers(tensors: dict[str, TensorInfo], others: dict[str, TensorInfo]) -> list[str]:
    """Names, shapes and dtypes of two checkpoints that should be stored alike."""
    differ = [
        f"{name} ({info.dtype} {list(info.shape)}, {others[name].dtype} {list(others[name].shape)})"
        for name, info in tensors.items()
        if name in others and (info.dtype, info.shape) != (others[name].dtype, others[name].shape)
    ]
    kinds = (
        ("only in A", sorted(tensors.keys() - others.keys())),
        ("only in B", sorted(others.keys() - tensors.keys())),
        ("stored otherwise (A, B)", differ),
    )
    return [f"{what} ({len(names)}): {listed(names)}" for what, names in kinds if names]


def _check_sums(
    folder: Path, manifest: Path | None, written: Path | None, report: VerifyReport, progress: bool
) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to take sha256 sums of, got a file.")
    if manifest is not None:
        sums = read_manifest(manifest)
        total = sum((folder / path).stat().st_size for path in sums if (folder / path).is_file())
        with _bar(total, "sha256", progress) as bar:
            problems = list(check_manifest(folder, sums, bar.update))
        report.problems += [f"{manifest.name}: {problem}" for problem in problems]
        report.manifest = {"checked": str(manifest), "files": len(sums), "differ": len(problems)}
    if written is not None:
        skipped = {path.resolve() for path in (manifest, written) if path is not None}
        files = [path for path in files_below(folder) if (folder / path).resolve() not in skipped]
        with _bar(sum((folder / path).stat().st_size for path in files), "sha256", progress) as bar:
            write_manifest(folder, written, files, bar.update)
        report.manifest = (report.manifest or {}) | {"written": str(written), "files": len(files)}


__all__ = ["LARGEST_SCALE", "SMALLEST_SCALE", "VerifyReport", "read_checkpoint", "verify"]
