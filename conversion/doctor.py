"""What users trip over with a checkpoint's folder, in plain words and with the fix. Headers and small files only."""

import os
import re
import shlex
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

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
    take_mtp_layers_from_files,
)
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config

from .doctor_companions import check_audio_tokenizer_folder, check_processor, check_template, check_tokenizer
from .findings import SEVERITIES, Finding, Release, download, nearest_release


# what downloaders call a file that is not whole yet
UNFINISHED = (".incomplete", ".partial", ".part", ".aria2", ".crdownload")
LFS_MARK = b"version https://git-lfs"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MTP_FILE = "model_mtp.safetensors"

WEIGHTS_WHY = "loading stops, or would use random numbers in place of weights"


class Diagnosis(NamedTuple):
    """Findings, worst first; `config` and `tensors` as far as they could be read, for what depends on the machine."""

    findings: list[Finding]
    config: MiMoV2Config | None
    tensors: dict[str, TensorInfo] | None
    is_complete: bool

    @property
    def is_healthy(self) -> bool:
        """Notes are no sickness."""
        return all(finding.severity == "note" for finding in self.findings)


def diagnose(folder: str | Path) -> Diagnosis:
    """Looks at everything in a checkpoint's folder but the values of its weights.

    FileNotFoundError: no such folder. Whatever is wrong in the folder is a finding.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a checkpoint's folder, got {'a file' if folder.exists() else 'nothing'}."
        )
    findings = check_packages() + check_downloads(folder)
    values, config = _read_config(folder, findings)
    # a pointer or half a file was reported: its header would only say the same in other words
    tensors = _read_tensors(folder, findings, 1 if any(finding.severity == "error" for finding in findings) else 20)
    text_only = values.get("vision_config") is None and not any(name.startswith("visual.") for name in tensors or ())
    release = nearest_release(values, text_only)
    is_complete = False
    if config is not None:
        findings += check_config(folder, values, release)
        if tensors is not None:
            weights = check_weights(folder, values, config, tensors, release)
            is_complete = not any(finding.severity == "error" for finding in weights)
            findings += weights
        findings += check_audio_tokenizer_folder(folder, config, release)
        findings += check_tokenizer(folder, values, release)
        findings += check_template(folder, release)
        findings += check_processor(folder, values, release)
        findings += check_other_engines(folder, values)
    if tensors is not None:
        findings += check_disk(folder, sum(info.nbytes for info in tensors.values()))
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(findings, config, tensors, is_complete)


def check_packages() -> list[Finding]:
    """Installed versions are those that the package was made for."""
    findings = []
    for text in metadata.requires("modeling-mimo") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} {version} is installed, expected {requirement.specifier or 'any version'}"
            why = "interfaces change between versions: imports and loading may fail"
            findings.append(Finding("error", what, why, f'pip install "{requirement.name}{requirement.specifier}"'))
    return findings


def check_downloads(folder: Path) -> list[Finding]:
    """Git LFS pointers in place of files, files that a download left half done, pickles."""
    pointers, unfinished, pickles = [], [], []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".git"]
        for path in (Path(place, name) for name in names):
            shown = str(path.relative_to(folder))
            if path.suffix in UNFINISHED:
                unfinished.append(shown)
            elif path.is_file():
                pickles += [shown] if path.suffix in PICKLES else []
                with path.open("rb") as file:
                    pointers += [shown] if file.read(len(LFS_MARK)) == LFS_MARK else []
    again = download(folder, "", None).replace("  ", " ")
    findings = []
    if pointers:
        what = f"Git LFS pointers in place of files ({len(pointers)}): {_some(pointers)}"
        why = "the repository was cloned without Git LFS: these are texts of 130 bytes that name the real files"
        findings.append(Finding("error", what, why, f"git -C {shlex.quote(str(folder))} lfs pull"))
    if unfinished:
        what = f"files of an unfinished download ({len(unfinished)}): {_some(unfinished)}"
        findings.append(Finding("error", what, "files may be missing or cut", f"run the download again: {again}"))
    if pickles:
        what = f"pickled files ({len(pickles)}): {_some(pickles)}"
        why = "reading a pickle can run any program; nothing here reads them"
        findings.append(Finding("note", what, why, "keep only the .safetensors files"))
    return findings


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def _read_config(folder: Path, findings: list[Finding]) -> tuple[dict[str, Any], MiMoV2Config | None]:
    """(contents of config.json, config); what is wrong with it joins `findings`."""
    path = folder / "config.json"
    try:
        values = read_json_object(path)
    except (OSError, ValueError) as error:
        why = "nothing can be loaded without it"
        findings.append(Finding("error", str(error), why, download(folder, "config.json", None)))
        return {}, None
    try:
        return values, read_config(path)
    except (ValueError, NotImplementedError) as error:
        why = "the first upload of some releases lacked keys; a wrong value changes every answer"
        fix = download(folder, "config.json", None) + ", or correct the key"
        findings.append(Finding("error", str(error), why, fix))
        return values, None


def _read_tensors(folder: Path, findings: list[Finding], most: int) -> dict[str, TensorInfo] | None:
    """Headers of the weights; the first `most` things that are wrong with them join `findings`."""
    try:
        return Checkpoint.from_folder(folder).tensors
    except CheckpointError as error:
        problems = error.problems
    except (OSError, ValueError) as error:
        problems = [str(error)]
    fix = "run the download again: " + download(folder, "", None).replace("  ", " ")
    findings += [Finding("error", problem, WEIGHTS_WHY, fix) for problem in problems[:most]]
    return None


def check_config(folder: Path, values: dict[str, Any], release: Release | None) -> list[Finding]:
    """Values that the published config.json of this geometry does not have: from a replaced upload, or edited."""
    if release is None or not release.differ:
        return []
    pairs = [
        f"{key} is {str(got)[:40]}, published {str(there)[:40]}"
        for key, (got, there) in sorted(release.differ.items())
    ]
    what = f"config.json differs from that of {release.name}: {'; '.join(pairs[:12])}"
    what += f" and {len(pairs) - 12} more" if len(pairs) > 12 else ""
    why = "files of the first upload were replaced, and the publisher says that old copies make the model worse"
    return [Finding("warning", what, why, download(folder, "config.json tokenizer_config.json", release))]


def check_weights(
    folder: Path,
    values: dict[str, Any],
    config: MiMoV2Config,
    tensors: dict[str, TensorInfo],
    release: Release | None,
) -> list[Finding]:
    """Names, shapes and dtypes fit the config; draft heads are there; row order and quantization are as they say."""
    findings = check_mtp(folder, values, config, tensors, release)
    take_mtp_layers_from_files(config, tensors)
    try:
        layout, source = find_layout(config, tensors)
        check_tensors(config, tensors)
    except CheckpointError as error:
        fix = "mimo inspect lists them; " + download(folder, "", release).replace("  ", " ")
        return findings + [Finding("error", problem[:2000], WEIGHTS_WHY, fix) for problem in error.problems[1:]]
    except (ValueError, NotImplementedError) as error:
        return [*findings, Finding("error", str(error)[:2000], WEIGHTS_WHY, "mimo inspect says more")]
    fp8 = any(info.dtype == FP8_DTYPE for info in tensors.values())
    return findings + check_layout(folder, config, layout, source, fp8) + check_quantization(folder, values, fp8)


def check_mtp(
    folder: Path,
    values: dict[str, Any],
    config: MiMoV2Config,
    tensors: dict[str, TensorInfo],
    release: Release | None,
) -> list[Finding]:
    """All draft heads are in the files and in the index."""
    found = {name.split(".")[3] for name in tensors if re.match(r"model\.mtp\.layers\.\d+\.", name)}
    expected = config.num_mtp_layers
    if len(found) >= expected:
        return []
    here = f"{len(found)} of {expected} draft heads (model.mtp.*) in the files"
    why = "generate(..., use_mtp=True) drafts fewer tokens or none: 2 to 2.6 times slower on the publisher's numbers"
    if (folder / MTP_FILE).is_file():
        what = f"{here}, though {MTP_FILE} is there: {INDEX_NAME} does not name it"
        return [Finding("warning", what, why, download(folder, INDEX_NAME, release))]
    fix = download(folder, f"{MTP_FILE} {INDEX_NAME}", release) + ", or convert the original again with `mimo convert`"
    return [Finding("warning", f"{here}; many converters drop them", why, fix)]


def check_layout(folder: Path, config: MiMoV2Config, layout: str, source: str, fp8: bool) -> list[Finding]:
    """Row order of the fused projections: what this package sees, and what other engines will take it for."""
    if config.attention_projection_layout != "fused_qkv":
        return []
    place = shlex.quote(str(folder))
    if layout == "plain":
        what = f"rows of qkv_proj are plain [Q; K; V], not in the released chunks ({source})"
        why = "this package reads both; vLLM and SGLang expect chunks under this config and answer with garbage"
        severity = "note" if config.fused_qkv_layout == "plain" else "warning"
        return [Finding(severity, what, why, f"mimo convert {place} NEW_FOLDER --to xiaomi --layout fused")]
    if config.fused_qkv_layout is None and not fp8:
        what = "the row order of qkv_proj cannot be told: without FP8 scales both orders have the same shapes"
        why = "the released order (chunks) is taken; a re-export with plain [Q; K; V] rows would answer with garbage"
        fix = (
            f"compare with the original: mimo verify ORIGINAL {place}; if rows are plain, "
            'add "fused_qkv_layout": "plain" to config.json'
        )
        return [Finding("note", what, why, fix)]
    return []


def check_quantization(folder: Path, values: dict[str, Any], fp8: bool) -> list[Finding]:
    """quantization_config says what the weights are, and what other loaders make of it."""
    said = values.get("quantization_config")
    if isinstance(said, dict) and not fp8:
        what = "config.json has quantization_config, and no weight is FP8"
        why = "other engines look for scales and fail"
        return [Finding("warning", what, why, f"remove quantization_config from {folder / 'config.json'}")]
    if said is None and fp8:
        what = "weights are FP8, and config.json has no quantization_config"
        why = "FP8 codes would be taken for the weights themselves, without their scales"
        return [Finding("error", what, why, download(folder, "config.json", None))]
    return []


def check_other_engines(folder: Path, values: dict[str, Any]) -> list[Finding]:
    """Traps of the published files for programs other than this package."""
    findings = []
    if values.get("auto_map"):
        what = "config.json has auto_map, remote code"
        why = "it is not needed: the remote code takes chunked rows for plain ones and cannot draft"
        fix = "import modeling_mimo, and leave trust_remote_code out"
        findings.append(Finding("note", what, why, fix))
    said = values.get("quantization_config")
    ignored = said.get("ignored_layers") if isinstance(said, dict) else None
    if isinstance(ignored, list) and "lm_head" not in ignored:
        what = "quantization_config.ignored_layers names only o_proj"
        why = "loaders that take every other Linear for FP8 break lm_head, router, vision, audio and the draft heads"
        findings.append(Finding("note", what, why, "nothing to do here: this package goes by the dtypes in the files"))
    return findings


def check_disk(folder: Path, size: int) -> list[Finding]:
    """Room for a converted copy on the same disk."""
    free = shutil.disk_usage(folder).free
    if free >= size:
        return []
    what = f"{free / 1e9:,.0f} GB free on this disk, the weights take {size / 1e9:,.0f} GB"
    why = "a conversion on this disk stops before it starts; to bf16 it takes twice as much"
    return [Finding("note", what, why, "mimo convert to another disk")]


__all__ = ["Diagnosis", "Finding", "diagnose"]
