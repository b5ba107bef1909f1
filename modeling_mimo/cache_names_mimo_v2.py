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
"""The cache's two names: `cache` since Transformers 5.24, `past_key_values` before. Either is taken on both lines."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import ModelOutput


CACHE_NAMES = ("cache", "past_key_values")
# what the installed Transformers calls it in arguments of `generate` and in outputs
CACHE_NAME = next(name for name in CACHE_NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)


def rename_cache(arguments: dict[str, Any], name: str = CACHE_NAME) -> dict[str, Any]:
    """`arguments` with the cache under `name`, whichever of the two it came under.

    ValueError: it came under both.
    """
    other = CACHE_NAMES[1 - CACHE_NAMES.index(name)]
    if other not in arguments:
        return arguments
    renamed = {key: value for key, value in arguments.items() if key != other}
    if arguments[other] is not None:
        if renamed.get(name) is not None:
            raise ValueError("`cache`: expected it once, got `past_key_values` beside it.")
        renamed[name] = arguments[other]
    return renamed


def takes_cache(function: Callable) -> Callable:
    """Lets a function with the argument `cache` take it as `past_key_values` as well."""

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        return function(*args, **rename_cache(kwargs, "cache"))

    return renamed


def has_both_names(output_class: type[ModelOutput]) -> type[ModelOutput]:
    """Lets an output class of Transformers 5.23 be read by the name `cache` as well; later ones know both."""
    if CACHE_NAME == "cache":
        return output_class

    def known(key):
        return CACHE_NAME if key == "cache" else key

    output_class.cache = property(lambda output: output.past_key_values)
    output_class.__getitem__ = lambda output, key: super(output_class, output).__getitem__(known(key))
    output_class.__contains__ = lambda output, key: super(output_class, output).__contains__(known(key))
    output_class.get = lambda output, key, default=None: super(output_class, output).get(known(key), default)
    return output_class


@has_both_names
@dataclass
class MiMoV2GenerateOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns on request, without beams."""


@has_both_names
@dataclass
class MiMoV2GenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """What `generate` returns on request, with beams."""


def with_both_names(output: Any) -> Any:
    """What `generate` returned, an output in a class that answers to both names."""
    classes = {
        GenerateDecoderOnlyOutput: MiMoV2GenerateOutput,
        GenerateBeamDecoderOnlyOutput: MiMoV2GenerateBeamOutput,
    }
    output_class = None if CACHE_NAME == "cache" else classes.get(type(output))
    return output if output_class is None else output_class(**output)


__all__ = ["CACHE_NAME"]
