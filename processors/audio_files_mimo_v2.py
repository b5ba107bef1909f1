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
"""Audio from wherever users keep it -> samples block by block, and these at the rate that the model hears."""

import io
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
import soxr
import torch
from transformers.utils import logging

from .media_loading_mimo_v2 import ARRAYS, TIMEOUT, open_source
from .media_opening_mimo_v2 import UnknownSound, file_of, open_container, open_sound, source_name


logger = logging.get_logger(__name__)

# samples per channel that are read at a time, 1.4 s at 48 kHz
BLOCK = 2**16
# of arrays; the other axis is time
MAX_CHANNELS = 8
# floats beyond are no samples of -1 to 1 that were made a little too loud
PEAK = 2.0
# the largest sample of 16 bits; audio with a hundredth of its samples there was recorded too loud
FULL_SCALE = 1 - 2**-15
CLIPPED_SHARE = 0.01
# seconds; timestamps of containers are rounded, and less than this is no pause
GAP = 0.02
# how libsndfile reports that a file is shorter than its header says: WAV and AU, AIFF, W64, RF64
CUT_OFF = re.compile(r"(?:data|Data Size|SSND|riff|Riff size)\s*: (\d+) \(should be \d+\)")
# bytes; whoever writes into a pipe puts this or more where the length would be
UNKNOWN_LENGTH = 0x7FFFF000
# and this is what libsndfile then makes of it
UNKNOWN_FRAMES = 2**62


class Audio:
    """Audio that is not decoded yet.

    Attributes:
        rate: samples per second and channel.
        channels: how many.
        duration: seconds, with what the encoder filled its last frame with, or None where only decoding tells.
        name: what errors call it.
    """

    rate: float
    channels: int
    duration: float | None
    name: str

    def blocks(self) -> Iterator[np.ndarray]:
        """[n, channels] float32 of about -1 to 1, one after the other. ValueError: audio that cannot be decoded."""
        raise NotImplementedError


class AudioArray(Audio):
    """Samples in memory: [n], [channels, n] or [n, channels] with at most 8 channels.

    Integers are scaled by their full scale, unsigned ones being silent in the middle.
    """

    def __init__(self, samples: Any, rate: Any, name: str):
        if not isinstance(rate, numbers.Real) or not 0 < rate < math.inf:
            raise ValueError(f"{name}: expected a sampling rate in Hz above 0, got {rate!r}")
        array = _numbers(samples, name)
        shape = list(array.shape)
        if array.ndim == 1:
            array = array[:, None]
        elif array.ndim == 2 and shape[0] <= min(shape[1], MAX_CHANNELS):
            array = array.T
        if array.ndim != 2 or array.shape[1] > MAX_CHANNELS:
            raise ValueError(
                f"{name}: expected [n], [channels, n] or [n, channels] with 1 to {MAX_CHANNELS} channels, got {shape}"
            )
        if not array.size:
            raise ValueError(f"{name}: expected samples, got {shape}")
        if array.dtype.kind == "f":
            low, high = float(array.min()), float(array.max())
            # NaN fails every comparison
            if not -PEAK <= low <= high <= PEAK:
                raise ValueError(f"{name}: expected floats of about -1 to 1, got {low:g} to {high:g}")
        self.array, self.rate, self.name = array, rate, name
        self.channels, self.duration = array.shape[1], len(array) / rate

    def blocks(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.array), BLOCK):
            yield _scaled(self.array[first : first + BLOCK])


def _numbers(samples: Any, name: str) -> np.ndarray:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        # NumPy has no bfloat16
        samples = (samples.float() if samples.dtype == torch.bfloat16 else samples).numpy()
    try:
        array = np.asarray(samples)
    except ValueError:
        raise ValueError(f"{name}: expected as many samples in every channel, got lists of unequal length") from None
    # nobody records 64 bits: integers of this size are 16-bit samples that lost their type
    if array.dtype.kind not in "iuf" or (array.dtype.kind in "iu" and array.dtype.itemsize > 4):
        raise ValueError(f"{name}: expected floats or integers of 8, 16 or 32 bits, got {array.dtype}")
    return array


def _scaled(samples: np.ndarray) -> np.ndarray:
    """Any number type -> float32 of -1 to 1."""
    if samples.dtype.kind != "f":
        full = 2.0 ** (8 * samples.dtype.itemsize - 1)
        samples = (samples - full * (samples.dtype.kind == "u")) / full
    return np.ascontiguousarray(samples, dtype=np.float32)


