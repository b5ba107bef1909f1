# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Adapters through Transformers' own methods: what those leave to a log line is an error here.

PEFT is imported by whoever calls one of them.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION, PeftAdapterMixin, maybe_load_adapters
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel
from transformers.utils import check_peft_version, is_peft_available, logging
from transformers.utils.hub import DownloadKwargs

from .checkpoint_mimo_v2 import Checkpoint, CheckpointError, problem_lines


logger = logging.get_logger(__name__)

# what PEFT puts before every name in an adapter's file
PEFT_PREFIX = "base_model.model."

# PEFT puts a new adapter where the weight is: on disk both are names without values, and logits are wrong
ON_DISK = "`device_map`: expected the weights of a new adapter's layers in memory, got some on disk."
UNFIT = "the adapter does not fit the model"

# projections that most models have and the fused layers of this one have not, but its audio encoder has
SPLIT_PROJECTIONS = {"q_proj", "k_proj", "v_proj"}


# method of Transformers -> what does the same with PEFT alone, for a Transformers that wants a newer PEFT
OF_PEFT_MODEL = "`{}` of the PeftModel that modeling_mimo.training.load_adapter(base, folder) returns"
WITHOUT_TRANSFORMERS = {
    "add_adapter": "peft.get_peft_model(model, config)",
    "set_adapter": OF_PEFT_MODEL.format("set_adapter"),
    "disable_adapters": OF_PEFT_MODEL.format("disable_adapter"),
    "enable_adapters": OF_PEFT_MODEL.format("base_model.enable_adapter_layers"),
    "active_adapters": OF_PEFT_MODEL.format("active_adapters"),
    "get_adapter_state_dict": "peft.get_peft_model_state_dict(model)",
    "delete_adapter": OF_PEFT_MODEL.format("delete_adapter"),
    "save_pretrained": OF_PEFT_MODEL.format("save_pretrained"),
}


def check_peft_suits(name: str) -> None:
    """Raises a one-line `ValueError` for a method that Transformers refuses to run with the installed PEFT."""
    if not is_peft_available():
        # Transformers says so in one line
        return
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        raise ValueError(
            f"`{name}`: expected peft >= {MIN_PEFT_VERSION}, which Transformers {transformers.__version__} asks for, "
            f"got {_peft().__version__}; what works is {WITHOUT_TRANSFORMERS[name]}."
        ) from None


def _checked(method: Callable) -> Callable:
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        check_peft_suits(method.__name__)
        return method(self, *args, **kwargs)

    return checked


def _peft(module: str = "peft") -> Any:
    # not by a statement: Transformers would ask for PEFT wherever a copy of this file on the Hub is loaded
    return importlib.import_module(module)


def base_of_adapter(name_or_path: str | os.PathLike, kwargs: Mapping[str, Any]) -> str | os.PathLike:
    """The checkpoint that an adapter's folder or repository names as its base; any other name as it is.

    Args:
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: an adapter that names none.
    """
    place = {name: kwargs[name] for name in DownloadKwargs.__annotations__ if name in kwargs}
    _, base, _ = maybe_load_adapters(name_or_path, place, **(kwargs.get("adapter_kwargs") or {}))
    if name_or_path is not None and not base:
        raise ValueError(
            f"{name_or_path}: expected `base_model_name_or_path` in an adapter's folder, got {base!r}; load the "
            "checkpoint, and the adapter with its `load_adapter`."
        )
    return base


class MiMoV2AdaptersMixin:
    """Transformers' methods for adapters, with the adapter layers of this package."""

    set_adapter = _checked(PeftAdapterMixin.set_adapter)
    disable_adapters = _checked(PeftAdapterMixin.disable_adapters)
    enable_adapters = _checked(PeftAdapterMixin.enable_adapters)
    active_adapters = _checked(PeftAdapterMixin.active_adapters)
    get_adapter_state_dict = _checked(PeftAdapterMixin.get_adapter_state_dict)
    delete_adapter = _checked(PeftAdapterMixin.delete_adapter)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # PEFT sets it behind every injection, its own `get_peft_model` included
        if name == "peft_config":
            warn_of_lost_targets(self, value)

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """As in Transformers, for any storage of the weights; the adapter is float32, as PEFT's own models make it.

        Raises:
            ValueError: Transformers wants a newer PEFT; prompt learning; targets on disk; as in Transformers.
        """
        check_peft_suits("add_adapter")
        adapter_name = adapter_name or "default"
        super().add_adapter(_own_config(adapter_config), adapter_name)
        if is_on_disk(self, [name for name, parameter in self.named_parameters() if parameter.requires_grad]):
            _remove_adapter(self, adapter_name)
            raise ValueError(ON_DISK)
        _cast_to_float32(self, adapter_name)

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ):
        """As in Transformers, for any storage of the weights; every tensor of the file is loaded, in float32.

        Args:
            peft_model_id: folder or repository of the adapter.
            kwargs: as in Transformers: `is_trainable`, `adapter_kwargs`, `local_files_only`, ...

        Raises:
            ValueError: one error that lists all tensors that are missing, unknown or of another shape; prompt
                learning; hot-swapping.
        """
        if kwargs.pop("hotswap", "auto") is True:
            raise ValueError("`hotswap`: expected False, got True: it would keep the scaling of the first adapter.")
        load_config = kwargs.pop("load_config", None) or LoadStateDictConfig()
        place = {**load_config.download_kwargs, **(kwargs.pop("adapter_kwargs", None) or {})}
        if kwargs.pop("local_files_only", False):
            place["local_files_only"] = True
        if peft_config is None and peft_model_id is not None:
            peft_config = _peft().PeftConfig.from_pretrained(peft_model_id, **place)
        try:
            return super().load_adapter(
                peft_model_id,
                adapter_name,
                peft_config=_own_config(peft_config),
                adapter_state_dict=adapter_state_dict,
                hotswap=False,
                load_config=replace(load_config, download_kwargs=place),
                **kwargs,
            )
        except CheckpointError:
            # the layers without their weights would be taken for an adapter
            _remove_adapter(self, adapter_name or "default")
            raise


