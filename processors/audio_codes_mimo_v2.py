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
"""Sounds -> codes: the audio tokenizer, loaded when the first sound comes, and what it is fed with."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .audio_files_mimo_v2 import Audio, check_times, open_audio
from .chat_mimo_v2 import Media
from .feature_extraction_mimo_v2 import MiMoV2FeatureExtractor
from .media_loading_mimo_v2 import TIMEOUT
from .modeling_mimo_audio_tokenizer import MiMoAudioTokenizer
from .video_processing_mimo_v2 import Soundtrack
from .video_sound_mimo_v2 import Unit, first_token, sound_units


AUDIO_TOKENIZER_FOLDER = "audio_tokenizer"
# what a saved processor says about its audio tokenizer, by Transformers' names
PATH_KEY, FOLDER_KEY = "audio_tokenizer_name_or_path", "subfolder"
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# seconds of sound from which on a progress bar is worth its line
LONG_AUDIO = 120

NOT_HEARING = "expected a checkpoint that hears, got one without audio_config in config.json"


class AudioTokenizerSource:
    """Where the audio tokenizer of a processor is, or the loaded one. A copy shares the loaded one."""

    def __init__(self, path: str | os.PathLike, subfolder: str = "", hub_kwargs: dict[str, Any] | None = None):
        self.path, self.subfolder, self.hub_kwargs = os.fspath(path), subfolder, hub_kwargs or {}
        self.loaded: MiMoAudioTokenizer | None = None

    def __deepcopy__(self, memo) -> "AudioTokenizerSource":
        return self

    @classmethod
    def of(cls, audio_tokenizer: MiMoAudioTokenizer | Mapping) -> "AudioTokenizerSource":
        """From a loaded tokenizer, or from what `to_dict` gave."""
        if isinstance(audio_tokenizer, cls):
            return audio_tokenizer
        if isinstance(audio_tokenizer, MiMoAudioTokenizer):
            source = cls(audio_tokenizer.name_or_path)
            source.loaded = audio_tokenizer
            return source
        if not isinstance(audio_tokenizer, Mapping) or PATH_KEY not in audio_tokenizer:
            raise TypeError(f"audio_tokenizer: expected a MiMoAudioTokenizer, got a {type(audio_tokenizer).__name__}")
        return cls(audio_tokenizer[PATH_KEY], audio_tokenizer.get(FOLDER_KEY, ""))

    def to_dict(self) -> dict[str, str]:
        # a saved processor may be loaded from another working directory
        path = os.path.abspath(self.path) if os.path.isdir(self.path) else self.path
        return {"audio_tokenizer_class": MiMoAudioTokenizer.__name__, PATH_KEY: path, FOLDER_KEY: self.subfolder}

    def missing_file(self, *files: str) -> str | None:
        """The first of its files that is not there; others are downloaded if need be."""
        for file in files:
            with suppress(OSError):
                if cached_file(self.path, os.path.join(self.subfolder, file), **self.hub_kwargs) is not None:
                    continue
            return file
        return None

    def load(self) -> MiMoAudioTokenizer:
        """The tokenizer, loaded once. OSError: its files are not there."""
        if self.loaded is None:
            if (file := self.missing_file(CONFIG_NAME, SAFE_WEIGHTS_NAME)) is not None:
                raise FileNotFoundError(
                    f"audio_tokenizer: expected the released folder {self.subfolder!r} with {CONFIG_NAME} and "
                    f"{SAFE_WEIGHTS_NAME} in {self.path!r}, got no {file}; without it there is no sound, and "
                    "use_audio_in_video=False for videos"
                )
            self.loaded = MiMoAudioTokenizer.from_pretrained(
                self.path, subfolder=self.subfolder, **self.hub_kwargs
            ).eval()
        return self.loaded


class Sound(NamedTuple):
    """What is encoded of an audio: from `start` to `end` in seconds, to the end where that is None."""

    audio: Audio
    start: float | None = None
    end: float | None = None

    @property
    def seconds(self) -> float:
        """How long it is, infinite where nobody knows before decoding."""
        ends = [end for end in (self.end, self.audio.duration) if end is not None]
        return max(0.0, min(ends, default=math.inf) - (self.start or 0.0))


def encode_sounds(
    extractor: MiMoV2FeatureExtractor, tokenizer: MiMoAudioTokenizer, sounds: Sequence[Sound]
) -> list[torch.Tensor]:
    """Codes [frames, levels] of each sound, on the CPU. Sounds are decoded as the tokenizer needs them, so that memory
    does not grow with their length; long ones show a progress bar."""
    counts = []
    seconds = sum(sound.seconds for sound in sounds)
    # without a total it counts up
    total = math.ceil(seconds) if math.isfinite(seconds) else None

    def segments() -> Iterator[torch.Tensor]:
        for sound in sounds:
            counts.append(0)
            for segment in extractor.segments(*sound):
                counts[-1] += 1
                yield segment
                # the last segment may have a frame more than whole hops
                bar.update(len(segment) * extractor.hop_length // extractor.sampling_rate)

    with logging.tqdm(total=total, unit="s", desc="hearing", disable=seconds < LONG_AUDIO) as bar:
        codes = [part.cpu() for part in tokenizer.encode_segments(segments())]
    parts = iter(codes)
    return [torch.cat([next(parts) for _ in range(count)]) for count in counts]


def checked_codes(codes: Any, name: str) -> torch.Tensor:
    """Codes that were made before, [code frames, levels] of integers."""
    codes = torch.as_tensor(codes)
    if codes.dim() != 2 or not len(codes) or codes.is_floating_point():
        raise ValueError(f"{name}: expected integer codes [frames, levels], got {codes.dtype} {list(codes.shape)}")
    return codes.long()


class Hearing:
    """What a processor does with the sounds of a call.

    Args:
        source: None for a checkpoint that does not hear.
        group_size: code frames of a token.
        code_rate: code frames per second.
    """

    def __init__(
        self,
        extractor: MiMoV2FeatureExtractor,
        source: AudioTokenizerSource | None,
        group_size: int,
        code_rate: float,
    ):
        self.extractor, self.source = extractor, source
        self.group_size, self.token_rate = group_size, code_rate / group_size

    def opened(self, audio: Media, settings: dict[str, Any]) -> list[Sound | torch.Tensor]:
        """Each audio, opened before one is decoded; codes that were made before as they are."""
        if audio.items and self.source is None:
            raise ValueError(f"audio[0]: {NOT_HEARING}")
        opened = []
        for index, item in enumerate(audio.items):
            name, options = f"audio[{index}]", audio.options[index] if audio.options else {}
            start, end = options.get("start"), options.get("end")
            check_times(start, end, name)
            if isinstance(item, Mapping) and "audio_codes" in item:
                if options:
                    given = ", ".join(options)
                    raise ValueError(
                        f"{name}: expected nothing beside `audio_codes`, which are cut already, got {given}"
                    )
                opened.append(checked_codes(item["audio_codes"], name))
            else:
                rate = self.extractor.rate_of([item], options.get("sampling_rate", settings.get("sampling_rate")))
                opened.append(Sound(open_audio(item, name, rate, settings.get("timeout", TIMEOUT)), start, end))
        return opened

    def wants_soundtracks(self, use_audio_in_video: bool | None) -> bool:
        if use_audio_in_video and self.source is None:
            raise ValueError(f"use_audio_in_video: {NOT_HEARING}")
        return self.source is not None and use_audio_in_video is not False

    def of_videos(self, soundtracks: Sequence[Soundtrack | None], timestamps: Sequence[list[float]]) -> list:
        """The part of each soundtrack that goes with its frames, from the first token of the first pair on, a Sound;
        None where there is none."""
        shortest = self.extractor.n_fft / self.extractor.sampling_rate
        sounds = []
        for index, (soundtrack, seconds) in enumerate(zip(soundtracks, timestamps)):
            sound = None
            first = first_token(seconds, self.token_rate)
            if soundtrack is not None and int(soundtrack.end * self.token_rate) > first:
                sound = Sound(soundtrack.audio, first / self.token_rate, soundtrack.end)
                # among all videos of the call
                sound.audio.name = f"videos[{index}]"
            # a track may end before the first frame
            sounds.append(sound if sound is not None and sound.seconds > shortest else None)
        return sounds

    def encoded(self, sounds: Sequence[Sound | torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Codes of each; what is no sound stays as it is."""
        new = [sound for sound in sounds if isinstance(sound, Sound)]
        codes = iter(encode_sounds(self.extractor, self.source.load(), new) if new else [])
        return [next(codes) if isinstance(sound, Sound) else sound for sound in sounds]

    def tokens(self, codes: torch.Tensor) -> int:
        return -(-len(codes) // self.group_size)

    def units(self, codes: torch.Tensor | None, seconds: list[float], soundtrack: Soundtrack | None) -> list[Unit]:
        """The pairs of frames of a video, and the tokens of `codes` that belong to each."""
        if codes is None:
            return [Unit(second, 0) for second in seconds]
        return sound_units(seconds, soundtrack.end, self.tokens(codes), self.token_rate)

    def cut(self, codes: torch.Tensor | None, units: Sequence[Unit]) -> torch.Tensor | None:
        """`codes` without what lies behind the last frame."""
        return None if codes is None else codes[: self.group_size * sum(unit.audio_tokens for unit in units)]


def audio_inputs(audio: Sequence[torch.Tensor], videos: Sequence[torch.Tensor | None], order: Iterable[str]) -> dict:
    """Codes of audio and of videos with sound, in the order of their placeholders: kinds of media in `order`."""
    rest = {"audio": iter(audio), "video": iter(videos)}
    codes = [part for part in (next(rest[kind]) for kind in order if kind in rest) if part is not None]
    if not codes:
        return {}
    return {"audio_codes": torch.cat(codes), "audio_code_lengths": torch.tensor([len(part) for part in codes])}
