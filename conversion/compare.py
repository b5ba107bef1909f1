"""Two checkpoints, tensor by tensor: equal by bytes, equal after dequantization, or how far apart.

A tensor is compared in row blocks, so that memory stays bounded whatever its size. Where the row order of the fused
projections differs (chunked, plain, split), both sides are read as query, key and value rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from modeling_mimo.checkpoint_mimo_v2 import FP8_DTYPE, Checkpoint, TensorInfo, find_layout
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import ReleasedTensor, released_tensors

from .fp8 import BLOCK, dequantize_blocks
from .row_reader import RowReader


# elements of one row block: 32 MB per side as float32
STEP = 2**23

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# Most rms error of a tensor, relative to its rms, that a change of dtype explains. Rounding once to 8 bits of a
# bfloat16 gives at most 0.004, to the 4 bits of an FP8 code 0.03 (measured 0.026), to the 2 bits of an MXFP4 code
# about 0.12. Rows in a wrong order give 1.4.
TOLERANCE = {"float": 0.01, "fp8": 0.05, "mxfp4": 0.2}


class Rows(NamedTuple):
    """A tensor to compare: the stored tensor, and the runs of its rows that belong to it, in order."""

    name: str
    spec: ReleasedTensor | None
    runs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.runs)


@dataclass
class Side:
    """One checkpoint as the comparison sees it. Without a config, tensors are only compared as they are stored."""

    checkpoint: Checkpoint
    config: MiMoV2Config | None

    @cached_property
    def reader(self) -> RowReader:
        return RowReader(self.checkpoint.tensors)

    @cached_property
    def layout(self) -> str | None:
        return None if self.config is None else find_layout(self.config, self.checkpoint.tensors)[0]

    @property
    def layout_is_assumed(self) -> bool:
        """Neither config nor scale grids say it: only FP8 weights have grids."""
        is_fp8 = any(info.dtype == FP8_DTYPE for info in self.checkpoint.tensors.values())
        return self.config is not None and self.config.fused_qkv_layout is None and not is_fp8

    @cached_property
    def table(self) -> dict[str, ReleasedTensor]:
        return {} if self.config is None else released_tensors(self.config, self.layout)

    def info(self, rows: Rows) -> TensorInfo:
        return self.checkpoint.tensors[rows.name]

    def scale_name(self, name: str) -> str | None:
        """The tensor that holds the scales of `name`, if it is quantized."""
        dtype = self.checkpoint.tensors[name].dtype
        suffix = {FP8_DTYPE: "_scale_inv", "U8": "_scale"}.get(dtype)
        return f"{name}{suffix}" if suffix and f"{name}{suffix}" in self.checkpoint.tensors else None

    def tensors(self, split_qkv: bool) -> dict[str, Rows]:
        """What there is to compare, by name; scales belong to their weights."""
        found = {}
        scales = {self.scale_name(name) for name in self.checkpoint.tensors}
        for name, info in self.checkpoint.tensors.items():
            if name in scales:
                continue
            spec = self.table.get(name)
            if split_qkv and spec is not None and ".qkv_proj." in name and name.startswith("model."):
                found |= self._split(name, spec)
            else:
                # a scalar is one row
                found[name] = Rows(name, spec, ((0, info.shape[0] if info.shape else 1),))
        return found

    def _split(self, name: str, spec: ReleasedTensor) -> dict[str, Rows]:
        """q, k and v of a fused projection [chunks x (Q_c | K_c | V_c)], each in the order of its heads."""
        _, kind, *rest = name.split(".")
        layer_type = "sliding_attention" if kind == "mtp" else self.config.layer_types[int(rest[0])]
        geometry = self.config.attention_geometry(layer_type)
        chunks = geometry.qkv_chunks if self.layout == "chunked" else 1
        found, offset = {}, 0
        for letter, rows in zip("qkv", geometry.qkv_sizes):
            height = rows // chunks
            starts = [chunk * (sum(geometry.qkv_sizes) // chunks) + offset for chunk in range(chunks)]
            runs = tuple((start, start + height) for start in starts)
            found[name.replace("qkv_proj", f"{letter}_proj")] = Rows(name, spec, runs)
            offset += height
        return found

    def stored(self, rows: Rows, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of what is compared, as they are in the file."""
        return _joined([self.reader.rows(rows.name, *run) for run in _overlap(rows.runs, start, stop)])

    def values(self, rows: Rows, start: int, stop: int) -> torch.Tensor:
        """The same as float32, dequantized."""
        scale_name = self.scale_name(rows.name)
        if scale_name is None:
            return self.stored(rows, start, stop).float()
        parts = []
        for first, last in _overlap(rows.runs, start, stop):
            codes = self.reader.rows(rows.name, first, last)
            if self.checkpoint.tensors[rows.name].dtype == FP8_DTYPE:
                scale = self.reader.rows(scale_name)
                chunks = 1 if rows.spec is None else rows.spec.chunks
                height = self.checkpoint.tensors[rows.name].shape[0] // chunks
                parts.append(_dequantize_rows(codes, scale, first, height))
            else:
                # imported here: only MXFP4 checkpoints need it
                from .mxfp4 import dequantize_mxfp4

                parts.append(dequantize_mxfp4(codes, self.reader.rows(scale_name, first, last), torch.float32))
        return _joined(parts)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _overlap(runs: tuple[tuple[int, int], ...], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of `runs` that hold rows `start` to `stop`, counted over all runs."""
    position = 0
    for first, last in runs:
        low, high = max(start - position, 0), min(stop - position, last - first)
        if low < high:
            yield first + low, first + high
        position += last - first


def _dequantize_rows(codes: torch.Tensor, scale: torch.Tensor, first: int, height: int) -> torch.Tensor:
    """Rows of an FP8 weight whose scale grid starts anew every `height` rows; `codes` begin at its row `first`."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    blocks, done = math.ceil(height / BLOCK), 0
    while done < len(codes):
        chunk, row = divmod(first + done, height)
        block, inside = divmod(row, BLOCK)
        # up to the end of a block that was entered in its middle, else up to the end of the chunk
        stop = min(len(codes), done + (min(BLOCK - inside, height - row) if inside else height - row))
        top = chunk * blocks + block
        grid = scale[top : top + math.ceil((stop - done) / BLOCK)]
        dequantize_blocks(codes[done:stop], grid, torch.float32, out=values[done:stop])
        done = stop
    return values


@dataclass
class Errors:
    """Differences of values over one tensor or one group, B against A."""

    count: int = 0
    largest: float = 0.0
    absolute: float = 0.0
    squared: float = 0.0
    norm: float = 0.0

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        difference = (right - left).abs_()
        # NaN on both sides is a NaN here, and no maximum
        self.largest = max(self.largest, difference.amax().nan_to_num(math.inf).item())
        self.absolute += difference.sum(dtype=torch.float64).item()
        self.squared += difference.square_().sum(dtype=torch.float64).item()
        self.norm += left.square().sum(dtype=torch.float64).item()
        self.count += left.numel()

    def merge(self, other: "Errors") -> None:
        self.largest = max(self.largest, other.largest)
        for name in ("count", "absolute", "squared", "norm"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def rms_relative(self) -> float:
        if self.squared == 0:
            return 0.0
        return math.sqrt(self.squared / self.norm) if self.norm > 0 else math.inf

    def to_dict(self) -> dict[str, float | None]:
        values = {
            "max_abs": self.largest,
            "mean_abs": self.absolute / max(self.count, 1),
            "rms_relative": self.rms_relative,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass
class Comparison:
    """Counts per group of tensors, errors of those that are not equal, and what is wrong."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        groups = {
            group: {
                **sums,
                "errors": sums["errors"].to_dict(),
                "worst": sums["worst"] and dict(zip(("rms_relative", "tensor"), sums["worst"])),
            }
            for group, sums in self.groups.items()
        }
        totals = {kind: sum(sums[kind] for sums in groups.values()) for kind in ("equal", "dequantized", "different")}
        return {**totals, "groups": groups}


def compare(left: Side, right: Side, name: str = "", advance=lambda count: None) -> Comparison:
    """Every tensor of two checkpoints; `advance` gets the bytes of A that were looked at.

    Equal bytes are best. `dequantized` counts tensors whose values are equal once both have the dtype of one side;
    for the others the error is measured, and it is a problem where the same dtype and row order are stored, or where
    it is larger than the change of dtype explains.
    """
    result = Comparison()
    split_qkv = left.layout != right.layout and None not in (left.layout, right.layout)
    tensors, others = left.tensors(split_qkv), right.tensors(split_qkv)
    for only, where in ((tensors.keys() - others.keys(), "A"), (others.keys() - tensors.keys(), "B")):
        if only:
            result.problems.append(f"{name}only in {where} ({len(only)}): {listed(sorted(only))}")
    apart: dict[str, list[str]] = {}
    for tensor, rows in tensors.items():
        if tensor not in others:
            continue
        group = rows.spec.part if rows.spec else (name.rstrip("/: ") or "unknown")
        sums = result.groups.setdefault(
            group, {"tensors": 0, "equal": 0, "dequantized": 0, "different": 0, "errors": Errors(), "worst": None}
        )
        kind, errors, problem = _compare_tensor(left, rows, right, others[tensor])
        sums["tensors"] += 1
        sums[kind] += 1
        sums["errors"].merge(errors)
        if errors.count and math.isfinite(errors.rms_relative):
            sums["worst"] = max(sums["worst"] or (0.0, tensor), (errors.rms_relative, tensor))
        if problem:
            apart.setdefault(problem, []).append(f"{tensor} ({errors.rms_relative:.3g})" if errors.count else tensor)
        advance(left.info(rows).nbytes * rows.count // max(1, (left.info(rows).shape or (1,))[0]))
    result.problems += [f"{name}{what} ({len(names)}): {listed(names)}" for what, names in apart.items()]
    if any("qkv_proj" in tensor or ".q_proj" in tensor for names in apart.values() for tensor in names):
        result.problems += _layout_hints(left, right)
    return result


def _layout_hints(left: Side, right: Side) -> list[str]:
    return [
        f"hint: shapes do not show the row order of qkv_proj in {where}, the released one was taken; if it comes from "
        'a program that writes [Q; K; V], add "fused_qkv_layout": "plain" to its config.json and compare again'
        for side, where in ((left, "A"), (right, "B"))
        if side.layout == "chunked" and side.layout_is_assumed
    ]


def listed(names: list[str], most: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _compare_tensor(left: Side, rows: Rows, right: Side, others: Rows) -> tuple[str, Errors, str | None]:
    """("equal", "dequantized" or "different", errors, what is wrong)."""
    info, other = left.info(rows), right.info(others)
    errors = Errors()
    quantized = [side.scale_name(part.name) is not None for side, part in ((left, rows), (right, others))]
    same_form = (info.dtype, info.shape, rows.runs) == (other.dtype, other.shape, others.runs)
    if same_form and _bytes_equal(left, rows, right, others):
        return "equal", errors, None
    columns = [_columns(side, part) for side, part in ((left, rows), (right, others))]
    if rows.count != others.count or columns[0] != columns[1]:
        return "different", errors, "shapes differ"
    if not all(is_quantized or part.dtype in TORCH_DTYPES for is_quantized, part in zip(quantized, (info, other))):
        return "different", errors, "stored values differ"
    dtype = TORCH_DTYPES.get(other.dtype, TORCH_DTYPES.get(info.dtype, torch.float32))
    exact = True
    for start, stop in _blocks(rows.count, columns[0]):
        one, two = left.values(rows, start, stop), right.values(others, start, stop)
        exact = exact and torch.equal(one.to(dtype), two.to(dtype))
        errors.add(one, two)
    if same_form:
        return "different", errors, "stored with the same dtype and other values (rms relative)"
    if exact:
        return "dequantized", errors, None
    kinds = {FP8_DTYPE: "fp8", "U8": "mxfp4"}
    coarsest = max((kinds.get(part.dtype, "float") for part in (info, other)), key=TOLERANCE.get)
    if errors.rms_relative <= TOLERANCE[coarsest]:
        return "different", errors, None
    return "different", errors, f"further apart than {TOLERANCE[coarsest]:g} (rms relative), the most for {coarsest}"


def _columns(side: Side, rows: Rows) -> int:
    info = side.info(rows)
    packed = 2 if info.dtype == "U8" and side.scale_name(rows.name) else 1
    return math.prod(info.shape[1:]) * packed


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Row blocks of about STEP elements, cut between scale blocks if that many rows fit; none of an empty tensor."""
    if columns == 0:
        return
    height = max(1, STEP // max(1, columns))
    height -= height % BLOCK if height > BLOCK else 0
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def _bytes_equal(left: Side, rows: Rows, right: Side, others: Rows) -> bool:
    for start, stop in _blocks(rows.count, _columns(left, rows)):
        if not _same_bytes(left.stored(rows, start, stop), right.stored(others, start, stop)):
            return False
    scales = left.scale_name(rows.name), right.scale_name(others.name)
    if None in scales:
        return scales == (None, None)
    return _same_bytes(left.reader.rows(scales[0]), right.reader.rows(scales[1]))


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    """By bits: NaN equals itself, and 0 is not -0."""
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