def load_adapter_tensors(
    model: nn.Module, state_dict: dict | None, files: list[str], load_config: LoadStateDictConfig, expected_keys
) -> tuple[Any, Any]:
    """The part of `load_adapter` that reads the files, after the adapter's layers were put into `model`.

    Raises:
        CheckpointError: as `check_adapter_tensors`.
    """
    # behind those that were there before
    adapter_name = list(model.peft_config)[-1]
    tensors = Checkpoint.from_files(files).tensors if state_dict is None else state_dict
    check_adapter_tensors(model, adapter_name, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _cast_to_float32(model, adapter_name)
    # an adapter beside weights on disk is in memory
    devices = {name: "cpu" if device == "disk" else device for name, device in load_config.device_map.items()}
    load_config = replace(load_config, device_map=devices)
    info, index = PreTrainedModel._load_pretrained_model(model, state_dict, files, load_config, expected_keys)
    if info.unexpected_keys:
        raise CheckpointError([UNFIT, *problem_lines([], sorted(info.unexpected_keys), [])])
    # every tensor of the adapter was read and found its place: these are the base's and those of other adapters
    info.missing_keys = set()
    return info, index


def check_adapter_tensors(model: nn.Module, adapter_name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares an adapter's tensors with those that `model`, which has its layers, would save of it.

    Args:
        model: a model of this package or a `PeftModel` of one.
        shapes: of the tensors in the file, by the names there.

    Raises:
        CheckpointError: one error that lists everything missing, unknown or mis-shaped.
    """
    get_peft_model_state_dict = _peft().get_peft_model_state_dict

    def saved(embeddings: bool) -> dict[str, torch.Tensor]:
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=embeddings)
        return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state.items()}

    given = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes.items()}
    # a file has the embeddings beside the adapter if they were resized or adapted
    needed, known = saved(embeddings=False), saved(embeddings=True)
    mis_shaped = [
        f"{name} ({list(known[name].shape)}, {list(shape)})"
        for name, shape in given.items()
        if name in known and tuple(known[name].shape) != tuple(shape)
    ]
    missing = [name for name in needed if name not in given]
    if problems := problem_lines(missing, [name for name in given if name not in known], mis_shaped):
        raise CheckpointError([UNFIT, *problems])


def warn_of_lost_targets(model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Logs a warning if `target_modules` names split projections, and the fused ones of the layers have no adapter.

    What most tutorials write, `["q_proj", "v_proj"]`, is in the audio encoder alone.
    """
    fused = [module for name, module in model.named_modules() if name.endswith("self_attn.qkv_proj")]
    if not fused or any(hasattr(module, "base_layer") for module in fused):
        return
    for config in configs.values():
        targets = vars(config).get("target_modules")
        lost = sorted(SPLIT_PROJECTIONS.intersection(targets)) if isinstance(targets, (list, set)) else []
        if lost:
            logger.warning(
                f"`target_modules`: expected qkv_proj for the language model's attention, got {', '.join(lost)}, "
                "which only an audio encoder has; modeling_mimo.training.lora_config(model) names the right ones."
            )


def is_on_disk(model: nn.Module, parameters: Iterable[str]) -> bool:
    """Whether any of the named parameters is of a module that a device map put on disk."""
    devices = vars(model).get("hf_device_map") or {}
    return "disk" in devices.values() and any(model.get_parameter(name).is_meta for name in parameters)


def _own_config(config: Any) -> Any:
    """`config`, by which PEFT takes the adapter layers of this package."""
    if not is_peft_available() or not isinstance(config, _peft().PeftConfig):
        return config
    if config.is_prompt_learning:
        raise ValueError(
            f"`peft_type`: expected adapters of layers, got {config.peft_type.value}; what works is "
            "peft.get_peft_model(model, config) and modeling_mimo.training.load_adapter(model, folder)."
        )
    from .lora_layers_mimo_v2 import with_own_layers

    return with_own_layers(config)


def _cast_to_float32(model: nn.Module, adapter_name: str) -> None:
    # as PEFT's own models: Transformers would round the adapter to the dtype of the base
    _peft("peft.functional").cast_adapter_dtype(model, adapter_name)


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """What `delete_adapter` does, for any PEFT."""
    prefix = _peft("peft.mapping").PEFT_TYPE_TO_PREFIX_MAPPING[model.peft_config[adapter_name].peft_type]
    _peft("peft.functional").delete_adapter(model, adapter_name, prefix)
    del model.peft_config[adapter_name]
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False


__all__ = [
    "ON_DISK",
    "MiMoV2AdaptersMixin",
    "base_of_adapter",
    "check_adapter_tensors",
    "check_peft_suits",
    "is_on_disk",
    "load_adapter_tensors",
]
