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
"""Videos with sound: which part of the sound belongs to which pair of frames, and the text that stands for both."""

from typing import NamedTuple

from .placeholders_mimo_v2 import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VISION_END,
    VISION_START,
)


class Unit(NamedTuple):
    """A pair of frames: its second, and how many tokens of sound there are until the next pair."""

    seconds: float
    audio_tokens: int


def first_token(seconds: list[float], rate: float) -> int:
    """Token of the whole soundtrack that is the first one of the first pair of frames; `rate`: tokens per second."""
    return int(seconds[0] * rate)


def sound_units(seconds: list[float], end: float, tokens: int, rate: float) -> list[Unit]:
    """The sound between the frames, pair by pair.

    Args:
        seconds: time of each pair of frames.
        end: seconds until when the last pair is shown.
        tokens: tokens of sound there are, the first one being `first_token`.
        rate: tokens of sound per second.
    """
    first = first_token(seconds, rate)
    # sound may end before the pictures do
    bounds = [min(int(second * rate) - first, tokens) for second in [*seconds, end]]
    return [Unit(second, after - before) for second, before, after in zip(seconds, bounds, bounds[1:])]


def grouped_units(units: list[Unit], interleave: float) -> list[list[Unit]]:
    """Units that share a timestamp and a stretch of sound: each alone (0), all (-1), or those of so many seconds."""
    if interleave == 0:
        return [[unit] for unit in units]
    if interleave == -1:
        return [units]
    groups: dict[int, list[Unit]] = {}
    for unit in units:
        groups.setdefault(int(unit.seconds // interleave), []).append(unit)
    return list(groups.values())


def video_text(units: list[Unit], frame_tokens: int, interleave: float) -> str:
    """What stands for a video in a prompt; `frame_tokens`: of each pair of frames."""
    frames = VISION_START + VIDEO * frame_tokens + VISION_END
    # without sound there is nothing to share a timestamp for
    heard = any(unit.audio_tokens for unit in units)
    pieces = []
    for group in grouped_units(units, interleave if heard else 0):
        second, tokens = int(group[0].seconds), sum(unit.audio_tokens for unit in group)
        pieces.append(f"{second // 60:02d}:{second % 60:02d}" + frames * len(group))
        # behind the end of the sound there are no tokens, and nothing opens or closes them
        pieces.append(AUDIO_START + AUDIO * tokens + AUDIO_END if tokens else "")
    return VIDEO_START + "".join(pieces) + VIDEO_END
