"""What the package knows about the published checkpoints, and how a command finds its target.

Configs and the tensor list of V2.5 are package data. V2.5's config.json is the published file byte for byte,
V2.5-Pro's is a public print of it, V2.6-Flash-RL's is a transcription without the vision, audio and processor parts,
and V2-Flash's is V2.5's with the published differences applied.
"""

from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from modeling_mimo.checkpoint_mimo_v2 import (
    INDEX_NAME,
    SINGLE_FILE_NAME,
    Checkpoint,
    TensorInfo,
    read_config,
    read_header,
)
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.conversion.sparse_release import MANIFEST_NAME, read_released_manifest


class Release(NamedTuple):
    """Totals of one published checkpoint. `elements` counts what headers say, with scales; `parameters` without."""

    tensors: int
    elements: int
    parameters: int
    bytes: int


RELEASES = {
    # certain: the index was rebuilt to its published hash, and all 17 files close to the byte
    "MiMo-V2.5": Release(73_081, 310_775_040_000, 310_756_322_688, 315_031_102_208),
    # tensors, elements and 962.40 GiB from a public report; parameters and exact bytes computed from the table
    "MiMo-V2.5-Pro": Release(159_581, 1_023_244_718_976, 1_023_182_841_600, 1_033_369_538_304),
    # certain: published sums per dtype and bytes agree; parameters count two per U8 byte of an expert
    "MiMo-V2.6-Flash-RL": Release(73_081, 168_821_311_488, 310_756_322_688, 172_923_364_096),
    # published sums per dtype; parameters computed: Pro's with vision and audio of 6144 output features
    "MiMo-V2.6-Pro-RL": Release(160_040, 555_378_132_864, 1_024_216_603_392, 566_027_990_784),
    # inferred from the table of a split checkpoint with three MTP layers
    "MiMo-V2-Flash": Release(72_826, 309_785_317_824, 309_766_601_088, 313_051_656_704),
}

DATA = resources.files("modeling_mimo") / "data"


class Target(NamedTuple):
    """What PATH meant: a folder, a file or a shipped name. `config` or `tensors` is None where there is none."""

    name: str
    kind: str
    config: MiMoV2Config | None
    tensors: dict[str, TensorInfo] | None


def shipped_names() -> list[str]:
    """Names of the releases with a config.json in the package."""
    # MiMo-Micro lies beside them, and is none
    named = (entry for entry in DATA.iterdir() if entry.name.startswith("MiMo-"))
    return sorted(entry.name for entry in named if (entry / "config.json").is_file())


def shipped_config(name: str) -> MiMoV2Config:
    """Config of a release by name. ValueError: no such name."""
    if name not in shipped_names():
        raise ValueError(f"{name}: expected a folder, a .safetensors file or one of {', '.join(shipped_names())}.")
    with resources.as_file(DATA / name / "config.json") as path:
        return read_config(path)


def shipped_manifest(name: str) -> dict[str, TensorInfo] | None:
    """Every tensor of a release by name (`file` is a bare file name), or None if the package has no list of it."""
    return read_released_manifest(name) if (DATA / name / MANIFEST_NAME).is_file() else None


def read_target(path: str, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> Target:
    """Config and headers of a folder, of one .safetensors file, or of a shipped name; a path wins over a name.

    One shard of several has no config: nothing could be checked against it.

    Raises:
        ValueError, FileNotFoundError: nothing readable there; the message names it.
    """
    place = Path(path)
    if place.is_dir():
        has_files = (place / INDEX_NAME).is_file() or (place / SINGLE_FILE_NAME).is_file()
        config = _config_beside(place)
        if config is None and not has_files:
            raise FileNotFoundError(f"{path}: expected config.json, {INDEX_NAME} or {SINGLE_FILE_NAME}, got neither.")
        return Target(path, "folder", config, Checkpoint.from_folder(place, progress).tensors if has_files else None)
    if place.is_file():
        config = None if (place.parent / INDEX_NAME).is_file() else _config_beside(place.parent)
        return Target(path, "file", config, read_header(place))
    return Target(path, "shipped", shipped_config(path), shipped_manifest(path))


def _config_beside(folder: Path) -> MiMoV2Config | None:
    path = folder / "config.json"
    return read_config(path) if path.is_file() else None


def match_release(totals: Release) -> dict | None:
    """The release that shares most totals: `{"name", "match": [...], "differ": [...]}`; None if it shares none."""
    best = None
    for name, release in RELEASES.items():
        match = [field for field in Release._fields if getattr(totals, field) == getattr(release, field)]
        differ = [field for field in Release._fields if field not in match]
        if match and (best is None or len(match) > len(best["match"])):
            best = {"name": name, "match": match, "differ": differ}
    return best
