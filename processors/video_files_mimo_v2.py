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
"""Videos from wherever users keep them -> the time of every frame, and the wanted frames one by one."""

import io
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from .audio_files_mimo_v2 import Audio, open_soundtrack
from .media_loading_mimo_v2 import (
    ARRAYS,
    TIMEOUT,
    is_pair,
    load_image,
    open_source,
    pil_to_rgb,
)
from .media_opening_mimo_v2 import open_container, open_picture, whole_picture


# animations that Pillow composes as viewers do; FFmpeg reads WebP as a still image only
ANIMATED_FORMATS = ("GIF", "WEBP", "PNG")
# formats (MP4 and MOV, Matroska and WebM) with an index, where a seek lands on the frame that was asked for
SEEKABLE_FORMATS = ("mov", "matroska")
# a seek empties the decoder's threads, which is dearer than decoding this many frames
SEEK_DISTANCE = 48


class Video:
    """A video whose frames are not decoded yet.

    Attributes:
        times: seconds of each frame from the first one, rising.
        rate: frames per second, where the rate is constant; then times[i] is i / rate. Else None.
        size: height and width of the first frame as displayed.
        chosen: whether the user picked these frames, so that they are not sampled again.
        backend: what decodes.
    """

    backend: str
    chosen = False

    def __init__(self, times: Sequence[float], rate: float | None, size: Sequence[int]):
        self.times, self.rate, self.size = np.asarray(times, dtype=np.float64), rate, tuple(size)

    @property
    def fps(self) -> float:
        """Frames per second, on average where the rate is not constant."""
        if self.rate is not None or len(self.times) < 2:
            return self.rate or 1.0
        return (len(self.times) - 1) / float(self.times[-1] - self.times[0])

    @property
    def duration(self) -> float:
        """Seconds to the end of the last frame, which is taken to last as long as the average."""
        return float(self.times[-1]) + 1 / self.fps

    def soundtrack(self) -> Audio | None:
        """The sound, time 0 being the first frame; None where there is none."""
        return None

    def read(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """[3, H, W] of 0 to 255 for each of the rising `indices`. ValueError: a frame that cannot be decoded."""
        raise NotImplementedError


class FrameList(Video):
    """Frames in memory: a list of pictures, or an array [T, H, W, C] or [T, C, H, W]."""

    backend = "frames"
    chosen = True

    def __init__(self, frames: Any, times: Any, rate: float, name: str, timeout: float):
        if isinstance(frames, ARRAYS) and frames.ndim != 4:
            raise ValueError(f"{name}: expected frames [T, H, W, C] or [T, C, H, W], got {list(frames.shape)}")
        if len(frames) == 0:
            raise ValueError(f"{name}: expected at least one frame, got none")
        self.frames, self.name, self.timeout = frames, name, timeout
        size = self._frame(0).shape[1:]
        if times is None:
            super().__init__(np.arange(len(frames)) / rate, rate, size)
        else:
            super().__init__(_checked_times(times, len(frames), name), None, size)

    def _frame(self, index: int) -> torch.Tensor:
        return load_image(self.frames[index], f"{self.name}[{index}]", self.timeout)

    def read(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        for index in indices:
            frame = self._frame(index)
            if frame.shape[1:] != self.size:
                expected, got = (" x ".join(map(str, size)) for size in (self.size, frame.shape[1:]))
                raise ValueError(f"{self.name}[{index}]: expected {expected} pixels as in the first frame, got {got}")
            yield frame


def _checked_times(times: Any, count: int, name: str) -> np.ndarray:
    times = np.asarray(times, dtype=np.float64)
    if times.shape != (count,):
        raise ValueError(f"{name}: expected {count} timestamps, one per frame, got {times.size}")
    if not np.isfinite(times).all() or times.min() < 0:
        raise ValueError(f"{name}: expected timestamps in seconds from 0 on, got {times.min():g} to {times.max():g}")
    late = np.flatnonzero(np.diff(times) <= 0)
    if late.size:
        before, after = times[late[0] : late[0] + 2]
        raise ValueError(f"{name}: expected rising timestamps, got {after:g} after {before:g}")
    return times


class AnimatedPicture(Video):
    """A GIF, WebP or PNG file, animated or not, or an image that Pillow opened."""

    backend = "pillow"

    def __init__(self, picture: Image.Image, name: str):
        self.picture, self.name = picture, name
        super().__init__([seconds for _, seconds in self._frames()], None, (picture.height, picture.width))

    def _frames(self) -> Iterator[tuple[int, float]]:
        """Goes to frame after frame: (index, seconds from the first one)."""
        milliseconds = 0
        with whole_picture(self.name):
            count = getattr(self.picture, "n_frames", 1)
        for index in range(count):
            with whole_picture(self.name):
                self.picture.seek(index)
                # only then a WebP knows for how long the frame is shown
                self.picture.load()
            yield index, milliseconds / 1000
            # browsers show a frame without a duration for a tenth of a second
            milliseconds += self.picture.info.get("duration") or 100

    def read(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        wanted = set(indices)
        for index, _ in self._frames():
            if index in wanted:
                yield pil_to_rgb(self.picture, self.name)


class _Packet(NamedTuple):
    pts: int | None
    seek: int | None
    is_key: bool


class VideoFile(Video):
    """A file that FFmpeg reads. Opening it reads all packets, but decodes the first frame only.

    The packets tell the time of every frame, whatever the container says about rate and number of frames.
    """

    backend = "pyav"

    def __init__(self, source: str | io.BytesIO, name: str):
        self.source, self.name = source, name
        with self._opened() as (container, stream):
            first, packets = self._scan(container, stream)
            unit, rate, kind = stream.time_base, float(stream.average_rate or 0), container.format.name
        # AVI knows when frames are decoded, raw streams nothing: their frames are counted
        self.timed = kind != "avi" and all(packet.pts is not None for packet in packets)
        self.pts = sorted({packet.pts for packet in packets}) if self.timed else list(range(len(packets)))
        self.keys = []
        if self.timed and any(known in kind for known in SEEKABLE_FORMATS):
            self.keys = sorted((packet.pts, packet.seek) for packet in packets if packet.is_key)
        constant = np.arange(len(self.pts)) / (rate or 1)
        clock = self.pts if self.timed else [packet.seek for packet in packets]
        # seconds of the first frame on the file's clock, which that of the sound is as well
        self.origin = float(self.pts[0] * unit) if self.timed else 0.0
        # by the denominator last: 180000 units of 1/90000 are 2 seconds, not a little less
        ticks = None if None in clock else np.array(clock) - clock[0]
        times = constant if ticks is None else ticks * unit.numerator / unit.denominator
        # containers round to their unit: half of it this frame, half of it the first one
        is_constant = rate > 0 and np.abs(times - constant).max() <= 1.01 * unit
        # phones store upright videos lying, with a rotation
        self.turns = round(first.rotation / 90) % 4
        size = (first.width, first.height) if self.turns % 2 else (first.height, first.width)
        super().__init__(constant if is_constant else times, rate if is_constant else None, size)

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The file and its video."""
        with open_container(self.source, self.name, "video") as (container, stream):
            # music files have their cover as a video of one frame
            if stream is None or stream.disposition & Disposition.attached_pic:
                kinds = " and ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise ValueError(f"{self.name}: expected a video, got a file of {kinds}")
            stream.thread_type = "AUTO"
            yield container, stream

    def _scan(self, container: InputContainer, stream: VideoStream) -> tuple[av.VideoFrame, list[_Packet]]:
        """The first frame, and the packets of all frames that are shown."""
        first, packets, hidden = None, [], 0
        for packet in container.demux(stream):
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.is_corrupt:
                raise ValueError(f"{self.name}: expected a whole video file, got one that is cut off or broken")
            # an edit list of MP4 hides frames
            if packet.is_discard:
                hidden += 1
            elif packet.size:
                seek = packet.pts if packet.dts is None else packet.dts
                packets.append(_Packet(packet.pts, seek, packet.is_keyframe))
        if first is None or not packets:
            raise ValueError(f"{self.name}: expected a video with frames, got none that can be decoded")
        found = len(packets) + hidden
        # other containers only estimate the number
        if "mp4" in container.format.name and found < stream.frames:
            raise ValueError(f"{self.name}: expected {stream.frames} frames, got {found}: the file is cut off")
        return first, packets

    def soundtrack(self) -> Audio | None:
        return open_soundtrack(self.source, self.name, self.origin)

    def read(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        with self._opened() as (container, stream):
            for seek, wanted in self._runs(indices):
                if seek is not None:
                    container.seek(seek, stream=stream)
                yield from self._decode(container, stream, deque(wanted))

    def _runs(self, indices: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """(where to seek first, the wanted frames) of each run of frames that is decoded without a gap."""
        runs, position = [(None, [])], 0
        for index in indices:
            key = bisect_right(self.keys, (self.pts[index], math.inf)) - 1
            if key >= 0 and bisect_left(self.pts, self.keys[key][0]) - position > SEEK_DISTANCE:
                runs.append((self.keys[key][1], []))
            runs[-1][1].append(self.pts[index])
            position = index
        return [run for run in runs if run[1]]

    def _decode(self, container: InputContainer, stream: VideoStream, missing: deque[int]) -> Iterator[torch.Tensor]:
        count = 0
        for packet in container.demux(stream):
            # frames that no other frame refers to need not be decoded
            if self.timed and packet.size:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in missing else "NONREF"
            for frame in packet.decode():
                at = frame.pts if self.timed else count
                count += 1
                if at == missing[0] and not frame.is_corrupt:
                    missing.popleft()
                    yield self._pixels(frame)
                if not missing:
                    return
        raise ValueError(f"{self.name}: expected a whole video file, got one with a frame that cannot be decoded")

    def _pixels(self, frame: av.VideoFrame) -> torch.Tensor:
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        return torch.rot90(pixels, self.turns, (1, 2)) if self.turns else pixels


def open_video(item: Any, name: str, rate: float, timeout: float = TIMEOUT) -> Video:
    """Any video, opened.

    Args:
        item: what `open_source` takes, a list or array of frames, a pair `(frames, timestamps)`, or a Pillow image.
        name: what errors call the video, e.g. `videos[0]`.
        rate: frames per second of frames without timestamps.

    Raises:
        ValueError: not a video, or a broken one.
        OSError: as `open_source`.
    """
    if is_pair(item):
        return FrameList(*item, rate, name, timeout)
    if isinstance(item, (list, tuple, *ARRAYS)):
        return FrameList(item, None, rate, name, timeout)
    if isinstance(item, Image.Image):
        return AnimatedPicture(item, name)
    source = open_source(item, name, timeout)
    picture = open_picture(source, name, ANIMATED_FORMATS)
    return VideoFile(source, name) if picture is None else AnimatedPicture(picture, name)
