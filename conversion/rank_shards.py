"""A folder of rank shards as one checkpoint: names and shapes from headers alone, tensors put together when read.

`rank_layout` describes what lies in such a folder. The parts of a fused `qkv_proj`, concatenated over TP ranks, are
the released row order [Q_c | K_c | V_c] with one chunk per rank, and so are their scale grids.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_mimo.checkpoint_mimo_v2 import CheckpointError, TensorInfo, read_header, read_json_object

from .checkpoint import refuse_outside
from .fp8 import BLOCK, scale_shape
from .rank_layout import AXES, SUFFIXES, TORCH_SUFFIXES, RankLayout, read_rank_layout
from .row_reader import TORCH_DTYPES, data_offsets
from .torch_files import StoredTensor, read_stored_rows, read_torch_header


# values per MXFP4 scale, two to a byte
MXFP4_BLOCK_BYTES = 16

# copies on several ranks are compared in pieces of so many bytes
COMPARED_BYTES = 2**26

# problems in one error message
MAX_LISTED = 20

Rank = tuple[int, int, int]


class RankFile(NamedTuple):
    """A file by its path inside the folder; `rank` has 0 and `counts` has 1 for what its pattern does not name."""

    path: Path
    label: str
    pattern: str
    rank: Rank
    counts: Rank


class Piece(NamedTuple):
    """What one file has of a tensor."""

    file: RankFile
    stored: StoredTensor

    @property
    def info(self) -> TensorInfo:
        return self.stored.info


class Joined(NamedTuple):
    """A tensor in `parts` along `dim`, each of them a list of copies that must be equal."""

    info: TensorInfo
    dim: int
    parts: list[list[Piece]]


class RankSource:
    """A `Source` over rank shards. Opening reads headers, `read` only the parts of that tensor.

    `tensors` has the shapes of the whole tensors; `file` is the first file a tensor lies in. The folder also holds
    config.json and the companion files of a release. Tensors on several EP or PP ranks must be equal, bit for bit.

    Raises:
        FileNotFoundError: files of ranks are missing; all are named.
        ValueError: files or names that the layout does not describe, ranks that do not fit together; one line.
    """

    def __init__(self, folder: str | Path, layout: RankLayout):
        self.folder = Path(folder).resolve()
        self.name = str(folder)
        self.config = read_json_object(self.folder / "config.json")
        self._files, self._ignored = _find_files(self.folder, layout)
        self._joined = _join_all(_read_pieces(self._files, layout), layout, self._files, self.config)
        self.tensors = {name: joined.info for name, joined in self._joined.items()}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor. ValueError: copies on different ranks differ; the error names them."""
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` (exclusive) of the first dimension. ValueError: as `read`."""
        info, dim, parts = self._joined[name]
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{name}: expected rows within 0 and {info.shape[0]}, got {start} to {stop}.")
        if len(parts) == 1:
            return self._read_equal(name, parts[0], start, stop)
        result = torch.empty((stop - start, *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
        position = 0
        for copies in parts:
            size = copies[0].info.shape[dim]
            if dim == 1:
                result[:, position : position + size] = self._read_equal(name, copies, start, stop)
            else:
                first, last = max(start - position, 0), min(stop - position, size)
                if first < last:
                    rows = self._read_equal(name, copies, first, last)
                    result[position + first - start : position + last - start] = rows
            position += size
        return result

    def fingerprint(self) -> dict[str, list[int]]:
        """{file: [bytes, mtime in ns]} of every file with weights, ignored ones too, and of config.json."""
        labels = sorted([*(file.label for file in self._files), *self._ignored, "config.json"])
        stats = {label: (self.folder / label).stat() for label in labels}
        return {label: [stat.st_size, stat.st_mtime_ns] for label, stat in stats.items()}

    def _read_equal(self, name: str, copies: list[Piece], start: int, stop: int) -> torch.Tensor:
        """Rows of the first copy, after comparing them with the others."""
        rows = read_stored_rows(copies[0].stored, start, stop)
        step = max(1, COMPARED_BYTES * copies[0].info.shape[0] // max(1, copies[0].info.nbytes))
        for other in copies[1:]:
            for first in range(start, stop, step):
                last = min(first + step, stop)
                here = rows[first - start : last - start].view(torch.uint8)
                if not torch.equal(here, read_stored_rows(other.stored, first, last).view(torch.uint8)):
                    raise ValueError(
                        f"{name}: expected the same values in {copies[0].file.label} and {other.file.label}, got "
                        f"different ones in rows {first} to {last}."
                    )
        return rows


def _find_files(folder: Path, layout: RankLayout) -> tuple[list[RankFile], list[str]]:
    """The files of all ranks, and ignored ones. Errors name what is missing, and weights no pattern describes."""
    files, missing = [], []
    for pattern in layout.files:
        axes = [axis for axis in AXES if f"{{{axis}}}" in pattern]
        counts = tuple(layout.ranks[axis] if axis in axes else 1 for axis in AXES)
        shards: dict[Rank, list[int]] = {rank: [] for rank in itertools.product(*map(range, counts))}
        for path, numbers in _matches(folder, pattern):
            rank = tuple(numbers.get(axis, 0) for axis in AXES)
            label = path.relative_to(folder).as_posix()
            if rank not in shards or numbers.get("shard", 0) in shards[rank]:
                raise ValueError(f"{label}: expected one file per rank of {layout.ranks}, got another.")
            refuse_outside(folder, path)
            shards[rank].append(numbers.get("shard", 0))
            files.append(RankFile(path, label, pattern, rank, counts))
        for rank, found in shards.items():
            expected = max(found, default=0) + 1
            missing += [_file_name(pattern, rank, shard) for shard in range(expected) if shard not in found]
    if missing:
        raise FileNotFoundError(f"{folder}: expected files of all ranks, got none for: {_listing(missing)}.")
    known = {file.path for file in files}
    places = sorted({folder, *(path.parent for path in known)})
    weights = [path for place in places for path in sorted(place.iterdir()) if path.suffix in SUFFIXES]
    labels = [path.relative_to(folder).as_posix() for path in weights if path not in known]
    unknown = [label for label in labels if not layout.is_ignored(label)]
    if unknown:
        raise ValueError(f"{folder}: expected a pattern in `files`, or a match in `ignore`, for {_listing(unknown)}.")
    return files, labels


def _matches(folder: Path, pattern: str) -> Iterator[tuple[Path, dict[str, int]]]:
    """(path, numbers of the fields) of the files that a pattern describes."""
    pieces = re.split(r"\{(.*?)\}", pattern)
    literals, fields = pieces[::2], pieces[1::2]
    regex = "".join(re.escape(text) + end for text, end in zip(literals, [r"(\d+)"] * len(fields) + [""]))
    for path in sorted(folder.glob("*".join(re.sub(r"([*?[])", r"[\1]", text) for text in literals))):
        match = re.fullmatch(regex, path.relative_to(folder).as_posix())
        if match:
            yield path, dict(zip(fields, map(int, match.groups())))


def _file_name(pattern: str, rank: Rank, shard: int) -> str:
    for field, number in zip((*AXES, "shard"), (*rank, shard)):
        pattern = pattern.replace(f"{{{field}}}", str(number))
    return pattern


def _read_pieces(files: list[RankFile], layout: RankLayout) -> dict[str, list[Piece]]:
    """Everything in the headers of all files, by released name."""
    pieces: dict[str, list[Piece]] = {}
    problems = []
    for file in files:
        stored, others = _read_file(file.path)
        numbers = {axis: number for axis, number in zip(AXES, file.rank) if f"{{{axis}}}" in file.pattern}
        others |= {name: "tensor without dimensions" for name, tensor in stored.items() if not tensor.info.shape}
        problems += [
            f"{file.label}: {name}: expected a tensor, or a match in `ignore`, got {kind}"
            for name, kind in others.items()
            if not layout.is_ignored(name)
        ]
        for name, tensor in stored.items():
            if name in others or layout.is_ignored(name):
                continue
            try:
                released = layout.released_name(name, numbers)
            except ValueError as error:
                problems.append(f"{file.label}: {error}")
                continue
            pieces.setdefault(released, []).append(Piece(file, tensor))
    _raise_all(problems)
    return pieces


def _read_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and other entries by name, as `read_torch_header`, of either kind of file."""
    if path.suffix in TORCH_SUFFIXES:
        return read_torch_header(path)
    infos, offsets = read_header(path), data_offsets(path)
    others = {name: f"tensor of {info.dtype}" for name, info in infos.items() if info.dtype not in TORCH_DTYPES}
    tensors = {name: StoredTensor.contiguous(infos[name], offsets[name]) for name in infos if name not in others}
    return tensors, others


def _join_all(pieces: dict[str, list[Piece]], layout: RankLayout, files: list[RankFile], config: dict) -> dict:
    """{name: Joined} of all tensors; one error lists everything that does not fit together."""
    joined, problems = {}, []
    labels = {(file.pattern, file.rank): file.label for file in files}
    for name in sorted(pieces):
        try:
            joined[name] = _join(name, pieces[name], layout.join_of(name), labels)
            _check_row_order(name, joined[name], config)
        except ValueError as error:
            problems.append(str(error))
    for name, tensor in joined.items():
        for suffix in ("_scale_inv", "_scale"):
            if f"{name}{suffix}" in joined and len(tensor.info.shape) == 2:
                problems += _check_grid(name, tensor, joined[f"{name}{suffix}"], suffix)
    _raise_all(problems)
    return joined


def _join(name: str, pieces: list[Piece], join: str | None, labels: dict[tuple[str, Rank], str]) -> Joined:
    by_rank = {piece.file.rank: piece for piece in pieces}
    pattern, counts = pieces[0].file.pattern, pieces[0].file.counts
    if len(by_rank) < len(pieces) or any(piece.file.pattern != pattern for piece in pieces):
        found = _listing([piece.file.label for piece in pieces])
        raise ValueError(f"{name}: expected one tensor of that name per rank, got it from {found}")
    if join is None and counts[0] > 1:
        raise ValueError(f"{name}: expected a rule that says how the TP ranks' parts are joined, got none")
    tp, ep, pp = (sorted({rank[axis] for rank in by_rank}) for axis in range(3))
    if join == "one" and len(tp) > 1:
        raise ValueError(f"{name}: expected it on one TP rank, got it on {len(tp)}")
    expected = itertools.product(
        tp if join == "one" else range(counts[0]),
        # one EP rank may own a tensor, or all have it
        ep if len(ep) == 1 else range(counts[1]),
        pp,
    )
    missing = [labels[pattern, rank] for rank in expected if rank not in by_rank]
    if missing:
        raise ValueError(f"{name}: expected it on all ranks, got none in {_listing(missing)}")
    parts = [[by_rank[rank] for rank in sorted(by_rank) if rank[0] == number] for number in tp]
    if join not in ("rows", "columns"):
        parts = [list(itertools.chain(*parts))]
    if join == "first":
        parts = [parts[0][:1]]
    return _joined(name, 1 if join == "columns" else 0, parts, pieces)


def _joined(name: str, dim: int, parts: list[list[Piece]], pieces: list[Piece]) -> Joined:
    """Joins parts whose dtypes and shapes fit together; `pieces` are all, also those that are not read."""
    if any(len(piece.info.shape) <= dim for piece in pieces):
        raise ValueError(f"{name}: expected two dimensions to join columns, got {list(pieces[0].info.shape)}")
    groups = parts if len(parts) > 1 else [pieces]
    for group in groups:
        _check_alike(name, group)
    _check_alike(name, [group[0] for group in groups], free=dim)
    shape = list(parts[0][0].info.shape)
    shape[dim] = sum(copies[0].info.shape[dim] for copies in parts)
    nbytes = sum(copies[0].info.nbytes for copies in parts)
    return Joined(TensorInfo(pieces[0].info.dtype, tuple(shape), nbytes, parts[0][0].file.path), dim, parts)


def _check_alike(name: str, pieces: list[Piece], free: int | None = None) -> None:
    """Dtypes and shapes must be equal, but for the size of the dimension `free`."""

    def fixed(info: TensorInfo) -> tuple:
        return info.dtype, [size for axis, size in enumerate(info.shape) if axis != free]

    first = pieces[0]
    for piece in pieces:
        if fixed(piece.info) != fixed(first.info):
            raise ValueError(
                f"{name}: expected {first.info.dtype} {list(first.info.shape)} in {piece.file.label} as in "
                f"{first.file.label}, got {piece.info.dtype} {list(piece.info.shape)}"
            )


def _check_row_order(name: str, joined: Joined, config: dict) -> None:
    """Refuses fused projections whose concatenated rows are in no order that a checkpoint has."""
    ranks = len(joined.parts)
    if ranks == 1 or joined.dim == 1:
        return
    if ".self_attn.qkv_proj." in name:
        chunks = config.get("num_key_value_heads")
        if ranks != chunks or config.get("fused_qkv_layout") == "plain":
            raise ValueError(
                f"{name}: expected one TP rank per chunk [Q | K | V] of a release, num_key_value_heads = {chunks}, "
                f"got {ranks}"
            )
    elif ".attn.qkv." in name:
        raise ValueError(f"{name}: expected the vision tower's [Q | K | V] uncut, got it cut over {ranks} TP ranks")


def _check_grid(name: str, weight: Joined, scale: Joined, suffix: str) -> list[str]:
    """Every rank has a whole grid of its part, and the grids of all ranks are that of the whole."""
    if len(weight.parts) == len(scale.parts) == 1:
        return []
    for (piece, *_), (grid, *_) in zip(weight.parts, scale.parts):
        rows, columns = piece.info.shape
        if suffix == "_scale":
            fits, expected = columns % MXFP4_BLOCK_BYTES == 0, (rows, columns // MXFP4_BLOCK_BYTES)
        else:
            # a fused projection has a grid per chunk, everything else only one
            is_inner = ".qkv_proj." not in name and piece is not weight.parts[-1][0]
            fits, expected = not is_inner or piece.info.shape[weight.dim] % BLOCK == 0, scale_shape(rows, columns)
        if not fits or grid.info.shape != expected or len(weight.parts) != len(scale.parts):
            return [
                f"{name}{suffix}: expected blocks that end where a rank's part ends, got a part of "
                f"{list(piece.info.shape)} with scales {list(grid.info.shape)} in {grid.file.label}"
            ]
    return []


def _raise_all(problems: list[str]) -> None:
    if problems:
        rest = len(problems) - MAX_LISTED
        raise CheckpointError(problems[:MAX_LISTED] + ([f"and {rest} more"] if rest > 0 else []))


def _listing(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


__all__ = ["RankLayout", "RankSource", "read_rank_layout"]
