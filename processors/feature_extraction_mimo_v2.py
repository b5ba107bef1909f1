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
"""Audio to log-mel spectrograms, cut into segments: what the audio tokenizer reads."""

import numbers
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.utils import logging

from modeling_mimo.unknown_names_mimo_v2 import unknown_name

from .audio_files_mimo_v2 import Audio, flatten_audio, open_audio, resampled
from .image_processing_mimo_v2 import ReleasedSettings
from .media_loading_mimo_v2 import ARRAYS, TIMEOUT


logger = logging.get_logger(__name__)

# magnitudes are at least this before the logarithm
FLOOR = 1e-7
# what Transformers writes with settings that is no setting here
SERVICE_KEYS = (
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "padding_value",
    "padding_side",
    "return_attention_mask",
)


class MiMoV2FeatureExtractor(ReleasedSettings, SequenceFeatureExtractor):
    r"""
    Audio of any rate and number of channels to `input_features`: log-mel spectrograms in segments.

    Each channel is resampled, then they are averaged. The spectrogram is that of torchaudio's MelSpectrogram with
    magnitudes (`power=1`), HTK filters without a norm, and reflected ends. It goes over the whole audio, and only then
    is cut: a segment begins where the one before it ended.

    `from_pretrained` of a release takes the settings from `processor_config` in its config.json: its
    preprocessor_config.json is about images.

    Args:
        sampling_rate (`int`, *optional*, defaults to 24000):
            Hz that audio is resampled to.
        feature_size (`int`, *optional*, defaults to 128):
            Mel bins.
        n_fft (`int`, *optional*, defaults to 960):
            Samples of a Fourier transform.
        hop_length (`int`, *optional*, defaults to 240):
            Samples from one frame to the next.
        win_length (`int`, *optional*, defaults to 960):
            Samples of the Hann window in the middle of these.
        fmin (`float`, *optional*, defaults to 0.0):
            Hz where the first bin begins.
        fmax (`float`, *optional*):
            Hz where the last bin ends. None, as released, is half the sampling rate.
        segment_size (`int`, *optional*, defaults to 6000):
            Largest number of frames of a segment: a minute.
    """

    model_input_names = ["input_features", "feature_lengths", "segments_per_audio"]
    call_arguments = ("audio", "sampling_rate", "start", "end", "return_tensors", "timeout")

    released_names = {
        "sampling_rate": "audio_sampling_rate",
        "feature_size": "audio_n_mels",
        "n_fft": "audio_nfft",
        "hop_length": "audio_hop_length",
        "win_length": "audio_window_size",
        "fmin": "audio_fmin",
        "fmax": "audio_fmax",
        "segment_size": "audio_segment_size",
    }

    def __init__(
        self,
        sampling_rate: int = 24000,
        feature_size: int = 128,
        n_fft: int = 960,
        hop_length: int = 240,
        win_length: int = 960,
        fmin: float = 0.0,
        fmax: float | None = None,
        segment_size: int = 6000,
        **kwargs,
    ):
        # pipelines refuse batches where this is not the side of the tokenizer
        super().__init__(feature_size, sampling_rate, padding_value=0.0, padding_side="left")
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length
        self.fmin, self.fmax, self.segment_size = fmin, fmax, segment_size
        self.settings(**{name: value for name, value in kwargs.items() if name not in SERVICE_KEYS})
        highest = sampling_rate // 2 if fmax is None else fmax
        # in double precision: in single, rounding fills the quiet bins beside a loud tone, by 2 in the logarithm
        self.mel_filters = torch.from_numpy(
            mel_filter_bank(n_fft // 2 + 1, feature_size, fmin, highest, sampling_rate)
        )
        self.window = torch.hann_window(win_length, dtype=torch.float64)

    @classmethod
    def get_feature_extractor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` wrote, else the settings of a release."""
        return cls.saved_or_released(super().get_feature_extractor_dict, pretrained_model_name_or_path, kwargs)

    def fetch_audio(self, audio_url_or_urls: Any, sampling_rate: int | None = None) -> Any:
        """What it gets, which a call reads itself: pipelines would decode the whole of it, and lose its rate."""
        return audio_url_or_urls

    @classmethod
    def setting_names(cls) -> Iterable[str]:
        return cls.released_names

    def settings(self, **changes) -> dict[str, Any]:
        """This extractor's settings with `changes`, of which None changes nothing. ValueError: not possible ones."""
        values = {name: vars(self)[name] for name in self.released_names}
        values |= {name: value for name, value in changes.items() if value is not None or name not in values}
        for name, value in values.items():
            if name not in self.released_names:
                raise ValueError(unknown_name(name, self.released_names, "a setting of the feature extractor"))
            if name in ("fmin", "fmax"):
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer above 0, got {value!r}")
        for name in ("hop_length", "win_length"):
            if values[name] > values["n_fft"]:
                raise ValueError(f"{name}: expected at most n_fft, {values['n_fft']}, got {values[name]}")
        half = values["sampling_rate"] / 2
        lowest, highest = values["fmin"], half if values["fmax"] is None else values["fmax"]
        if not all(isinstance(edge, numbers.Real) for edge in (lowest, highest)) or not 0 <= lowest < highest <= half:
            raise ValueError(f"fmin, fmax: expected 0 <= fmin < fmax <= {half:g} Hz, got {lowest!r} and {highest!r}")
        return values

    def __call__(
        self,
        audio: Any,
        sampling_rate: float | None = None,
        start: float | None = None,
        end: float | None = None,
        return_tensors: str | None = None,
        timeout: float = TIMEOUT,
        **kwargs,
    ) -> BatchFeature:
        r"""
        All segments of all audios, in memory. See `segments` for one after the other.

        Args:
            audio: one audio or a (nested) list: paths, URLs, bytes, base64 texts, file objects, arrays or tensors [n],
                [channels, n] or [n, channels], tuples `(samples, rate)`, mappings with `array` and `sampling_rate`.
                Integers are scaled by their full scale; floats are about -1 to 1.
            sampling_rate (`float`, *optional*): Hz of arrays without a rate; None: its own, with a warning.
            start, end (`float`, *optional*): seconds of the part of each audio that is taken.
            return_tensors (`str`, *optional*): `"pt"` as well as None: tensors of PyTorch; `"np"`: arrays.
            timeout (`float`, *optional*): seconds without an answer after which a server counts as unreachable.

        Returns:
            `BatchFeature`: `input_features` [segments, longest, feature_size] float32, zeros behind the shorter ones;
            `feature_lengths` [segments], frames of each; `segments_per_audio` [audios].

        Raises:
            ValueError, OSError: an audio that cannot be used, by its index among all audios of the call.
        """
        for name in kwargs:
            raise ValueError(unknown_name(name, self.call_arguments, "an argument of the call"))
        items = flatten_audio(audio)
        if not items:
            raise ValueError("audio: expected at least one audio, got none")
        sampling_rate = self.rate_of(items, sampling_rate)
        # all are opened before one is decoded: errors come early
        opened = [open_audio(item, f"audio[{index}]", sampling_rate, timeout) for index, item in enumerate(items)]
        parts = [list(self.segments(one, start, end)) for one in opened]
        segments = [segment for part in parts for segment in part]
        data = {
            "input_features": pad_sequence(segments, batch_first=True),
            "feature_lengths": torch.tensor([len(segment) for segment in segments]),
            "segments_per_audio": torch.tensor([len(part) for part in parts]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def rate_of(self, items: Iterable[Any], sampling_rate: float | None) -> float:
        """Hz of those `items` that come without a rate: `sampling_rate`, else the extractor's own, with a warning."""
        if sampling_rate is not None:
            return sampling_rate
        if any(isinstance(item, ARRAYS) for item in items):
            logger.warning_once(f"`sampling_rate` of arrays was not given: taken to be {self.sampling_rate} Hz.")
        return self.sampling_rate

    def segments(self, audio: Audio, start: float | None = None, end: float | None = None) -> Iterator[torch.Tensor]:
        """[segment_size, feature_size] float32 one after the other, the last one maybe shorter, computed while
        decoding: memory does not grow with the audio.

        There are 1 + samples // hop_length frames in all.

        Args:
            start, end: seconds of the part that is taken. An `end` behind the last sample is that one.

        Raises:
            ValueError: as `resampled`, and a part too short to be reflected at its ends: at most n_fft // 2 samples.
        """
        rest = torch.zeros(0, self.feature_size)
        for frames in self._frames(resampled(audio, self.sampling_rate, start, end), audio.name):
            rest = torch.cat([rest, frames])
            while len(rest) >= self.segment_size:
                yield rest[: self.segment_size]
                rest = rest[self.segment_size :]
        if len(rest):
            yield rest

    def _frames(self, blocks: Iterable[np.ndarray], name: str) -> Iterator[torch.Tensor]:
        """[n, feature_size] of as many frames as each block completes."""
        reflected = self.n_fft // 2
        # the end is reflected as well, and shows only after it
        held = reflected + 1
        buffer, begun = torch.zeros(0, dtype=torch.float64), False
        for block in blocks:
            buffer = torch.cat([buffer, torch.from_numpy(block).double()])
            if not begun and len(buffer) > reflected:
                buffer, begun = torch.cat([buffer[1 : reflected + 1].flip(0), buffer]), True
            count = (len(buffer) - held - self.n_fft) // self.hop_length + 1
            if begun and count > 0:
                yield self._log_mel(buffer[: (count - 1) * self.hop_length + self.n_fft])
                buffer = buffer[count * self.hop_length :]
        if not begun:
            expected, got = (1000 * samples / self.sampling_rate for samples in (reflected, len(buffer)))
            raise ValueError(f"{name}: expected more than {expected:g} ms of sound, got {got:.3g} ms")
        yield self._log_mel(torch.cat([buffer, buffer[-reflected - 1 : -1].flip(0)]))

    def _log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """[frames, feature_size] of the frames that lie within `samples`."""
        spectrum = torch.stft(
            samples, self.n_fft, self.hop_length, self.win_length, self.window, center=False, return_complex=True
        )
        return (spectrum.abs().T @ self.mel_filters).clamp(min=FLOOR).log().float()


__all__ = ["MiMoV2FeatureExtractor"]
