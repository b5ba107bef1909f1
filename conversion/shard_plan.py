"""Which tensor goes into which file: shards by size for the Hub, expert ranks as Xiaomi releases them."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .checkpoint import Source
from .converters import Conversion, Plan
from .shard_writer import Planned, header_bytes
from .stored_weight import FP8, MXFP4


HUB_SHARD_BYTES = 5 * 10**9

# a released rank starts its next file past 32 GiB
XIAOMI_SHARD_BYTES = 2**35
RANKS = 8
MTP_FILE = "model_mtp.safetensors"

_RELEASED_FILE = re.compile(r"model_pp0_ep\d+_shard\d+\.safetensors|model_mtp\.safetensors")


class Shard(NamedTuple):
    """One output file: its tensors, and the conversions that make them.

    A conversion whose tensors lie in two files belongs to both, and each takes its own.
    """

    file: str
    tensors: dict[str, Planned]
    conversions: list[Conversion]
    metadata: dict[str, str] | None

    @property
    def size(self) -> int:
        return len(header_bytes(self.tensors, self.metadata)) + sum(item.nbytes for item in self.tensors.values())


def plan_shards(plan: Plan, source: Source, to: str, dtype: str, shard_size: int | None) -> list[Shard]:
    """The files of the target, in the order in which they are written."""
    if plan.parts == ("mtp",):
        places = {name: MTP_FILE for conversion in plan.conversions for name in conversion.outputs}
    elif to == "hub":
        places = _hub_places(plan, shard_size or HUB_SHARD_BYTES)
    else:
        places = _released_places(plan, source, dtype) or dict(_rank_places(plan, shard_size or XIAOMI_SHARD_BYTES))
    metadata = {"format": "pt"} if to == "hub" else None
    shards = {file: Shard(file, {}, [], metadata) for file in sorted(set(places.values()))}
    for conversion in plan.conversions:
        for name, planned in conversion.outputs.items():
            shard = shards[places[name]]
            shard.tensors[name] = planned
            if not shard.conversions or shard.conversions[-1] is not conversion:
                shard.conversions.append(conversion)
    return list(shards.values())


def index_of(shards: list[Shard], plan: Plan, to: str) -> dict[str, Any]:
    """The contents of model.safetensors.index.json."""
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    metadata: dict[str, Any] = {}
    if to == "xiaomi":
        dtypes = {planned.dtype for shard in shards for planned in shard.tensors.values()}
        saved = "mxfp4" if MXFP4 in dtypes else "fp8" if FP8 in dtypes else "fp16" if "F16" in dtypes else "bf16"
        metadata["save_format"] = saved
    metadata["total_size"] = sum(planned.nbytes for shard in shards for planned in shard.tensors.values())
    if to == "xiaomi":
        metadata["tp_size"] = plan.config.num_key_value_heads
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _hub_places(plan: Plan, shard_size: int) -> dict[str, str]:
    """Greedy, in the order of the model; a weight and its scales stay together, one larger than a shard is alone."""
    numbers, number, filled = {}, 1, 0
    for conversion in plan.conversions:
        size = sum(planned.nbytes for planned in conversion.outputs.values())
        if filled and filled + size > shard_size:
            number, filled = number + 1, 0
        filled += size
        numbers.update(dict.fromkeys(conversion.outputs, number))
    return {name: f"model-{at:05d}-of-{number:05d}.safetensors" for name, at in numbers.items()}


def _released_places(plan: Plan, source: Source, dtype: str) -> dict[str, str] | None:
    """The files of a source that has the released ones, where no tensor changes; else None."""
    places = {name: source.tensors[name].file.name for item in plan.conversions for name in item.inputs}
    unchanged = dtype == "keep" and all(conversion.is_copy for conversion in plan.conversions)
    return places if unchanged and all(map(_RELEASED_FILE.fullmatch, places.values())) else None


def _rank_places(plan: Plan, shard_size: int) -> Iterator[tuple[str, str]]:
    """(tensor, file) as in V2.5: every rank has an equal share of the experts of all layers, rank 0 the rest as well.

    A rank writes layer by layer all gate, all up, all down projections, and starts its second file after the first
    tensor past the limit, be it a weight whose scale then comes in the next file.
    """
    experts: dict[int, list[tuple[tuple, Conversion]]] = {}
    share = plan.config.n_routed_experts // RANKS
    if share * RANKS != plan.config.n_routed_experts:
        share = plan.config.n_routed_experts
    others = []
    for conversion in plan.conversions:
        name = conversion.target[0].name
        if ".mlp.experts." in name:
            _, _, layer, _, _, expert, projection, _ = name.split(".")
            order = (int(layer), ("gate_proj", "up_proj", "down_proj").index(projection), int(expert))
            experts.setdefault(int(expert) // share, []).append((order, conversion))
        elif conversion.part == "mtp":
            yield from ((name, MTP_FILE) for name in conversion.outputs)
        else:
            others.append(conversion)
    last = 0
    for rank, items in experts.items():
        shard = filled = 0
        for _, conversion in sorted(items, key=lambda item: item[0]):
            for name, planned in conversion.outputs.items():
                yield name, f"model_pp0_ep{rank}_shard{shard}.safetensors"
                last = shard if rank == 0 else last
                filled += planned.nbytes
                if filled > shard_size:
                    shard, filled = shard + 1, 0
    for conversion in others:
        yield from ((name, f"model_pp0_ep0_shard{last}.safetensors") for name in conversion.outputs)


__all__ = ["HUB_SHARD_BYTES", "MTP_FILE", "XIAOMI_SHARD_BYTES", "Shard", "index_of", "plan_shards"]
