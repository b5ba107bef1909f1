"""The files of a checkpoint: what their headers say, whether that is what the config describes, and lazy reading.

Nothing here reads tensor data by itself. `read_header` parses one safetensors header, `Checkpoint` is a set of files
with an optional index, `check_tensors` compares the headers with the table of `released_tensors`.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import safetensors

from .configuration_mimo_v2 import BNB_METHODS, FLASH_MODEL_TYPE, RELEASED_QUANT_METHOD, MiMoV2Config
from .weight_mapping_mimo_v2 import MXFP4_PER_BYTE, ReleasedTensor, released_tensors, weight_name


INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"

# bits per element, in the spelling of safetensors
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FP8_DTYPE = "F8_E4M3"
MXFP4_DTYPE = "U8"
FLOAT_DTYPES = ("F32", "BF16", "F16")

# the limit of the safetensors library itself; the largest released header is about 1.3 MB
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = MAX_HEADER_BYTES

# Opening brackets and commas of one JSON file, counted before it is parsed: an empty list takes 3 bytes in the file
# and 64 in memory. A header has about nine per tensor; the largest release has 160,040 tensors in all its files.
MAX_JSON_MARKS = 2_500_000
MAX_TENSORS = 250_000
MAX_NAME_LENGTH = 500
MAX_DIMENSIONS = 8

# names of one kind in an error message, so that 73,081 missing tensors stay readable
MAX_LISTED = 200


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint in one line; `problems` holds one entry per kind."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


class TensorInfo(NamedTuple):
    """What a header says about one tensor. `dtype` is spelled as in the file: F8_E4M3, BF16, F32, U8, ..."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class PartTotals(TypedDict):
    """Sums over one part. `parameters` leaves out FP8 and MXFP4 scales; `dtypes` counts tensors per dtype."""

    tensors: int
    bytes: int
    parameters: int
    dtypes: dict[str, int]


