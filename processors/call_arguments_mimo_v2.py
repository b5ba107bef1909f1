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

from typing import Any, TypedDict

import torch
from transformers.processing_utils import ProcessingKwargs, TextKwargs

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


# argument of a call that sorts others -> their names; `timeout` is for what is downloaded
_KWARGS = {
    "text_kwargs": set(TextKwargs.__annotations__),
    "images_kwargs": {"timeout", *MiMoV2ImageProcessorKwargs.__annotations__},
    "videos_kwargs": {"timeout", *MiMoV2VideoProcessorKwargs.__annotations__},
    "audio_kwargs": {"timeout", *MiMoV2AudioKwargs.__annotations__},
}


def sorted_kwargs(kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments by what takes them. Transformers' `_merge_kwargs` drops unknown names with a warning only."""
    by_taker = {taker: dict(kwargs.get(taker) or {}) for taker in _KWARGS}
    for name, value in kwargs.items():
        takers = [taker for taker, names in _KWARGS.items() if name in names]
        if not takers and name not in _KWARGS:
            raise ValueError(
                f"{name}: expected an argument of the chat template or the processor, got an unknown name"
            )
        for taker in takers:
            if name in by_taker[taker]:
                raise ValueError(f"{name}: expected it once, got it in {taker} and beside it")
            by_taker[taker][name] = value
    return by_taker


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
            parts.append(processor([item], **{**shared, **options}, return_tensors="pt"))
        except (ValueError, OSError) as error:
            # the processor counts within its call
            raise type(error)(str(error).replace("s[0]:", f"s[{index}]:", 1)) from error
    return {
        key: torch.cat([part[key] for part in parts])
        if isinstance(value, torch.Tensor)
        else [item for part in parts for item in part[key]]
        for key, value in parts[0].items()
    }