class SoundFile(Audio):
    """A file that libsndfile reads: WAV, FLAC, OGG, MP3, AIFF and others."""

    def __init__(self, source: str | io.BytesIO, name: str):
        self.source, self.name = source, name
        with open_sound(source) as file:
            self.rate, self.channels, self.format = file.samplerate, file.channels, file.format
            self.frames, self.duration = file.frames, file.frames / file.samplerate
            lengths = [int(length) for length in CUT_OFF.findall(file.extra_info)]
        if any(length < UNKNOWN_LENGTH for length in lengths):
            raise ValueError(f"{name}: expected a whole audio file, got one that is cut off")

    def blocks(self) -> Iterator[np.ndarray]:
        count = 0
        try:
            with open_sound(self.source) as file:
                while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                    count += len(block)
                    yield block
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{self.name}: expected a whole audio file, got {error.error_string!r}") from None
        if count < self.frames:
            raise ValueError(f"{self.name}: expected {self.frames} samples, got {count}: the file is cut off")


class AvAudio(Audio):
    """A file that FFmpeg reads, or the sound of a video; see `open_soundtrack`, which makes it."""

    def __init__(
        self, source: str | io.BytesIO, name: str, first: av.AudioFrame, origin: Fraction, duration: float | None
    ):
        self.source, self.name, self.origin, self.duration = source, name, origin, duration
        # HE-AAC says only in its frames what it has
        self.rate, self.channels = first.sample_rate, first.layout.nb_channels

    def blocks(self) -> Iterator[np.ndarray]:
        return _merged(self._placed())

    def _placed(self) -> Iterator[np.ndarray]:
        """Frame by frame, with silence where none was recorded."""
        count = None
        with open_container(self.source, self.name, "audio") as (container, stream):
            # FFmpeg itself leaves out what an encoder put before and behind the sound
            for frame in container.decode(stream):
                got = frame.sample_rate, frame.layout.nb_channels
                if got != (self.rate, self.channels):
                    expected = f"{self.channels} channels at {self.rate} Hz throughout"
                    raise ValueError(f"{self.name}: expected {expected}, got {got[1]} at {got[0]} Hz")
                planes = frame.to_ndarray()
                # packed formats have one row for all channels
                samples = _scaled(planes.T if frame.format.is_planar else planes.reshape(-1, self.channels))
                place = count or 0
                if frame.pts is not None:
                    place = round((frame.pts * frame.time_base - self.origin) * self.rate)
                if count is None or place - count > GAP * self.rate:
                    for first in range(max(0, count or 0), place, BLOCK):
                        yield np.zeros((min(BLOCK, place - first), self.channels), dtype=np.float32)
                    count = place
                # what lies before time 0 is dropped
                yield samples[max(0, -count) :]
                count += len(samples)


