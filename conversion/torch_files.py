"""Files that `torch.save` wrote: what they hold, by their pickle alone; and rows of one tensor of any file.

Nothing is mapped, and nothing is unpickled but tensors and plain values (`weights_only`).
"""

import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from modeling_mimo.checkpoint_mimo_v2 import MAX_HEADER_BYTES, TensorInfo

from .row_reader import TORCH_DTYPES


_SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class StoredTensor(NamedTuple):
    """Where a tensor lies: strides in elements, `offset` in bytes from the start of the file to its first element."""

    info: TensorInfo
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def contiguous(cls, info: TensorInfo, offset: int) -> "StoredTensor":
        """A tensor whose elements follow each other, as all do in safetensors files."""
        return cls(info, _contiguous_stride(info.shape), offset)


def read_torch_header(path: str | Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and other values of a `.pt`, `.pth` or `.bin` file by name, without reading any tensor data.

    Nested dicts give dotted names: `{"model": {"norm.weight": t}, "step": 3}` has the tensor `model.norm.weight` and
    the other value `step`, whose type the second dict gives.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle that could execute code, an old format, damage; one line that names the file.
        NotImplementedError: torch is older than 2.11, which would read all data here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file of torch.save, got {'a folder' if path.is_dir() else 'none'}."
        )
    records = _records(path)
    tensors: dict[str, StoredTensor] = {}
    others: dict[str, str] = {}
    for name, value in _flat(path, _unpickled(path)):
        if name in tensors or name in others:
            raise ValueError(f"{path}: expected every name once, got {name!r} twice.")
        if not isinstance(value, torch.Tensor):
            others[name] = type(value).__name__
        # _SPELLINGS has no quantized dtype
        elif value.layout is not torch.strided or value.dtype not in _SPELLINGS:
            others[name] = f"tensor of {value.layout} {value.dtype}"
        else:
            tensors[name] = _stored(path, name, value, records)
    return tensors, others


def read_stored_rows(stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start` to `stop` (first dimension) of one tensor. ValueError: the file has become shorter."""
    dtype = TORCH_DTYPES[stored.info.dtype]
    shape = (stop - start, *stored.info.shape[1:])
    count = _span(shape, stored.stride)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    offset = stored.offset + start * stored.stride[0] * dtype.itemsize
    data = np.fromfile(stored.info.file, dtype=np.uint8, count=count * dtype.itemsize, offset=offset)
    if data.size != count * dtype.itemsize:
        raise ValueError(f"{stored.info.file}: expected {count * dtype.itemsize} bytes at {offset}, got {data.size}.")
    values = torch.from_numpy(data).view(dtype)
    if stored.stride == _contiguous_stride(stored.info.shape):
        return values.view(shape)
    return torch.empty(shape, dtype=dtype).copy_(values.as_strided(shape, stored.stride))


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one that a strided tensor touches."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if math.prod(shape) else 0


def _records(path: Path) -> set[tuple[int, int]]:
    """(offset, bytes) of every record of the zip archive that is stored as it is."""
    with path.open("rb") as file:
        start = file.read(4)
        if start != b"PK\3\4":
            raise ValueError(
                f"{path}: expected the zip format of torch.save since torch 1.6, got a file that begins {start!r}; "
                "if it is an older torch file, load and re-save it with torch.save."
            )
        spans = set()
        try:
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    _check_record(path, archive, record)
                    # the local header has 30 bytes, a name and an extra field, whose lengths stand at 26
                    file.seek(record.header_offset + 26)
                    offset = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                    if record.compress_type == zipfile.ZIP_STORED:
                        spans.add((offset, record.file_size))
        # what zipfile raises for damaged directories, offsets out of the file, encrypted or exotic records
        except (zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, zlib.error) as error:
            raise ValueError(f"{path}: expected a zip file of torch.save, got a damaged one ({error}).") from None
    return spans


def _check_record(path: Path, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Refuses what torch.load would run out of memory or crash with; it finds records in any case of letters."""
    kind = record.filename.lower().rpartition("/")[2]
    limit = {"data.pkl": MAX_HEADER_BYTES, "byteorder": 20, ".storage_alignment": 20}.get(kind)
    if limit is not None and record.file_size > limit:
        raise ValueError(f"{path}: {kind}: expected at most {limit} bytes, got {record.file_size}.")
    # measured with torch 2.13: a segmentation fault for "big", a division by zero for alignment 0
    if kind == "byteorder" and (value := archive.read(record)) != b"little":
        raise ValueError(f"{path}: {kind}: expected b'little', got {value!r}; re-save it on a little-endian machine.")
    if kind == ".storage_alignment" and not re.fullmatch(rb"[1-9]\d{0,8}", value := archive.read(record)):
        raise ValueError(f"{path}: {kind}: expected a positive number, got {value!r}.")


def _unpickled(path: Path) -> Any:
    try:
        # on the meta device only the pickle is read, and storages say where in the file they lie
        return torch.load(path, map_location="meta", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        got = f"one that calls {named[1]}" if named else "a damaged or executable one"
        raise ValueError(
            f"{path}: expected a pickle of tensors and plain values, got {got}: refused; "
            "re-save its tensors alone, best as safetensors."
        ) from None
    # a damaged pickle raises almost anything
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: expected a file of torch.save, got {type(error).__name__}: {reason}.") from None


def _flat(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested dicts, in their order."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(value).__name__}.")
    stack, seen = [iter([("", value)])], set()
    while stack:
        name, value = next(stack[-1], (None, None))
        if name is None:
            stack.pop()
        elif not isinstance(value, dict):
            yield name, value
        # a dict inside itself would never end, and a tower of shared ones not in a lifetime
        elif id(value) in seen:
            raise ValueError(f"{path}: expected every dict once, got {name!r} again.")
        else:
            seen.add(id(value))
            prefix = f"{name}." if name else ""
            stack.append(iter([(f"{prefix}{key}", item) for key, item in value.items()]))


def _stored(path: Path, name: str, tensor: torch.Tensor, records: set[tuple[int, int]]) -> StoredTensor:
    storage = tensor.untyped_storage()
    if "_checkpoint_offset" not in vars(storage):
        raise NotImplementedError(
            f"{path}: reading files of torch.save needs torch 2.11, this is {torch.__version__}."
        )
    shape, stride, size = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    offset = storage._checkpoint_offset
    last = (tensor.storage_offset() + _span(shape, stride)) * size
    # an empty storage may have any offset
    is_record = storage.nbytes() == 0 or (offset, storage.nbytes()) in records
    if not is_record or last > storage.nbytes():
        raise ValueError(f"{path}: tensor {name!r}: expected a record with its {last} bytes, got none.")
    info = TensorInfo(_SPELLINGS[tensor.dtype], shape, math.prod(shape) * size, path)
    return StoredTensor(info, stride, offset + tensor.storage_offset() * size)
