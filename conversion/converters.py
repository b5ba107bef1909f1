"""What becomes of every weight: the plan of a conversion as data, made and checked before the first byte is read.

A `Conversion` knows the tensors it needs (a weight and its scale may lie in different files), the tensors it makes,
and the pure function between them. `plan_conversions` makes one for every weight of a checkpoint, out of the same
table that loading uses; `target_config` says what config.json becomes.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch

from modeling_mimo.checkpoint_mimo_v2 import check_tensors, find_layout, take_mtp_layers_from_files
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import ReleasedTensor, released_tensors

from .checkpoint import Source, parse_config
from .fused_qkv import fuse_qkv, fuse_qkv_fp8, qkv_blocks_are_exact, rechunk_qkv_fp8, split_qkv, split_qkv_fp8
from .mxfp4 import MXFP4_GROUP
from .row_reader import TORCH_DTYPES
from .shard_writer import Planned
from .stored_weight import FP8, MXFP4, QUANTIZED, Difference, StoredWeight, difference


TARGETS = ("hub", "xiaomi")
DTYPES = ("keep", "fp8", "bf16", "fp16", "mxfp4")
LAYOUTS = ("split", "fused")
PARTS = ("text", "mtp", "vision", "audio")

FLOAT_DTYPES = {"bf16": "BF16", "fp16": "F16"}
_SPLIT_NAMES = ("q_proj", "k_proj", "v_proj")

# Bytes per value beside inputs and outputs: rows put in another order; float32 copies of both sides for the measured
# error. And what one step of the arithmetic takes, of dequantization and of everything else. The tests hold the sums
# against a running process.
_MOVED, _MEASURED = 4, 8
_DEQUANTIZING, _QUANTIZING = 2**25, 2**28

# Tensors whose rows do not depend on each other are read and written in pieces of this many bytes, which stay in the
# cache between the disk and the hash.
PIECE_BYTES = 2**22


class Conversion(NamedTuple):
    """Some weights as they are stored, and as they will be.

    `source` and `target` are one weight, or for attention projections one fused or three split ones; `sizes` are
    then the rows of Q, K and V. `group` is what errors are summed over.
    """

    source: tuple[StoredWeight, ...]
    target: tuple[StoredWeight, ...]
    group: str
    part: str
    sizes: tuple[int, int, int] | None = None

    @property
    def inputs(self) -> dict[str, Planned]:
        """The tensors of the source that are needed, by name."""
        return {name: planned for weight in self.source for name, planned in weight.tensors().items()}

    @property
    def outputs(self) -> dict[str, Planned]:
        """The tensors that are made, by name."""
        return {name: planned for weight in self.target for name, planned in weight.tensors().items()}

    @property
    def is_copy(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.source == self.target

    @property
    def is_rowwise(self) -> bool:
        """Whether every piece of whole rows can be made alone: nothing but a cast, or not even that."""
        dtypes = {self.source[0].dtype, self.target[0].dtype}
        return self.is_copy or not (dtypes & set(QUANTIZED) or self.is_moved)

    @property
    def is_moved(self) -> bool:
        """Whether rows change their order."""
        forms = [(len(side), side[0].chunks) for side in (self.source, self.target)]
        return self.sizes is not None and forms[0] != forms[1]

    @property
    def is_measured(self) -> bool:
        """Whether values may change by more than the rounding that loading in the target's dtype does too."""
        if self.is_copy:
            return False
        if self.target[0].dtype in QUANTIZED:
            return True
        return self.target[0].dtype == "F16" and self.source[0].dtype != "F16"

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once while this runs."""
        if self.is_rowwise:
            return PIECE_BYTES * (1 if self.is_copy else 10)
        values = sum(math.prod(weight.shape) for weight in self.source)
        tensors = sum(planned.nbytes for planned in (*self.inputs.values(), *self.outputs.values()))
        per_value = (_MOVED if self.is_moved else 0) + (_MEASURED if self.is_measured else 0)
        step = _QUANTIZING if self.is_measured else _DEQUANTIZING
        # a small weight fills no whole step
        return tensors + per_value * values + min(step, 32 * values)

    def process(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`inputs` -> `outputs`. ValueError names the weight that the target cannot hold."""
        if self.is_copy:
            return dict(tensors)
        if self.is_moved and self.source[0].dtype == self.target[0].dtype == FP8:
            return self._move_fp8(tensors)
        source, target = self.source[0].dtype, self.target[0].dtype
        # to bfloat16 or float16 there is one rounding, as in loading; quantization starts from all bits there are
        dtype = TORCH_DTYPES[target if target not in QUANTIZED else "F32" if source in QUANTIZED else source]
        outputs: dict[str, torch.Tensor] = {}
        arranged = self._arranged([weight.load(tensors, dtype) for weight in self.source])
        for weight, values in zip(self.target, arranged):
            outputs.update(weight.store(values))
        return outputs

    def measure(self, tensors: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Difference:
        """How far `outputs` are from `tensors`, both as float32."""
        total = Difference()
        before = self._arranged([weight.load(tensors, torch.float32) for weight in self.source])
        for weight, values in zip(self.target, before):
            total += difference(values, weight.load(outputs, torch.float32))
        return total

    def _arranged(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Float rows of the source weights in the order of the target weights."""
        if not self.is_moved:
            return weights
        parts = weights if len(weights) == 3 else split_qkv(weights[0], self.sizes, self.source[0].chunks)
        return list(parts) if len(self.target) == 3 else [fuse_qkv(*parts, self.target[0].chunks)]

    def _move_fp8(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rows between layouts without a way through floats, so that whole blocks keep their bits."""
        pairs = [(tensors[weight.name], tensors[f"{weight.name}_scale_inv"]) for weight in self.source]
        source, target = self.source[0].chunks, self.target[0].chunks
        if len(pairs) == 3:
            moved = [fuse_qkv_fp8(pairs, target)]
        elif len(self.target) == 3:
            moved = split_qkv_fp8(*pairs[0], self.sizes, source)
        else:
            moved = [rechunk_qkv_fp8(*pairs[0], self.sizes, source, target)]
        outputs = {}
        for weight, (codes, scale) in zip(self.target, moved):
            outputs[weight.name], outputs[f"{weight.name}_scale_inv"] = codes, scale
        return outputs


class Plan(NamedTuple):
    """Every weight that is converted, in the order of the model.

    `layout` and `source_layout`: "chunked", "plain" or "split". `config`: of the source, with the MTP layers that the
    files have. `parts` are those that are written.
    """

    conversions: list[Conversion]
    config: MiMoV2Config
    source_layout: str
    layout: str
    parts: tuple[str, ...]


def part_of(spec: ReleasedTensor) -> str:
    """Which of PARTS a tensor belongs to."""
    return spec.part if spec.part in ("mtp", "vision", "audio") else "text"


def parse_parts(only: str | Collection[str] | None) -> tuple[str, ...]:
    """Parts out of `"text,mtp"` or a collection, in the order of PARTS; all for None. ValueError: an unknown one."""
    if only is None or not only:
        return PARTS
    items = [only] if isinstance(only, str) else only
    names = [name.strip() for item in items for name in item.split(",")]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"only: expected some of {', '.join(PARTS)}, got {name!r}.")
    return tuple(part for part in PARTS if part in names)


def plan_conversions(source: Source, to: str, dtype: str, layout: str | None, parts: tuple[str, ...]) -> Plan:
    """A plan for every weight of the wanted parts.

    Raises:
        ValueError: one error that lists every unknown, missing, mis-shaped or wrongly typed tensor of the source; or
            a choice that the target does not have.
    """
    for field, value, known in (("to", to, TARGETS), ("dtype", dtype, DTYPES), ("layout", layout, (None, *LAYOUTS))):
        if value not in known:
            raise ValueError(f"{field}: expected one of {', '.join(map(str, known))}, got {value!r}.")
    config, tensors = parse_config(source.config), source.tensors
    take_mtp_layers_from_files(config, tensors)
    left_out = [part for part in PARTS if part not in parts]
    if "text" in left_out:
        left_out += sorted({spec.part for spec in released_tensors(config).values() if part_of(spec) == "text"})
    report = check_tensors(config, tensors, left_out)
    source_layout, _ = find_layout(config, tensors)
    table = released_tensors(config, "plain" if report.layout == "plain" else "chunked")
    target_layout = _target_layout(config, source_layout, report.fp8, to, dtype, layout)
    conversions = [
        conversion
        for conversion in _conversions(config, table, tensors, dtype, target_layout)
        if conversion.part in parts
    ]
    found = {conversion.part for conversion in conversions}
    absent = [part for part in parts if part not in found]
    if absent and parts != PARTS:
        raise ValueError(f"only: expected parts that {source.name} has, got {', '.join(absent)}.")
    return Plan(conversions, config, source_layout, target_layout, tuple(part for part in PARTS if part in found))


def _target_layout(
    config: MiMoV2Config, source_layout: str, fp8: bool, to: str, dtype: str, layout: str | None
) -> str:
    """Row order of the target: "chunked", "plain" or "split"."""
    if to == "xiaomi":
        # CODEPATH: V2-Flash was released split, and the other engines' classes for it read nothing else
        released = "split" if config.model_type == "mimo_v2_flash" else "fused"
        if layout not in (None, released):
            raise ValueError(f"layout: expected {released} for xiaomi and {config.model_type}, got {layout}.")
        return "split" if released == "split" else "chunked"
    if layout is not None:
        return "split" if layout == "split" else "chunked"
    if source_layout == "plain" and dtype not in FLOAT_DTYPES and (fp8 or dtype == "keep"):
        # other row order would requantize FP8 blocks, and nobody asked for it
        return "plain"
    return "chunked" if source_layout == "plain" else source_layout


def _conversions(
    config: MiMoV2Config,
    table: Mapping[str, ReleasedTensor],
    tensors: Mapping,
    dtype: str,
    layout: str,
) -> Iterator[Conversion]:
    for name, spec in table.items():
        # an absent part was found absent as a whole
        if name not in tensors:
            continue
        projection = name.rsplit(".", 2)[1]
        is_qkv = projection in ("qkv_proj", *_SPLIT_NAMES) and name.startswith("model.")
        group, part = f"{spec.part}.{projection}" if name.count(".") > 2 else spec.part, part_of(spec)
        if is_qkv:
            # k_proj and v_proj went with their q_proj
            if projection in ("qkv_proj", "q_proj"):
                yield _attention_conversion(config, table, tensors, name, dtype, layout)
            continue
        source = StoredWeight(name, spec.shape, tensors[name].dtype, spec.chunks)
        target = source._replace(dtype=_target_dtype(spec, source.dtype, dtype))
        if target.dtype == MXFP4 and spec.shape[1] % MXFP4_GROUP:
            raise ValueError(f"{name}: expected columns in blocks of {MXFP4_GROUP} for mxfp4, got {list(spec.shape)}.")
        yield Conversion((source,), (target,), group, part)


def _attention_conversion(
    config: MiMoV2Config,
    table: Mapping[str, ReleasedTensor],
    tensors: Mapping,
    name: str,
    dtype: str,
    layout: str,
) -> Conversion:
    """Fused or split projections of one layer, weights or biases, `name` being the first."""
    prefix, projection, kind = name.rsplit(".", 2)
    sliding = ".mtp." in prefix or config.layer_types[int(prefix.split(".")[2])] == "sliding_attention"
    geometry = config.attention_geometry("sliding_attention" if sliding else "full_attention")
    sizes = geometry.qkv_sizes
    names = [name] if projection == "qkv_proj" else [f"{prefix}.{part}.{kind}" for part in _SPLIT_NAMES]
    # a bias has the row order of its weight
    source_chunks = table[f"{prefix}.{projection}.weight"].chunks
    source = tuple(StoredWeight(each, table[each].shape, tensors[each].dtype, source_chunks) for each in names)
    spec = table[name]
    if len({weight.dtype for weight in source}) > 1:
        got = ", ".join(f"{weight.name} {weight.dtype}" for weight in source)
        raise ValueError(f"{prefix}: expected q_proj, k_proj and v_proj of one dtype, got {got}.")
    wanted = _target_dtype(spec, source[0].dtype, dtype)
    tail = source[0].shape[1:]
    if layout == "split":
        target = tuple(
            StoredWeight(f"{prefix}.{part}.{kind}", (rows, *tail), wanted) for part, rows in zip(_SPLIT_NAMES, sizes)
        )
    else:
        chunks = geometry.qkv_chunks if layout == "chunked" else 1
        target = (StoredWeight(f"{prefix}.qkv_proj.{kind}", (sum(sizes), *tail), wanted, chunks),)
    return Conversion(source, target, f"{spec.part}.qkv_proj", part_of(spec), sizes)


def _target_dtype(spec: ReleasedTensor, stored: str, dtype: str) -> str:
    # the router decides between experts: its dtype is part of the architecture (`moe_router_dtype`)
    if dtype == "keep" or spec.part == "router":
        return stored
    if dtype in FLOAT_DTYPES:
        return FLOAT_DTYPES[dtype]
    if spec.quantized:
        return MXFP4 if dtype == "mxfp4" and spec.part == "experts" else FP8
    return stored


def is_exact(conversion: Conversion) -> bool:
    """Whether every value of a layout change in FP8 stays as it is, whatever the scales are."""
    forms = ["split" if len(side) == 3 else side[0].chunks for side in (conversion.source, conversion.target)]
    return conversion.sizes is not None and qkv_blocks_are_exact(conversion.sizes, *forms)


__all__ = [
    "DTYPES",
    "LAYOUTS",
    "PARTS",
    "PIECE_BYTES",
    "TARGETS",
    "Conversion",
    "Plan",
    "is_exact",
    "parse_parts",
    "part_of",
    "plan_conversions",
]