def _merged(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames of compressed audio have a fiftieth of a second, less than is worth a call of what comes next."""
    waiting, count = [], 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        if count >= BLOCK:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if count:
        yield np.concatenate(waiting)


def open_soundtrack(source: str | io.BytesIO, name: str, origin: float | None = 0.0) -> AvAudio | None:
    """The sound of a video file, aligned with its pictures: None where it has none. Reads all packets, but decodes the
    first frame only.

    Args:
        source: as `open_source` gives it.
        name: what errors call the video, e.g. `videos[0]`.
        origin: seconds on the file's clock that become time 0, such as the pts of the first picture. Sound from before
            is dropped, and sound that begins later has silence ahead. None: where the sound begins.

    Raises:
        ValueError: a broken file.
    """
    first, end, found = None, None, 0
    with open_container(source, name, "audio") as (container, stream):
        if stream is None:
            return None
        is_pcm = stream.codec_context.name.startswith("pcm_")
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError(f"{name}: expected a whole audio or video file, got one that is cut off or broken")
            if packet.size:
                # headers count the samples of PCM, and the packets of any other codec
                found += packet.duration if is_pcm else 1
                end = end if packet.pts is None else (packet.pts + (packet.duration or 0)) * stream.time_base
            if first is None:
                first = next(iter(packet.decode()), None)
        # other containers only estimate the number
        if "mp4" in container.format.name and found < stream.frames:
            unit = "samples" if is_pcm else "packets"
            raise ValueError(f"{name}: expected {stream.frames} {unit} of sound, got {found}: the file is cut off")
    # screen recorders write a track for sound even if there was none
    if first is None:
        return None
    if origin is None:
        origin = 0 if first.pts is None else first.pts * first.time_base
    origin = Fraction(origin)
    return AvAudio(source, name, first, origin, None if end is None else max(0.0, float(end - origin)))


def has_rate(item: Any) -> bool:
    """A pair `(samples, rate)`."""
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], (list, tuple, *ARRAYS))
        and isinstance(item[1], numbers.Real)
    )


def flatten_audio(audio: Any) -> list[Any]:
    """One audio, a list of them, or lists in a list -> one flat list.

    A list of numbers is one audio and becomes an array; a pair `(samples, rate)` is one as well. An array of three
    dimensions is a list.
    """
    if audio is None:
        return []
    if isinstance(audio, ARRAYS) and audio.ndim == 3:
        return list(audio)
    if not isinstance(audio, (list, tuple)) or has_rate(audio):
        return [audio]
    if audio and all(isinstance(item, numbers.Real) for item in audio):
        return [np.asarray(audio)]
    return [item for group in audio for item in flatten_audio(group)]


def open_audio(item: Any, name: str, rate: float, timeout: float = TIMEOUT) -> Audio:
    """Any audio, opened.

    Args:
        item: what `open_source` takes, an array or tensor (see `AudioArray`), a pair `(samples, rate)`, or a mapping
            with `array` and `sampling_rate`.
        name: what errors call it, e.g. `audio[0]`.
        rate: Hz of an array without a rate.
        timeout: seconds without an answer after which a server counts as unreachable.

    Raises:
        ValueError: no audio, or a broken one.
        OSError: as `open_source`.
    """
    if isinstance(item, Mapping):
        if not {"array", "sampling_rate"} <= item.keys():
            raise ValueError(
                f"{name}: expected `array` and `sampling_rate`, got {', '.join(map(str, item)) or 'none'}"
            )
        return AudioArray(item["array"], item["sampling_rate"], name)
    if has_rate(item):
        return AudioArray(*item, name)
    if isinstance(item, (list, tuple, *ARRAYS)):
        return AudioArray(item, rate, name)
    source = open_source(item, name, timeout, "array or pair (samples, rate)")
    try:
        sound = SoundFile(source, name)
        if _tells_its_length(source, sound):
            return sound
    except UnknownSound:
        pass
    sound = open_soundtrack(source, name, origin=None)
    if sound is None:
        raise ValueError(f"{name}: expected a file with sound, got {source_name(source)} without any")
    return sound


def _tells_its_length(source: str | io.BytesIO, sound: SoundFile) -> bool:
    """Whether the file does. If not, libsndfile fails to read FLAC, and stops where it guesses the end of MP3."""
    if sound.format != "MP3":
        return sound.frames < UNKNOWN_FRAMES
    with file_of(source) as file:
        head = file.read(10)
        # a tag, with a cover maybe, is as long as four times 7 bits say
        length = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(head[6:])))
        file.seek(length if head.startswith(b"ID3") else 0)
        # the first frame counts the others; none is larger than 1441 bytes
        frame = file.read(1441)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def check_times(start: float | None, end: float | None, name: str) -> tuple[float, float]:
    """`start` and `end` in seconds as numbers. ValueError: no numbers, or `start` not before `end`."""
    first, last = 0.0 if start is None else start, math.inf if end is None else end
    if not all(isinstance(time, numbers.Real) for time in (first, last)):
        raise ValueError(f"{name}: expected start and end in seconds, got {start!r} and {end!r}")
    if not 0 <= first < last:
        raise ValueError(f"{name}: expected 0 <= start < end, got {first:g} and {last:g} s")
    return first, last


def _between(audio: Audio, first: float, last: float) -> Iterator[np.ndarray]:
    """[n, channels] of the blocks from `first` to `last`, in seconds. See `resampled`."""
    begin, stop = round(first * audio.rate), last if math.isinf(last) else round(last * audio.rate)
    position = clipped = 0
    for block in audio.blocks():
        part = block[max(0, begin - position) : int(min(len(block), max(0, stop - position)))]
        position += len(block)
        if not np.isfinite(part).all():
            raise ValueError(f"{audio.name}: expected numbers as samples, got NaN or infinity")
        clipped += np.count_nonzero(np.abs(part) >= FULL_SCALE)
        if len(part):
            yield part
        if position >= stop:
            break
    share = clipped / max(1, (min(position, stop) - begin) * audio.channels)
    if share >= CLIPPED_SHARE:
        logger.warning(f"{audio.name}: clipped, {share:.0%} of the samples are at full scale")


def resampled(audio: Audio, rate: float, start: float | None = None, end: float | None = None) -> Iterator[np.ndarray]:
    """[n] float32 at `rate` Hz, one block after the other: each channel resampled, then their average.

    Equal to soxr's HQ of everything at once; memory is that of a block. Audio that is clipped for at least a hundredth
    of its samples gives a warning.

    Args:
        start, end: seconds of the part that is taken, before it is resampled. An `end` behind the last sample is that
            one; from a `start` behind it there are no samples.

    Raises:
        ValueError: times that cannot be, audio that cannot be decoded, samples that are no numbers.
    """
    blocks = _between(audio, *check_times(start, end, audio.name))
    if audio.rate == rate:
        for block in blocks:
            yield block.mean(axis=1)
        return
    stream = soxr.ResampleStream(audio.rate, rate, audio.channels, quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block).mean(axis=1)
    yield stream.resample_chunk(np.zeros((0, audio.channels), dtype=np.float32), last=True).mean(axis=1)
