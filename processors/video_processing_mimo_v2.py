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
"""Videos to patches: which frames are taken, how large they may be, and when they are shown."""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import auto_docstring
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoInput, VideoMetadata

from .audio_files_mimo_v2 import Audio
from .image_processing_mimo_v2 import (
    SERVICE_KEYS,
    ReleasedSettings,
    allocate_patches,
    grid_of,
    write_patches,
)
from .media_loading_mimo_v2 import TIMEOUT, flatten_videos
from .video_files_mimo_v2 import Video, open_video


# frames are taken in pairs
FRAME_FACTOR = 2
# what SGLang takes where the released `min_frames` is null
MIN_FRAMES = 8
# seconds; a frame this close to `start` or `end` is inside
TOLERANCE = 1e-6


class Soundtrack(NamedTuple):
    """The sound of a video, on the clock of its frames, and the second until when the last taken frame is shown."""

    audio: Audio
    end: float


def sample_indices(total: int, rate: float, settings: dict[str, Any]) -> np.ndarray:
    """Which of `total` frames are taken: evenly spread from the first to the last.

    As many as `num_frames`, or `fps` per second but at least `min_frames` and at most `max_frames`; never more than
    there are, and an even number unless there is only one.

    Args:
        rate: frames per second.
        settings: of the processor and the call.
    """
    if settings["num_frames"] is not None:
        wanted = settings["num_frames"]
    else:
        wanted = total / rate * settings["fps"]
        wanted = min(max(wanted, settings["min_frames"] or MIN_FRAMES), settings["max_frames"])
    even = int(min(wanted, total)) // FRAME_FACTOR * FRAME_FACTOR
    return np.unique(np.linspace(0, total - 1, max(even, min(total, FRAME_FACTOR)), dtype=np.int64))


def padded(indices: np.ndarray, multiple: int) -> np.ndarray:
    """`indices` with the last one repeated up to a multiple of `multiple`."""
    return np.pad(indices, (0, -len(indices) % multiple), mode="edge")


def window(video: Video, start: float | None, end: float | None, name: str) -> tuple[int, int]:
    """First index and one past the last of the frames from `start` to `end`, at least the one shown at `start`.

    ValueError: no numbers, times that the video does not have, or `start` not before `end`.
    """
    first, last = 0.0 if start is None else start, video.duration if end is None else end
    if not all(isinstance(time, numbers.Real) for time in (first, last)):
        raise ValueError(f"{name}: expected start and end in seconds, got {start!r} and {end!r}")
    if not 0 <= first < last:
        raise ValueError(f"{name}: expected 0 <= start < end, got {first:g} and {last:g} s")
    # users give whole seconds, which videos rarely last
    if first >= video.duration or last > math.ceil(video.duration - TOLERANCE):
        raise ValueError(f"{name}: expected start and end within {video.duration:g} s, got {first:g} and {last:g} s")
    begin = int(np.searchsorted(video.times, first - TOLERANCE))
    stop = int(np.searchsorted(video.times, last + TOLERANCE))
    return (begin, stop) if begin < stop else (max(0, begin - 1), max(1, begin))


class MiMoV2VideoProcessorKwargs(TypedDict, total=False):
    """fps or num_frames: frames per second or per video. min_frames, max_frames: bounds of what `fps` gives.
    min_pixels, max_pixels: bounds of height x width of a frame after resizing; total_max_pixels: half of what all
    frames of a video may have. image_mean, image_std: per channel, of 0 to 1. patch_size, temporal_patch_size,
    merge_size: pixels and frames of a patch, patches per side of a merge unit. start, end: seconds of each video.
    """

    fps: float | None
    num_frames: int | None
    min_frames: int | None
    max_frames: int | None
    min_pixels: int | None
    max_pixels: int | None
    total_max_pixels: int | None
    patch_size: int | None
    temporal_patch_size: int | None
    merge_size: int | None
    image_mean: list[float] | None
    image_std: list[float] | None


