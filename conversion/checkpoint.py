"""Where a conversion reads from: headers first, then exact byte ranges of single tensors.

A `Source` is a checkpoint by names. `open_source` finds the right one for a folder, a Hub repository or a folder of
rank shards; `open_headers` gives a source that can be planned with and not read, for `--dry-run`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from modeling_mimo.checkpoint_mimo_v2 import (
    DTYPE_BITS,
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    read_index,
    read_json_object,
)
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors

from .row_reader import RowReader


# what a converter needs of a repository; pictures of a model card stay there
REPOSITORY_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.py", "*.md", "LICENSE*", "dflash/*")


class Source(Protocol):
    """A checkpoint by released names; rows of every tensor are in the order of its files.

    `folder` holds the companion files, None if there are none. `config` is what config.json says.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    folder: Path | None

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor."""

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dimension."""

    def fingerprint(self) -> dict[str, list[int]]:
        """{file name: [bytes, mtime in ns]} of every file that is read: equal as long as nobody wrote to them."""


class SafetensorsSource:
    """A folder of safetensors files with or without an index, read with pread: a released shard has 34 GB.

    ValueError, FileNotFoundError: one line that lists every contradiction between index, headers and files.
    """

    def __init__(self, folder: str | os.PathLike, name: str | None = None):
        self.folder = Path(folder).resolve()
        self.name = name or str(folder)
        self.config = read_json_object(self.folder / "config.json")
        if (self.folder / INDEX_NAME).is_file():
            for file in sorted(set(read_index(self.folder / INDEX_NAME).values())):
                refuse_outside(self.folder, self.folder / file)
        self._checkpoint = Checkpoint.from_folder(self.folder)
        self.tensors = self._checkpoint.tensors
        for file in self._checkpoint.files:
            refuse_outside(self.folder, file)
        self._reader = RowReader(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._reader.rows(name).view(self.tensors[name].shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._reader.rows(name, start, stop)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes of a tensor from its byte `start` on: no new memory for every piece."""
        self._reader.read_bytes(name, start, buffer)

    def fingerprint(self) -> dict[str, list[int]]:
        files = [*self._checkpoint.files, self.folder / "config.json"]
        stats = {file.name: file.stat() for file in files}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}


@dataclass(frozen=True)
class HeadersSource:
    """Names, dtypes and shapes without data: enough to plan a conversion, not to run one."""

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    folder: Path | None = field(default=None)

    def read(self, name: str) -> torch.Tensor:
        raise ValueError(f"{self.name}: expected weights for anything but a dry run, got headers alone.")

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)

    def fingerprint(self) -> dict[str, list[int]]:
        return {}


def open_source(path_or_repo: str | os.PathLike, rank_layout: str | os.PathLike | None = None) -> Source:
    """The checkpoint of a folder, or of a Hub repository, which is downloaded into the Hub cache.

    Args:
        rank_layout: a description of folders whose tensors are split over ranks, see `rank_shards`.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
        ValueError: a folder that is no consistent checkpoint; one line.
    """
    if rank_layout is not None:
        from .rank_shards import RankSource, read_rank_layout

        return RankSource(Path(path_or_repo), read_rank_layout(rank_layout))
    if Path(path_or_repo).is_dir():
        return SafetensorsSource(path_or_repo)
    return SafetensorsSource(_download(str(path_or_repo), REPOSITORY_FILES), str(path_or_repo))


def open_headers(path_or_repo: str | os.PathLike, rank_layout: str | os.PathLike | None = None) -> Source:
    """As `open_source`, for planning: config.json and index are enough, and only these two are downloaded."""
    if rank_layout is not None:
        return open_source(path_or_repo, rank_layout)
    folder = Path(path_or_repo)
    if not folder.is_dir():
        folder = _download(str(path_or_repo), ("config.json", INDEX_NAME))
    index = folder / INDEX_NAME
    if not index.is_file() or all((folder / file).exists() for file in read_index(index).values()):
        return SafetensorsSource(folder, str(path_or_repo))
    config = read_json_object(folder / "config.json")
    return HeadersSource(str(path_or_repo), config, tensors_of_index(config, read_index(index), index), folder)


def tensors_of_index(config: dict[str, Any], weight_map: dict[str, str], where: Path) -> dict[str, TensorInfo]:
    """What the headers must say for an index alone: shapes by the config, dtypes as the releases have them.

    ValueError: names that are not in the checkpoint the config describes.
    """
    parsed = parse_config(config)
    table, tensors, unknown = released_tensors(parsed), {}, []
    for name, file in weight_map.items():
        weight = name.removesuffix("_inv").removesuffix("_scale")
        spec = table.get(name) or table.get(weight)
        if spec is None:
            unknown.append(name)
            continue
        dtype, shape = "BF16", spec.shape
        if name.endswith("_scale_inv"):
            dtype, shape = "F32", spec.scale_shape
        elif name.endswith("_scale"):
            dtype, shape = "U8", (spec.shape[0], spec.shape[1] // 32)
        elif f"{name}_scale_inv" in weight_map:
            dtype = "F8_E4M3"
        elif f"{name}_scale" in weight_map:
            dtype, shape = "U8", (spec.shape[0], spec.shape[1] // 2)
        elif name.endswith("e_score_correction_bias"):
            dtype = "F32"
        elif spec.part == "router":
            dtype = "F32" if parsed.moe_router_dtype == "float32" else "BF16"
        tensors[name] = TensorInfo(dtype, shape, math.prod(shape) * DTYPE_BITS[dtype] // 8, where.parent / file)
    if unknown:
        raise CheckpointError([f"{where}: unknown ({len(unknown)}): {', '.join(unknown[:20])}"])
    return tensors


def parse_config(config: dict[str, Any]) -> MiMoV2Config:
    """`config` of config.json as the model reads it.

    ValueError: another architecture, or a contradiction.
    """
    if config.get("model_type") not in ("mimo_v2", "mimo_v2_flash"):
        raise ValueError(f"`model_type`: expected 'mimo_v2' or 'mimo_v2_flash', got {config.get('model_type')!r}.")
    # the class keeps what it is given, and reads some keys away
    return MiMoV2Config.from_dict(json.loads(json.dumps(config)))


def refuse_outside(folder: Path, path: Path) -> None:
    """ValueError for a path that leaves `folder`, by `..` or a link; links into the blobs of a Hub cache are fine."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise ValueError(f"{path}: expected a file inside {folder}, got one that leads to {path.resolve()}.")


def repository_revision(folder: Path | None) -> str | None:
    """The commit of a folder of the Hub cache, None for any other."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _download(repo: str, patterns: tuple[str, ...]) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(repo).exists():
        raise FileNotFoundError(f"{repo}: expected a folder or a Hub repository `owner/name`, got neither.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{repo}: expected a folder or a reachable Hub repository: {reason}") from None


__all__ = [
    "HeadersSource",
    "SafetensorsSource",
    "Source",
    "open_headers",
    "open_source",
    "parse_config",
    "refuse_outside",
    "repository_revision",
    "tensors_of_index",
]
