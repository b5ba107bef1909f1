"""Weights that stay on disk or in CPU memory while the model runs: device maps with "disk", and offloaded experts.

Transformers writes every parameter that loading converts once more before accelerate may read it: 630 GB of bf16 for
the FP8 files of MiMo-V2.5. Here a parameter on disk is read from the released files and converted as loading does,
whenever accelerate's hooks ask for it, and nothing is written. Of stacked experts, which are 97 % of the weights, the
hooks would fetch whole layers; `MiMoV2OffloadedExperts` fetches those that tokens are routed to.
"""

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, convert_file_size_to_int
from torch import nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.accelerate import expand_device_map
from transformers.modeling_utils import PreTrainedModel

from .configuration_mimo_v2 import QUANT_METHOD, MiMoV2Config
from .fp8_mimo_v2 import dequantize_blocks
from .modeling_mimo_v2_text import MiMoV2Experts
from .mxfp4_mimo_v2 import dequantize_mxfp4
from .quantization_mimo_v2 import CodedExpertsMixin, MiMoV2FP8Experts


# names in an error message
MAX_LISTED = 10

# a stacked parameter of the experts -> what the files call its row groups
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# by name, since the quantizer of another copy of these files (Hub remote code) makes classes of its own
STACKED_EXPERTS = ("MiMoV2Experts", "MiMoV2FP8Experts", "MiMoV2MXFP4Experts", "FP8Experts")

# one expert's share of a stacked parameter as it is stored: of each row group the weight, and its scale or None
StoredExpert = list[tuple[torch.Tensor, torch.Tensor | None]]


