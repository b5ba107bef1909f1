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
"""`AutoProcessor` and `pipeline` for MiMo-V2. What they make is imported when it is first asked for."""

import importlib
import json
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file

from .configuration_mimo_v2 import FLASH_MODEL_TYPE, MiMoV2Config


PROCESSOR_CLASS = "MiMoV2Processor"
_MODEL_TYPES = (MiMoV2Config.model_type, FLASH_MODEL_TYPE)
_HUB_KWARGS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def route_auto_processor() -> None:
    """Lets `AutoProcessor.from_pretrained` find MiMoV2Processor; a second call changes nothing.

    `AutoProcessor.register` is not enough: the released preprocessor_config.json names Qwen2_5_VLProcessor, and
    Transformers follows such a name before what is registered for the config.
    """
    original = AutoProcessor.from_pretrained
    if original.__module__ == __name__:
        return

    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        own = _own_class(pretrained_model_name_or_path, kwargs)
        load = original if own is None else own.from_pretrained
        return load(pretrained_model_name_or_path, **kwargs)

    from_pretrained.__doc__ = original.__doc__
    AutoProcessor.from_pretrained = classmethod(from_pretrained)


def route_any_to_any() -> None:
    """Lets `pipeline("any-to-any")` find MiMoV2AnyToAnyPipeline, which leaves models of other families alone.

    Not by `register_pipeline`, which warns, wants the class itself and would forget the default model of the task.
    """
    task = PIPELINE_REGISTRY.supported_tasks["any-to-any"]
    task["impl"] = f"{__package__}.pipelines_mimo_v2.MiMoV2AnyToAnyPipeline"


def _own_class(name_or_path: Any, kwargs: dict[str, Any]) -> type | None:
    """MiMoV2Processor, AutoTokenizer for a MiMo-V2 checkpoint of text alone, or None for everything else."""
    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        config = {"model_type": config.model_type, "processor_config": vars(config).get("processor_config")}
    else:
        config = _read_json(name_or_path, CONFIG_NAME, kwargs)
    if config.get("model_type") not in (*_MODEL_TYPES, None):
        return None
    saved = _read_json(name_or_path, PROCESSOR_NAME, kwargs).get("processor_class")
    if saved is None and config.get("model_type") is not None:
        saved = PROCESSOR_CLASS if config.get("processor_config") else "AutoTokenizer"
    if saved == PROCESSOR_CLASS:
        return importlib.import_module(".processors", __package__).MiMoV2Processor
    return AutoTokenizer if saved == "AutoTokenizer" else None


def _read_json(name_or_path: Any, filename: str, kwargs: dict[str, Any]) -> dict:
    """A file of a folder or a repository; empty if it cannot be read, which Transformers then reports itself."""
    hub_kwargs = {name: kwargs[name] for name in _HUB_KWARGS if name in kwargs}
    try:
        path = cached_file(
            name_or_path,
            filename,
            **hub_kwargs,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return {}
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}