@auto_docstring(
    custom_intro="""
    Videos to `pixel_values_videos`, `video_grid_thw` and the seconds of each pair of frames.

    `from_pretrained` of a release takes the settings from `processor_config` in its config.json.
    """
)
class MiMoV2VideoProcessor(ReleasedSettings, VideoProcessorMixin):
    valid_kwargs = MiMoV2VideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]
    call_arguments = ("videos", "start", "end", "return_tensors", "timeout", "return_soundtracks")

    released_names = {
        "fps": "fps",
        "num_frames": "num_frames",
        "min_frames": "min_frames",
        "max_frames": "max_frames",
        "min_pixels": "video_min_pixels",
        "max_pixels": "video_max_pixels",
        "total_max_pixels": "video_total_max_pixels",
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "merge_size",
    }

    def __init__(
        self,
        fps: float = 1.0,
        num_frames: int | None = None,
        min_frames: int | None = None,
        max_frames: int = 3600,
        min_pixels: int = 8192,
        max_pixels: int = 8388608,
        total_max_pixels: int = 268435456,
        patch_size: int = 16,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        **kwargs,
    ):
        r"""
        fps (`float`, *optional*, defaults to 1.0):
            Frames per second that are taken.
        num_frames (`int`, *optional*):
            Frames per video instead of per second; an odd number is rounded down.
        min_frames (`int`, *optional*):
            Least number of frames that `fps` may lead to. None, as released, is 8, as SGLang serves it.
        max_frames (`int`, *optional*, defaults to 3600):
            Largest number of frames that `fps` may lead to.
        min_pixels (`int`, *optional*, defaults to 8192):
            Least height x width of a frame after resizing.
        max_pixels (`int`, *optional*, defaults to 8388608):
            Largest height x width of a frame after resizing.
        total_max_pixels (`int`, *optional*, defaults to 268435456):
            Largest frames x height x width of a video after resizing, two frames counting as one.
        patch_size (`int`, *optional*, defaults to 16):
            Pixels per side of a patch.
        temporal_patch_size (`int`, *optional*, defaults to 2):
            Frames of a patch.
        merge_size (`int`, *optional*, defaults to 2):
            Patches per side of what becomes one token.
        """
        super().__init__()
        self.fps, self.num_frames, self.min_frames, self.max_frames = fps, num_frames, min_frames, max_frames
        self.min_pixels, self.max_pixels, self.total_max_pixels = min_pixels, max_pixels, total_max_pixels
        self.patch_size, self.temporal_patch_size, self.merge_size = patch_size, temporal_patch_size, merge_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.settings(**{name: value for name, value in kwargs.items() if name not in SERVICE_KEYS})

    @classmethod
    def get_video_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """What `save_pretrained` wrote, else the settings of a release."""
        return cls.saved_or_released(super().get_video_processor_dict, pretrained_model_name_or_path, kwargs)

    def settings(self, **changes) -> dict[str, Any]:
        """As of images; `fps` takes the place of the processor's `num_frames`."""
        values = super().settings(**changes)
        if changes.get("fps") is not None:
            if changes.get("num_frames") is not None:
                raise ValueError(
                    f"fps, num_frames: expected one of them, got {changes['fps']} and {changes['num_frames']}"
                )
            values["num_frames"] = None
        return values

    @auto_docstring
    def preprocess(
        self,
        videos: VideoInput,
        start: float | None = None,
        end: float | None = None,
        return_tensors: str | None = None,
        timeout: float = TIMEOUT,
        return_soundtracks: bool = False,
        **kwargs,
    ) -> BatchFeature:
        r"""
        videos (`VideoInput`):
            One video or a (nested) list: paths, URLs, bytes, base64 texts, file objects, lists of frames, arrays
            [T, H, W, C] or [T, C, H, W], and tuples `(frames, timestamps)` with seconds.

            Frames that come in a list or an array are taken as they are, the last one twice if their number is odd,
            and without timestamps to be `fps` per second. `num_frames` in the call, or `fps` where they have
            timestamps, samples them like a file.
        start (`float`, *optional*):
            Seconds from the first frame, or on the clock of timestamps, before which no frame is taken.
        end (`float`, *optional*):
            Seconds, likewise, after which no frame is taken.
        return_tensors (`str`, *optional*):
            `"pt"` as well as None: tensors of PyTorch; `"np"`: arrays.
        timeout (`float`, *optional*, defaults to 60.0):
            Seconds without an answer after which a server counts as unreachable.
        return_soundtracks (`bool`, *optional*, defaults to `False`):
            Whether to open the sound as well.
        kwargs (`dict`, *optional*):
            Settings of this call by the names of MiMoV2VideoProcessorKwargs.

        Returns:
            `BatchFeature`: `pixel_values_videos` [patches, 3 * temporal_patch_size * patch_size**2] float32;
            `video_grid_thw` [videos, 3], patches in time, height and width; `video_timestamps`, per video a list with
            the seconds of the first frame of each patch in time; `video_metadata`, a VideoMetadata per video; with
            `return_soundtracks` also `video_soundtracks`, per video a Soundtrack or None.

        Raises:
            ValueError, OSError: A video that cannot be used, by its index among all videos of the call.
        """
        settings = self.settings(**kwargs)
        videos = flatten_videos(videos)
        if not videos:
            raise ValueError("videos: expected at least one video, got none")
        # all are opened before one is decoded: errors come early, and the memory for all patches is taken once
        opened, chosen, grids = [], [], []
        for index, item in enumerate(videos):
            name = f"videos[{index}]"
            video = open_video(item, name, settings["fps"], timeout)
            indices = self._choose(video, start, end, settings, kwargs, name)
            frame = {**settings, "max_pixels": self._max_pixels(len(indices), settings)}
            grids.append([len(indices) // settings["temporal_patch_size"], *grid_of(video.size, frame, name)])
            opened.append(video)
            chosen.append(indices)
        flat, views = allocate_patches(grids, settings)
        for video, indices, view in zip(opened, chosen, views):
            write_video(video, indices, view, settings)
        data = BatchFeature({"pixel_values_videos": flat, "video_grid_thw": torch.tensor(grids)}, return_tensors)
        step = settings["temporal_patch_size"]
        data["video_timestamps"] = [video.times[taken[::step]].tolist() for video, taken in zip(opened, chosen)]
        data["video_metadata"] = [metadata_of(video, taken) for video, taken in zip(opened, chosen)]
        if return_soundtracks:
            data["video_soundtracks"] = [soundtrack_of(video, taken, end) for video, taken in zip(opened, chosen)]
        return data

    def _choose(self, video: Video, start, end, settings: dict, changes: dict, name: str) -> np.ndarray:
        """Indices of the frames that are taken, padded to whole patches in time."""
        begin, stop = window(video, start, end, name)
        total = stop - begin
        asked = ("num_frames",) if video.rate is not None else ("num_frames", "fps")
        if video.chosen and all(changes.get(key) is None for key in asked):
            indices = np.arange(total)
            if total > settings["max_frames"]:
                indices = sample_indices(total, video.fps, {"num_frames": settings["max_frames"]})
        else:
            indices = sample_indices(total, video.fps, settings)
        return padded(indices + begin, settings["temporal_patch_size"])

    @staticmethod
    def _max_pixels(frames: int, settings: dict[str, Any]) -> int:
        """Pixels that a frame may have for the video to stay within its budget, two frames being one patch."""
        budget = settings["total_max_pixels"] * FRAME_FACTOR // frames
        return max(settings["min_pixels"], min(budget, settings["max_pixels"]))


def write_video(video: Video, indices: np.ndarray, out: torch.Tensor, settings: dict[str, Any]) -> None:
    """Decodes the frames `indices` (rising, the last ones may be equal) one by one into `out`; see `write_patches`."""
    distinct = np.unique(indices)
    step = settings["temporal_patch_size"]
    for place, frame in enumerate(video.read(distinct.tolist())):
        # the last frame fills the rest
        until = place + 1 if place + 1 < len(distinct) else len(indices)
        for at in range(place, until):
            write_patches(frame, out[at // step, ..., at % step : at % step + 1, :, :], settings)


def soundtrack_of(video: Video, indices: np.ndarray, end: float | None) -> Soundtrack | None:
    """The sound of `video`: until `end`, or else for as long as the first of the taken frames is shown."""
    if (audio := video.soundtrack()) is None:
        return None
    if end is None:
        times = video.times[np.unique(indices)]
        # a single frame counts as a second, as in SGLang
        end = times[-1] + (times[1] - times[0] if len(times) > 1 else 1.0)
    return Soundtrack(audio, float(end))


def metadata_of(video: Video, indices: np.ndarray) -> VideoMetadata:
    height, width = video.size
    return VideoMetadata(
        total_num_frames=len(video.times),
        fps=video.fps,
        width=width,
        height=height,
        duration=video.duration,
        video_backend=video.backend,
        frames_indices=indices.tolist(),
    )


__all__ = ["MiMoV2VideoProcessor"]
