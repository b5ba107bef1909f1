"""Writes one safetensors file whose tensors are known before the first one is there.

The header is written first, then every tensor goes to its own place, in any order. The file is called
`<name>.partial` until it is whole and on the disk.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from modeling_mimo.checkpoint_mimo_v2 import DTYPE_BITS


# the library's order of dtypes in a file: wide ones first, so that every tensor is aligned
_DTYPE_ORDER = ("F32", "BF16", "F16", "F8_E4M3", "U8")
_READ_BACK = 2**24


class Planned(NamedTuple):
    """dtype in the spelling of safetensors, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def file_order(tensors: Mapping[str, Planned]) -> list[str]:
    """Names in the order in which the safetensors library lays them out: by dtype, then by name."""
    return sorted(tensors, key=lambda name: (_DTYPE_ORDER.index(tensors[name].dtype), name))


def header_bytes(tensors: Mapping[str, Planned], metadata: dict[str, str] | None) -> bytes:
    """Length and header of a file with `tensors` in `file_order`, byte for byte as the library writes them."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name in file_order(tensors):
        dtype, shape = tensors[name]
        stop = position + tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """`write` or `write_rows` every tensor once, then `finish`; `close` leaves an unfinished file as `.partial`.

    The sha256 runs along as long as the bytes come in the order of the file, and reads back what came out of order.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Planned], metadata: dict[str, str] | None = None):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.tensors = tensors
        header = header_bytes(tensors, metadata)
        self._starts, position = {}, len(header)
        for name in file_order(tensors):
            self._starts[name] = position
            position += tensors[name].nbytes
        self.size = position
        self._missing = {name: planned.nbytes for name, planned in tensors.items()}
        self._hash, self._hashed = hashlib.sha256(), 0
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._put(memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The whole tensor. ValueError: not of the planned dtype and shape."""
        planned = self.tensors[name]
        if tuple(tensor.shape) != planned.shape or tensor.nbytes != planned.nbytes:
            raise ValueError(
                f"{name}: expected {planned.dtype} {list(planned.shape)}, got {tensor.dtype} {list(tensor.shape)}."
            )
        self.write_rows(name, tensor, 0)

    def write_rows(self, name: str, tensor: torch.Tensor, start: int) -> None:
        """Rows of a tensor, from row `start` of its first dimension on."""
        planned = self.tensors[name]
        row = planned.nbytes // planned.shape[0] if start else 0
        self.write_bytes(name, start * row, memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))

    def write_bytes(self, name: str, start: int, data: memoryview) -> None:
        """Bytes of a tensor, from its byte `start` on."""
        self._put(data, self._starts[name] + start)
        self._missing[name] -= len(data)

    def finish(self) -> str:
        """Flushes to the disk and gives the file its name; returns its sha256. ValueError: tensors are missing."""
        missing = [name for name, nbytes in self._missing.items() if nbytes != 0]
        if missing:
            raise ValueError(f"{self.path}: expected every planned tensor once, got only a part of {missing[0]}.")
        while self._hashed < self.size:
            piece = os.pread(self._file, _READ_BACK, self._hashed)
            self._hash.update(piece)
            self._hashed += len(piece)
        os.fsync(self._file)
        self.close()
        os.rename(self.partial, self.path)
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _put(self, data: memoryview, offset: int) -> None:
        if offset == self._hashed:
            self._hash.update(data)
            self._hashed += len(data)
        while data:
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count


__all__ = ["Planned", "ShardWriter", "file_order", "header_bytes"]