def check_device_map(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Raises a one-line `ValueError` for a device that is not here or a module that no entry of the map covers.

    Transformers would find the one out after the files are read, and put the other on the CPU without a word.
    """
    for module, device in device_map.items():
        if not _is_here(device):
            raise ValueError(
                f"`device_map[{module!r}]`: expected 'cpu', 'disk' or one of the {torch.accelerator.device_count()} "
                f"accelerators here, got {device!r}."
            )
    # an entry for "" covers everything
    weights = () if "" in device_map else model.state_dict()
    missing = {_uncovered(name, device_map) for name in weights} - {None}
    if missing:
        listed = ", ".join(sorted(missing, key=dot_natural_key)[:MAX_LISTED])
        rest = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise ValueError(f"`device_map`: expected an entry for every module, got none for {listed}{rest}.")
    nested = [name for name in device_map if any(outer != name and _is_in(name, outer) for outer in device_map)]
    if nested and "disk" in device_map.values():
        # accelerate would move the weights of the inner module with the outer one
        raise ValueError(
            f"`device_map`: expected no entry inside another where modules are on disk, got {nested[0]!r}; "
            "`expert_device_map` writes a map with the experts there and everything else elsewhere."
        )


def _is_here(device: Any) -> bool:
    if device == "disk":
        return True
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    if device.type in ("cpu", "meta"):
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    return accelerator is not None and device.type == accelerator.type and (device.index or 0) < count


def _is_in(name: str, module: str) -> bool:
    return module == "" or name == module or name.startswith(f"{module}.")


def _uncovered(weight: str, device_map: Mapping[str, Any]) -> str | None:
    """The outermost module around a weight that no entry has to do with, or None for a weight that one covers."""
    if any(_is_in(weight, module) for module in device_map):
        return None
    parts = weight.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next(module for module in modules if not any(_is_in(entry, module) for entry in device_map))


def expert_device_map(config: MiMoV2Config, experts: str | int = "disk", others: str | int = "cpu") -> dict:
    """A `device_map` with the routed experts in one place and everything else in another.

    Args:
        experts: `"disk"`, or `"cpu"` beside a GPU: the experts that tokens are routed to are fetched from there.
        others: the device that computes; in V2.5 it holds 12.2 GB of FP8 and bf16.
    """
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    if config.num_mtp_layers > 0 and config.load_mtp:
        names.append("model.mtp")
    if config.vision_config is not None and config.load_towers:
        names.append("visual")
    if config.audio_config is not None and config.load_towers:
        names += ["speech_embeddings", "audio_encoder"]
    device_map = dict.fromkeys(names, others)
    for index, mlp_type in enumerate(config.mlp_layer_types):
        layer = f"model.layers.{index}"
        parts = ["self_attn", "input_layernorm", "post_attention_layernorm"]
        # CODEPATH: layer 0 of every release is dense, the others are sparse
        parts.append("mlp.gate" if mlp_type == "sparse" else "mlp")
        device_map |= {f"{layer}.{part}": others for part in parts}
        if mlp_type == "sparse":
            device_map[f"{layer}.mlp.experts"] = experts
    return device_map


class ReleasedWeights(Mapping):
    """Parameters that stay in the files: name -> tensor on the CPU, read and converted as loading does, every time.

    Args:
        model: with these parameters on the meta device.
        slices: released name -> lazy tensor, of the whole checkpoint.
        load_config: of Transformers' loader; its `device_map` says which parameters are on disk.

    `bytes_read` counts what was read from the files so far.
    """

    def __init__(self, model: PreTrainedModel, slices: dict[str, Any], load_config: Any):
        self.model, self.slices = model, slices
        self.hf_quantizer = load_config.hf_quantizer
        self.bytes_read = 0
        converters = [entry for entry in load_config.weight_mapping or () if isinstance(entry, WeightConverter)]
        self.converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        # small, and no hook of accelerate's brings them
        buffers = {name for name, _ in model.named_buffers()}
        state = model.state_dict()
        devices = expand_device_map(load_config.device_map, list(state))
        self.parameters = {name: None for name, device in devices.items() if device == "disk" and name not in buffers}
        # CODEPATH: no release ties the head to the embeddings, and the files of a model that does have them once
        self.ties = model.all_tied_weights_keys
        self.sources: dict[str, list[tuple[str, str | None]]] = {}
        wanted = {self.ties.get(name, name) for name in self.parameters}
        for name in sorted(slices, key=dot_natural_key):
            target, pattern = rename_source_key(name, [], converters, model.base_model_prefix, state)
            if target in wanted:
                self.sources.setdefault(target, []).append((name, pattern))

    def __contains__(self, parameter: object) -> bool:
        # the inherited form would read the tensor
        return parameter in self.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, parameter: str) -> torch.Tensor:
        parameter = self.ties.get(parameter, parameter)
        sources, dtype = self.sources[parameter], self.model.get_parameter(parameter).dtype
        (name, pattern), *_ = sources
        # one that is used leaves its tensors behind
        transform = WeightRenaming(name, parameter) if pattern is None else deepcopy(self.converters[pattern])
        for name, pattern in sources:
            as_type = dtype
            if self.hf_quantizer is not None:
                as_type = self.hf_quantizer.get_new_dtype(transform, self.slices[name], dtype)
            transform.add_tensor(parameter, name, pattern or name, partial(self._read_as, name, as_type))
        converted = transform.convert(
            parameter, model=self.model, config=self.model.config, hf_quantizer=self.hf_quantizer
        )[parameter]
        return converted[0] if isinstance(converted, list) else converted

    def released_names(self) -> set[str]:
        """Names in the files of the tensors that no parameter in memory is made of."""
        return {name for parameter in self.parameters for name, _ in self.sources.get(parameter, ())}

    def read(self, name: str) -> torch.Tensor:
        """A released tensor as the files hold it."""
        tensor = self.slices[name][...]
        self.bytes_read += tensor.nbytes
        return tensor

    def _read_as(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        return self.read(name).to(dtype=dtype)

    def read_expert(self, module: str, name: str, expert: int) -> StoredExpert:
        """One expert's share of the parameter `name` of `module`, as the files hold it."""
        (first, _), *_ = self.sources[f"{module}.{name}"]
        experts = first.rpartition(".experts.")[0] + f".experts.{expert}"
        stored = []
        for projection in PROJECTIONS[name]:
            weight = f"{experts}.{projection}.weight"
            scale = _scale_name(weight, self.slices)
            stored.append((self.read(weight), None if scale is None else self.read(scale)))
        return stored


def _scale_name(weight: str, names: Container[str]) -> str | None:
    # CODEPATH: V2.6 has MXFP4 experts and their scales, every other release FP8; converted files may have none
    return next((name for suffix in ("_scale_inv", "_scale") if (name := f"{weight}{suffix}") in names), None)


def stacked_expert(weights: Mapping[str, torch.Tensor], name: str, expert: int) -> StoredExpert:
    """One expert's share of the stacked parameter `name`: FP8 or MXFP4 codes and scales, or floats."""
    groups, scale = len(PROJECTIONS[name]), _scale_name(name, weights)
    scales = [None] * groups if scale is None else weights[scale][expert].chunk(groups)
    return list(zip(weights[name][expert].chunk(groups), scales))


def _to_float(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if scale is None:
        return weight.to(dtype)
    if scale.dtype == torch.uint8:
        return dequantize_mxfp4(weight, scale, dtype)
    return dequantize_blocks(weight, scale, dtype)


def _nbytes(stored: StoredExpert) -> int:
    return sum(tensor.nbytes for pair in stored for tensor in pair if tensor is not None)


class MiMoV2OffloadedExperts(CodedExpertsMixin, MiMoV2Experts):
    """Stacked experts on the meta device; each hit expert is fetched as it is stored, and dequantized where it runs.

    Args:
        experts: the module whose place this one takes.
        fetch: (parameter, expert) -> what is stored of it.
        device: where the experts run.
    """

    def __init__(
        self, config: MiMoV2Config, experts: nn.Module, fetch: Callable[[str, int], StoredExpert], device: Any
    ):
        with torch.device("meta"):
            super().__init__(config)
        # names, shapes and dtypes are those of a model in memory, for whoever counts or saves them
        for name, parameter in experts.named_parameters():
            self.register_parameter(name, parameter)
        self.fetch, self.device = fetch, device
        self.cache: OrderedDict[tuple[str, int], StoredExpert] = OrderedDict()
        self.cache_bytes = 0

    def stored(self, name: str, expert: int) -> StoredExpert:
        """What is stored of a parameter of an expert, on the device where it runs; kept within `cache_bytes`."""
        if (key := (name, expert)) in self.cache:
            self.cache.move_to_end(key)
            return self.cache[key]
        stored = [tuple(t if t is None else t.to(self.device) for t in pair) for pair in self.fetch(name, expert)]
        self.cache[key] = stored
        while self.cache and sum(map(_nbytes, self.cache.values())) > self.cache_bytes:
            self.cache.popitem(last=False)
        return stored

    def expert_weight(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        groups = [_to_float(*pair, dtype) for pair in self.stored(name, expert)]
        return torch.cat(groups) if len(groups) > 1 else groups[0]

    # codes, or too many floats to keep for a backward pass
    project, forward = MiMoV2FP8Experts.project, MiMoV2FP8Experts.forward


class OffloadedExpertsHook(ModelHook):
    """In the place of accelerate's hook, which would fetch all experts; saving finds them by `weights_map`."""

    def __init__(self, weights_map: Mapping[str, torch.Tensor]):
        self.weights_map = weights_map


def load_beside_disk(model, slices, checkpoint_files, load_config, expected_keys=None):
    """`PreTrainedModel._load_pretrained_model` for a `device_map` with "disk": loads what is not there.

    Args:
        slices: released name -> lazy tensor.

    Returns:
        The loader's report, and the parameters on disk.
    """
    quantizer = load_config.hf_quantizer
    if quantizer is not None and quantizer.quantization_config.quant_method != QUANT_METHOD:
        raise ValueError(
            f"`device_map`: expected no module on disk with {type(quantizer).__name__}, which quantizes into memory; "
            "released FP8 and MXFP4 files can stay on disk without it."
        )
    released = ReleasedWeights(model, slices, load_config)
    on_disk = released.released_names()
    in_memory = {name: part for name, part in slices.items() if name not in on_disk}
    device_map = {name: "cpu" if device == "disk" else device for name, device in load_config.device_map.items()}
    memory_config = replace(load_config, device_map=device_map)
    info, _ = PreTrainedModel._load_pretrained_model(model, in_memory, checkpoint_files, memory_config, expected_keys)
    # the loader ties what it misses
    info.missing_keys -= released.keys() - released.ties.keys()
    for name in released:
        parameter = model.get_parameter(name).requires_grad_(False)
        # not for `_init_weights`, which knows no codes
        parameter._is_hf_initialized = True
    model.released_weights = released
    return info, released


def fetch_hit_experts(model: PreTrainedModel) -> None:
    """Makes offloaded experts of a dispatched model fetch only what tokens are routed to.

    `from_pretrained` does it. After accelerate's `cpu_offload` or `dispatch_model` it may be called by hand; it leaves
    weights alone that accelerate wrote to disk, of which only whole tensors can be read.
    """
    released = model.released_weights
    for name, module in list(model.named_modules()):
        hook = vars(module).get("_hf_hook")
        if not isinstance(hook, AlignDevicesHook) or not hook.offload:
            continue
        weights = hook.weights_map
        dataset = weights.dataset
        in_memory = dataset.state_dict if isinstance(dataset, OffloadedWeightsLoader) else dataset
        if released is not None:
            # by its index accelerate reads whole tensors of files, and most parameters here are made of several
            weights.dataset = ChainMap(in_memory, released)
        if type(module).__name__ not in STACKED_EXPERTS:
            continue
        if released is not None and f"{name}.down_proj" in released:
            fetch = partial(released.read_expert, name)
        elif f"{name}.down_proj" in in_memory:
            fetch = partial(stacked_expert, PrefixedDataset(in_memory, f"{name}."))
        else:
            continue
        experts = MiMoV2OffloadedExperts(model.config, module, fetch, hook.execution_device)
        add_hook_to_module(experts.eval(), OffloadedExpertsHook(weights))
        model.set_submodule(name, experts)


class MiMoV2OffloadMixin:
    """What a model class needs for layers that are not in memory."""

    # a ReleasedWeights where `device_map` put something on disk
    released_weights = None

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in Transformers. What `device_map` puts on disk stays in the released files; nothing is written."""
        loaded = super().from_pretrained(*args, **kwargs)
        fetch_hit_experts(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def device(self) -> torch.device:
        """Where inputs belong: the device of the first parameter, or the one that it is brought to when it is used."""
        device = super().device
        if device.type != "meta":
            return device
        hooks = (vars(module).get("_hf_hook") for module in self.modules())
        devices = (hook.execution_device for hook in hooks if isinstance(hook, AlignDevicesHook))
        return next((torch.device(found) for found in devices if found is not None), device)

    def train(self, mode: bool = True):
        """As in PyTorch. ValueError: training mode for a model with layers on disk, which get no gradients."""
        if mode and self.released_weights is not None:
            raise ValueError(
                f"`train`: expected all weights in memory, got {len(self.released_weights)} parameters on disk, which "
                "get no gradients: load without 'disk' in `device_map` (FSDP or a GPU map for more memory)."
            )
        return super().train(mode)

    def set_expert_cache(self, size: int | str) -> None:
        """Keeps offloaded experts that were used last where they run, for the next tokens.

        Args:
            size: bytes, or text as accelerate takes it ("20GB"), shared evenly by the layers with offloaded experts.

        Raises:
            ValueError: no layer has offloaded experts.
        """
        layers = [module for module in self.modules() if isinstance(module, MiMoV2OffloadedExperts)]
        if not layers:
            raise ValueError("`set_expert_cache`: expected a model with offloaded experts, got none.")
        for layer in layers:
            layer.cache.clear()
            layer.cache_bytes = convert_file_size_to_int(size) // len(layers)


__all__ = ["MiMoV2OffloadMixin", "MiMoV2OffloadedExperts", "ReleasedWeights", "expert_device_map", "fetch_hit_experts"]