def _listing(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def problem_lines(
    missing: list[str], unknown: list[str], mis_shaped: list[str], wrong_dtype: list[str] | tuple = ()
) -> list[str]:
    """One line per kind of problem that there is; the last two as `name (expected, got)`."""
    kinds = {
        "missing": missing,
        "unknown": unknown,
        "mis-shaped (expected, got)": mis_shaped,
        "wrong dtype (expected, got)": wrong_dtype,
    }
    return [f"{what} ({len(names)}): {_listing(names)}" for what, names in kinds.items() if names]


def _shown(value: Any) -> str:
    """`repr`, cut where a hostile file would fill the screen."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {_shown(duplicate)}")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no JSON number")


def _parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    marks = sum(text.count(mark) for mark in (b"{", b"[", b","))
    if marks > MAX_JSON_MARKS:
        raise ValueError(f"{what}: expected at most {MAX_JSON_MARKS:,} brackets and commas of JSON, got {marks:,}.")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected a JSON object without duplicate keys, got {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object, got {type(value).__name__}.")
    return value


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Contents of a JSON file that may come from anyone: bounded in size and memory, no NaN, no key twice.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON object, or too large; one line that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a JSON file, got {'a folder' if path.is_dir() else 'nothing'}.")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {size}.")
    return _parse_json_object(path.read_bytes(), str(path))


def read_config(path: str | Path) -> MiMoV2Config:
    """A MiMo-V2 `config.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, of another architecture, or a field of a wrong kind; one line that names the file.
        NotImplementedError: a field that no release has.
    """
    values = read_json_object(path)
    known = (MiMoV2Config.model_type, FLASH_MODEL_TYPE)
    if (model_type := values.get("model_type")) not in known:
        expected = " or ".join(map(repr, known))
        raise ValueError(f"{path}: `model_type`: expected {expected}, got {_shown(model_type)}.")
    try:
        return MiMoV2Config.from_dict(values)
    except ValueError as error:
        # strict types repeat the value, which may be long
        raise ValueError(f"{path}: {'; '.join(str(error).splitlines())[:2000]}") from error


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Name, dtype, shape and bytes of every tensor of a safetensors file, without reading any tensor data.

    The header must describe the file exactly: offsets that equal dtype x shape, no overlap, no hole, and a file that
    is as long as the header says. A missing `__metadata__` is fine, the released files have none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line that names the file, what was expected and what came.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a safetensors file, got {'a folder' if path.is_dir() else 'nothing'}."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: expected a safetensors file of at least 8 bytes, got {size} bytes.")
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError(f"{path}: expected a safetensors file, got a Git LFS pointer; fetch the real file.")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: expected a header of at most {min(size - 8, MAX_HEADER_BYTES)} bytes, got length {length}."
            )
        entries = _parse_json_object(file.read(length), f"{path}: header")
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{path}: expected at most {MAX_TENSORS} tensors, got {len(entries)}.")
    spans = {name: _parse_entry(path, name, entry) for name, entry in entries.items()}
    _check_spans(path, spans, size - 8 - length)
    return {name: TensorInfo(dtype, shape, end - begin, path) for name, (begin, end, dtype, shape) in spans.items()}


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one header entry; begin and end are bytes after the header."""
    where = f"{path}: tensor {_shown(name)}"
    if not _is_plain_name(name):
        raise ValueError(f"{where}: expected a name of at most {MAX_NAME_LENGTH} printable characters.")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {_shown(got)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{where}: expected a dtype out of {', '.join(DTYPE_BITS)}, got {_shown(dtype)}.")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise ValueError(f"{where}: expected {key} as a list of non-negative ints, got {_shown(value)}.")
        if len(value) > MAX_DIMENSIONS or any(item >= 2**63 for item in value):
            raise ValueError(
                f"{where}: expected {key} of at most {MAX_DIMENSIONS} numbers below 2**63, got {_shown(value)}."
            )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ValueError(
            f"{where}: expected two data_offsets {bits / 8:g} bytes apart ({dtype} {shape}), got {offsets}."
        )
    return offsets[0], offsets[1], dtype, tuple(shape)


def _check_spans(path: Path, spans: dict[str, tuple[int, int, str, tuple[int, ...]]], data_bytes: int) -> None:
    position = 0
    for name, (begin, end, *_) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != position:
            what = "an overlap" if begin < position else "a hole"
            raise ValueError(f"{path}: tensor {name!r}: expected data offset {position}, got {begin} ({what}).")
        position = end
    if position != data_bytes:
        what = "truncated file" if position > data_bytes else "bytes that no tensor owns"
        raise ValueError(f"{path}: expected {position} bytes of tensor data, got {data_bytes} ({what}).")


def read_index(path: str | Path) -> dict[str, str]:
    """`weight_map` of an index file: tensor name -> file name, unchecked against any file.

    Raises:
        ValueError: not an index; one line that names the file, what was expected and what came.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{path}: expected `weight_map` as an object of file names, got {str(weight_map)[:80]}.")
    if len(weight_map) > MAX_TENSORS:
        raise ValueError(f"{path}: expected at most {MAX_TENSORS} tensors, got {len(weight_map)}.")
    for name in (name for pair in weight_map.items() for name in pair if not _is_plain_name(name)):
        raise ValueError(
            f"{path}: expected names of at most {MAX_NAME_LENGTH} printable characters, got {_shown(name)}."
        )
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether a name can be printed: control characters in it would reach the terminal."""
    return len(name) <= MAX_NAME_LENGTH and name.isprintable()


def check_file_names(weight_map: dict[str, str]) -> None:
    """Raises a `CheckpointError` for an index whose files are not plain names, i.e. may lie outside its folder."""
    outside = sorted({repr(file) for file in weight_map.values() if not _is_plain_file_name(file)})
    if outside:
        raise CheckpointError(
            [f"{INDEX_NAME}: expected plain file names, got paths ({len(outside)}): {_listing(outside)}"]
        )


def _is_plain_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(mark in name for mark in ("/", "\\", ":", "\0"))


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files that belong together, by their headers: `files`, and `tensors` by name over all of them.

    A weight and its scale may lie in different files: nothing here pairs tensors.
    """

    files: list[Path]
    tensors: dict[str, TensorInfo]

    @classmethod
    def from_folder(cls, folder: str | Path, progress: Callable[[list[Path]], Iterable[Path]] = iter) -> "Checkpoint":
        """Reads the headers of the files named by the folder's index, or of its `model.safetensors`.

        Args:
            progress: wraps the list of files while they are read, e.g. `tqdm`.

        Raises:
            FileNotFoundError: the folder has neither of the two files.
            ValueError: one error that lists every contradiction between index and files.
        """
        folder = Path(folder)
        index = folder / INDEX_NAME
        if index.is_file():
            weight_map = read_index(index)
            names = sorted({name for name in weight_map.values() if _is_plain_file_name(name)})
            return cls._read([folder / name for name in names], index, weight_map, progress)
        if not (folder / SINGLE_FILE_NAME).is_file():
            got = f"neither among {len(list(folder.iterdir()))} entries" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder}: expected {INDEX_NAME} or {SINGLE_FILE_NAME}, got {got}.")
        return cls._read([folder / SINGLE_FILE_NAME], None, {}, progress)

    @classmethod
    def from_files(
        cls, files: list[str | Path], progress: Callable[[list[Path]], Iterable[Path]] = iter
    ) -> "Checkpoint":
        """Reads the headers of `files`, as Transformers resolved them (Hub cache links are fine).

        If all lie in one folder with an index that names any of them, the index is checked too. Errors as
        `from_folder`.
        """
        paths = [Path(file) for file in files]
        if not paths:
            raise ValueError("`files`: expected at least one safetensors file, got none.")
        index = paths[0].parent / INDEX_NAME
        if len({path.parent for path in paths}) == 1 and index.is_file():
            weight_map = read_index(index)
            # a folder may hold a single file and the index of another set of shards
            if {path.name for path in paths} & set(weight_map.values()):
                return cls._read(paths, index, weight_map, progress)
        return cls._read(paths, None, {}, progress)

    @classmethod
    def _read(
        cls, files: list[Path], index: Path | None, weight_map: dict[str, str], progress: Callable
    ) -> "Checkpoint":
        tensors: dict[str, TensorInfo] = {}
        problems, duplicates, unreadable = [], [], set()
        for file in progress(files):
            try:
                header = read_header(file)
            except (FileNotFoundError, ValueError) as error:
                problems.append(str(error))
                unreadable.add(file.name)
                continue
            duplicates += [f"{name} ({tensors[name].file.name}, {file.name})" for name in header if name in tensors]
            tensors.update(header)
        if duplicates:
            problems.append(f"{len(duplicates)} tensors in two files: {_listing(duplicates)}.")
        if index is not None:
            problems += _check_index(index, weight_map, {file.name for file in files}, unreadable, tensors)
        if problems:
            raise CheckpointError(problems[:MAX_LISTED])
        return cls(files, tensors)

    def slices(self) -> dict[str, Any]:
        """Every tensor as a lazy `PySafeSlice`: `slices[name][:]` reads it, and so does `slices[name][a:b]`.

        Opening reads headers only. The data is read with pread, not through a lasting map: a released shard has
        34 GB, and the default backend maps it copy-on-write, which a machine with less memory than one shard refuses
        with ENOMEM. (safetensors still maps a file read-only for a moment to find its header; that takes no memory,
        but a `ulimit -v` below the largest shard stops it.) Slices keep their files open.
        """
        slices = {}
        for path in self.files:
            file = safetensors.safe_open(path, framework="pt", backend="pread")
            slices.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
        return slices


def _check_index(
    index: Path, weight_map: dict[str, str], files: set[str], unreadable: set[str], tensors: dict[str, TensorInfo]
) -> list[str]:
    """Contradictions between an index and the headers of the files, one line per kind."""
    outside = [f"{name} -> {file!r}" for name, file in weight_map.items() if not _is_plain_file_name(file)]
    unread = sorted({file for file in weight_map.values() if _is_plain_file_name(file)} - files)
    elsewhere, unlisted = [], []
    for name, file in weight_map.items():
        if file in files - unreadable and (name not in tensors or tensors[name].file.name != file):
            elsewhere.append(f"{name} ({file})")
    unlisted = [f"{name} ({info.file.name})" for name, info in tensors.items() if name not in weight_map]
    return [
        f"{index}: {what} ({len(names)}): {_listing(names)}."
        for what, names in (
            ("expected plain file names, got paths", outside),
            ("files that the index names and that were not given", unread),
            ("tensors that are not in the file the index names", elsewhere),
            ("tensors in the files that the index does not list", unlisted),
        )
        if names
    ]


@dataclass(frozen=True)
class CheckpointReport:
    """What `check_tensors` found: every tensor is known and complete.

    `layout` is "chunked" or "plain" (row order of a fused projection) or "split"; `layout_source` says what decided.
    `not_loaded` counts the tensors per part that the files have and the model leaves there. `quantized` names what a
    saved model was quantized with.
    """

    layout: str
    layout_source: str
    fp8: bool
    mxfp4: bool
    parts: dict[str, PartTotals]
    not_loaded: dict[str, int]
    quantized: str | None = None

    def __str__(self) -> str:
        weights = self.quantized or ("FP8" if self.fp8 else "not FP8") + (", experts MXFP4" if self.mxfp4 else "")
        lines = [f"layout: {self.layout}, from: {self.layout_source}", f"weights: {weights}"]
        for part, totals in self.parts.items():
            note = " (known, not loaded)" if part in self.not_loaded else ""
            lines.append(
                f"{part}: {totals['tensors']:,} tensors, {totals['parameters']:,} parameters, "
                f"{totals['bytes']:,} bytes{note}"
            )
        if "mtp" not in self.parts:
            lines.append("no MTP heads in the files")
        return "\n".join(lines)


def take_mtp_layers_from_files(config: MiMoV2Config, tensors: dict[str, TensorInfo]) -> None:
    """Lowers `config.num_mtp_layers` to what the files have, where config.json does not give the number."""
    found = {name.split(".")[3] for name in tensors if name.startswith("model.mtp.layers.")}
    # CODEPATH: V2.5, V2.5-Pro and V2-Flash say nothing and have three, re-exports say nothing and may have none
    if config._assumes_mtp_layers and len(found) < config.num_mtp_layers:
        config.num_mtp_layers = len(found)


def check_tensors(
    config: MiMoV2Config, tensors: dict[str, TensorInfo], left_out: Collection[str] = ()
) -> CheckpointReport:
    """Compares headers with the checkpoint that `config` describes; every tensor must be known and of its shape.

    A quantizable weight is F8_E4M3 with an F32 `<name>_scale_inv` of the exact grid, or a float without one; a routed
    expert may also be MXFP4, i.e. U8 with a U8 `<name>_scale`, where `store_dtype` says so.

    Args:
        left_out: parts, or names of tensors, that the model at hand has no modules for; all of a part may be missing.

    Raises:
        ValueError: one error that lists everything missing, unknown, mis-shaped or of a wrong dtype.
    """
    # an object there is what somebody asked for while loading, not what the files have
    entry = vars(config).get("quantization_config")
    if isinstance(entry, dict) and entry.get("quant_method") in BNB_METHODS.values():
        raise CheckpointError(
            [
                "`quantization_config`: expected a released or converted checkpoint, got one of a model quantized "
                "with bitsandbytes, which `from_pretrained` loads; use the checkpoint it was made of"
            ]
        )
    layout, layout_source = find_layout(config, tensors)
    table = released_tensors(config, "plain" if layout == "plain" else "chunked")
    problems = _compare(table, tensors, left_out) + _check_experts(config, table, tensors)
    if problems:
        raise CheckpointError(["the files do not match the config", *problems, *_hints(config, tensors, left_out)])
    parts = sum_parts(table, tensors)
    not_loaded = {part: parts[part]["tensors"] for part in left_out if part in parts}
    dtypes = {info.dtype for info in tensors.values()}
    return CheckpointReport(layout, layout_source, FP8_DTYPE in dtypes, MXFP4_DTYPE in dtypes, parts, not_loaded)


def find_layout(config: MiMoV2Config, tensors: dict[str, TensorInfo]) -> tuple[str, str]:
    """(layout, what decided it): "chunked" or "plain" for a fused projection, else "split".

    Scale blocks are counted inside each chunk, so the grid of a released V2.5 global layer has 4 * ceil(3392 / 128)
    = 108 rows, a plain one ceil(13568 / 128) = 106. Where the two differ, the grid decides for all layers.

    Raises:
        ValueError: layers contradict each other, or the grid contradicts `config.fused_qkv_layout`.
    """
    if config.attention_projection_layout == "split":
        return "split", "separate q/k/v tensors"
    layers = [(f"model.layers.{index}", layer_type) for index, layer_type in enumerate(config.layer_types)]
    layers += [(f"model.mtp.layers.{index}", "sliding_attention") for index in range(config.num_mtp_layers)]
    votes: dict[str, list[str]] = {"chunked": [], "plain": []}
    for layer, layer_type in layers:
        scale = tensors.get(f"{layer}.self_attn.qkv_proj.weight_scale_inv")
        geometry = config.attention_geometry(layer_type)
        weight = ReleasedTensor((sum(geometry.qkv_sizes), config.hidden_size), "attention", None, True)
        plain, chunked = weight.scale_shape, weight._replace(chunks=geometry.qkv_chunks).scale_shape
        if scale is not None and plain != chunked and scale.shape in (plain, chunked):
            votes["plain" if scale.shape == plain else "chunked"].append(layer)
    asked = config.fused_qkv_layout
    found = [layout for layout, voters in votes.items() if voters]
    if len(found) == 2:
        raise ValueError(
            "FP8 scale grids of qkv_proj: expected one row order in all layers, got "
            + " and ".join(f"{layout!r} in {len(voters)} ({_listing(voters)})" for layout, voters in votes.items())
            + "."
        )
    if not found:
        return (asked, "config.fused_qkv_layout") if asked else ("chunked", "released rule (shapes do not decide)")
    count = len(votes[found[0]])
    if asked not in (None, found[0]):
        raise ValueError(
            f"`fused_qkv_layout`: expected {found[0]!r}, which the scale grid of {count} layers shows, got {asked!r}."
        )
    return found[0], f"scale grid of {count} layers"


def _compare(table: dict[str, ReleasedTensor], tensors: dict[str, TensorInfo], left_out: Collection[str]) -> list[str]:
    """One line per kind of problem; an empty list if the headers are exactly what the table says."""
    missing, mis_shaped, wrong_dtype, known = [], [], [], set()
    present = {spec.part for name, spec in table.items() if name in tensors}
    optional = {part for part in left_out if part not in present}

    def check(name: str, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        known.add(name)
        if info.shape != shape:
            mis_shaped.append(f"{name} ({list(shape)}, {list(info.shape)})")
        if info.dtype not in dtypes:
            wrong_dtype.append(f"{name} ({' or '.join(dtypes)}, {info.dtype})")

    for name, spec in table.items():
        info = tensors.get(name)
        if info is None:
            if spec.part not in optional and name not in left_out:
                missing.append(name)
            continue
        scale = None
        # CODEPATH: the experts of V2.6 are MXFP4, all other quantized weights of every release are FP8
        if spec.part == "experts" and info.dtype == MXFP4_DTYPE:
            shape, scale_shape = spec.mxfp4_shapes
            check(name, info, shape, (MXFP4_DTYPE,))
            scale = f"{name}_scale", scale_shape, MXFP4_DTYPE
        else:
            check(name, info, spec.shape, (FP8_DTYPE, *FLOAT_DTYPES) if spec.quantized else FLOAT_DTYPES)
            if spec.quantized and info.dtype == FP8_DTYPE:
                scale = f"{name}_scale_inv", spec.scale_shape, "F32"
        if scale is not None and scale[0] not in tensors:
            missing.append(scale[0])
        elif scale is not None:
            check(scale[0], tensors[scale[0]], scale[1], scale[2:])
    unknown = [name for name in tensors if name not in known]
    return problem_lines(missing, unknown, mis_shaped, wrong_dtype)


def _check_experts(
    config: MiMoV2Config, table: dict[str, ReleasedTensor], tensors: dict[str, TensorInfo]
) -> list[str]:
    """Experts that are stacked into one tensor but stored in several ways, or not as `store_dtype` says."""
    stored: dict[str, set[str]] = {}
    for name, spec in table.items():
        if spec.part == "experts" and name in tensors:
            stored.setdefault(spec.target, set()).add(tensors[name].dtype)
    quantized = (FP8_DTYPE, MXFP4_DTYPE)
    mixed = [
        f"{target} ({' and '.join(sorted(dtypes))})"
        for target, dtypes in stored.items()
        if len(dtypes) > 1 and dtypes.intersection(quantized)
    ]
    problems = [f"experts of several dtypes ({len(mixed)}): {_listing(mixed)}"] if mixed else []
    quantization = config.to_dict().get("quantization_config") or {}
    # V2.5-Pro, which has FP8 experts, does not give it; where the entry is another one, files are read as floats
    said = (
        quantization.get("store_dtype", "fp8") if quantization.get("quant_method") == RELEASED_QUANT_METHOD else None
    )
    for store_dtype, dtype, other in (("mxfp4", MXFP4_DTYPE, FP8_DTYPE), ("fp8", FP8_DTYPE, MXFP4_DTYPE)):
        if said == store_dtype and any(other in dtypes for dtypes in stored.values()):
            problems.append(f"`store_dtype` of quantization_config: {said!r} expects {dtype} experts, got {other}")
    return problems


def _hints(config: MiMoV2Config, tensors: dict[str, TensorInfo], left_out: Collection[str]) -> list[str]:
    expects_vision = config.vision_config is not None and "vision" not in left_out
    if expects_vision and not any(name.startswith("visual.") for name in tensors):
        return ["hint: the files have no vision tower: pass load_towers=False to load the text model alone"]
    expects_audio = config.audio_config is not None and "audio" not in left_out
    if expects_audio and not any(name.startswith(("speech_embeddings.", "audio_encoder.")) for name in tensors):
        return ["hint: the files have no audio encoder: pass audio_config=None to load the model without hearing"]
    expects_mtp = config.num_mtp_layers > 0 and "mtp" not in left_out
    if expects_mtp and not any(name.startswith("model.mtp.") for name in tensors):
        return ["hint: the files have no MTP heads: pass load_mtp=False to load the model without them"]
    for layout, projection in (("fused_qkv", "qkv_proj"), ("split", "q_proj")):
        # names decide; only the first layer is asked, since a mixture is no released form
        if layout != config.attention_projection_layout and f"model.layers.0.self_attn.{projection}.weight" in tensors:
            return [
                f"hint: the files have {projection} tensors, the config says "
                f'{config.attention_projection_layout!r}: pass attention_projection_layout="{layout}"'
            ]
    return []


def sum_parts(table: dict[str, ReleasedTensor], tensors: dict[str, TensorInfo]) -> dict[str, PartTotals]:
    """Totals per part of `table`; a scale counts for the part of its weight, an unknown name for "unknown"."""
    parts: dict[str, PartTotals] = {}
    for name, info in tensors.items():
        weight = weight_name(name)
        is_scale = weight != name and name not in table
        part = table[weight].part if weight in table else "unknown"
        totals = parts.setdefault(part, {"tensors": 0, "bytes": 0, "parameters": 0, "dtypes": {}})
        totals["tensors"] += 1
        totals["bytes"] += info.nbytes
        per_element = MXFP4_PER_BYTE if info.dtype == MXFP4_DTYPE else 1
        totals["parameters"] += 0 if is_scale else math.prod(info.shape) * per_element
        totals["dtypes"][info.dtype] = totals["dtypes"].get(info.dtype, 0) + 1
    return parts


__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointReport",
    "PartTotals",
    "TensorInfo",
    "check_file_names",
    "check_tensors",
    "find_layout",
    "read_config",
    "read_header",
    "read_index",
    "read_json_object",
    "sum_parts",
    "take_mtp_layers_from_files",
]
