"""Rows of the tensors of a checkpoint, without reading more of them.

The library's lazy slices read a whole tensor for every few rows of it where they do not map the file (safetensors 0.8,
`backend="pread"`: 25 slices of a tensor of 410 MB took 14 s and 423 MB), and a map of a released file of 34 GB is
refused on machines with less memory.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from modeling_mimo.checkpoint_mimo_v2 import TensorInfo


# spelling of safetensors -> torch
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def data_offsets(path: Path) -> dict[str, int]:
    """The byte at which each tensor begins in a file whose header `read_header` accepted."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}


def read_into(file: BinaryIO, offset: int, view: memoryview) -> None:
    """Fills `view` with the bytes of an unbuffered file from `offset` on. OSError: the file ends before."""
    while view:
        if not (count := os.preadv(file.fileno(), [view], offset)):
            raise OSError(f"{file.name}: expected {len(view)} more bytes at {offset}, got the end: was it changed?")
        view, offset = view[count:], offset + count


class RowReader:
    """Reads rows of `tensors`, whose headers `read_header` accepted; keeps the files open."""

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = tensors
        self._files: dict[Path, BinaryIO] = {}
        self._starts: dict[str, int] = {}
        for path in dict.fromkeys(info.file for info in tensors.values()):
            self._starts |= data_offsets(path)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension; a scalar is one row, and all of it is the default.

        A dtype that torch has not comes as the bytes of these rows. OSError: the file ends before them.
        """
        info = self.tensors[name]
        count, *rest = info.shape or (1,)
        stop = count if stop is None else min(stop, count)
        shape, row = (stop - start, *rest), info.nbytes // max(count, 1)
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        if data.numel():
            self.read_bytes(name, start * row, memoryview(data.numpy()))
        return data.view(TORCH_DTYPES[info.dtype]).view(shape) if info.dtype in TORCH_DTYPES else data

    def read_bytes(self, name: str, start: int, view: memoryview) -> None:
        """Fills `view` with the bytes of a tensor from its byte `start` on."""
        path = self.tensors[name].file
        if path not in self._files:
            self._files[path] = path.open("rb", buffering=0)
        read_into(self._files[path], self._starts[name] + start, view)

    def blocks(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        """All rows of a tensor, some `elements` at a time; none of an empty tensor."""
        info = self.tensors[name]
        if size := math.prod(info.shape):
            count = info.shape[0] if info.shape else 1
            height = max(1, elements // (size // count))
            for start in range(0, count, height):
                yield self.rows(name, start, start + height)
