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
"""Arguments of a call of the processor: which part takes which, and media that bring settings of their own."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import torch
from transformers.processing_utils import ProcessingKwargs, TextKwargs

from modeling_mimo.unknown_names_mimo_v2 import unknown_name

from .chat_mimo_v2 import Media
from .image_processing_mimo_v2 import MiMoV2ImageProcessorKwargs
from .video_processing_mimo_v2 import MiMoV2VideoProcessorKwargs


class MiMoV2AudioKwargs(TypedDict, total=False):
    """sampling_rate: samples per second of arrays that come without their own."""

    sampling_rate: int | None


class MiMoV2ProcessorKwargs(ProcessingKwargs, total=False):
    text_kwargs: TextKwargs
    images_kwargs: MiMoV2ImageProcessorKwargs
    videos_kwargs: MiMoV2VideoProcessorKwargs
    audio_kwargs: MiMoV2AudioKwargs


# height x width after resizing that OpenAI's "detail": "low" stands for
LOW_DETAIL_PIXELS = 512 * 512

# argument of a call that sorts others -> their names; `timeout` is for what is downloaded
_KWARGS = {
    "text_kwargs": set(TextKwargs.__annotations__),
    "images_kwargs": {"timeout", *MiMoV2ImageProcessorKwargs.__annotations__},
    "videos_kwargs": {"timeout", *MiMoV2VideoProcessorKwargs.__annotations__},
    "audio_kwargs": {"timeout", *MiMoV2AudioKwargs.__annotations__},
}


def names_of(function: Callable) -> set[str]:
    """Names of the arguments that a method takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in kinds}


def sorted_kwargs(kwargs: dict[str, Any], others: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Arguments by what takes them. Transformers' `_merge_kwargs` drops unknown names with a warning only.

    others: names of further arguments of the call, one of which an unknown name may be meant to be.
    """
    by_taker = {}
    for taker, names in _KWARGS.items():
        nested = kwargs.get(taker)
        if not isinstance(nested, (Mapping, type(None))):
            raise ValueError(f"{taker}: expected a mapping of arguments, got {type(nested).__name__}")
        by_taker[taker] = dict(nested or {})
        for name in by_taker[taker]:
            if name not in names:
                raise ValueError(f"{taker}: {unknown_name(name, names, 'one of its arguments')}")
    for name, value in kwargs.items():
        takers = [taker for taker, names in _KWARGS.items() if name in names]
        if not takers and name not in _KWARGS:
            known = {*others, *_KWARGS, *(known for names in _KWARGS.values() for known in names)}
            raise ValueError(unknown_name(name, known, "an argument of the chat template or the processor"))
        for taker in takers:
            if name in by_taker[taker]:
                raise ValueError(f"{name}: expected it once, got it in {taker} and beside it")
            by_taker[taker][name] = value
    return by_taker


def own_settings(processor, settings: dict, options: dict) -> dict[str, Any]:
    """Settings of one medium: those of the call, changed by its own, OpenAI's `detail` of an image among them."""
    merged = {**settings, **options}
    if merged.pop("detail", None) == "low" and options.get("max_pixels") is None:
        merged["max_pixels"] = min(LOW_DETAIL_PIXELS, settings.get("max_pixels") or processor.max_pixels)
    return merged


def processed(processor, media: Media, settings: dict) -> dict[str, Any]:
    """Media processed in one call, or one by one where some bring settings of their own."""
    if not media.items:
        return {}
    if not any(media.options):
        return dict(processor(media.items, **settings, return_tensors="pt"))
    parts = []
    for index, (item, options) in enumerate(zip(media.items, media.options)):
        # one way of sampling stands in for the other
        sampling = {"fps", "num_frames"} if options.keys() & {"fps", "num_frames"} else set()
        shared = {name: value for name, value in settings.items() if name not in sampling}
        try:
            parts.append(processor([item], **own_settings(processor, shared, options), return_tensors="pt"))
        except (ValueError, OSError) as error:
            # the processor counts within its call
            raise type(error)(str(error).replace("s[0]:", f"s[{index}]:", 1)) from error
    return {
        key: torch.cat([part[key] for part in parts])
        if isinstance(value, torch.Tensor)
        else [item for part in parts for item in part[key]]
        for key, value in parts[0].items()
    }
