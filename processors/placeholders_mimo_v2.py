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
"""Tokens that stand for media, where texts have placeholders, and what takes their place."""

import re
from collections.abc import Iterator, Mapping, Sequence

from .chat_mimo_v2 import TEXT_START


# name of an id in the released config.json -> the token
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_token_id": "<|audio_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_start_token_id": "<|mimo_video_start|>",
    "video_end_token_id": "<|mimo_video_end|>",
    "audio_start_token_id": "<|mimo_audio_start|>",
    "audio_end_token_id": "<|mimo_audio_end|>",
}
IMAGE, VIDEO, AUDIO = (TOKENS[f"{kind}_token_id"] for kind in ("image", "video", "audio"))
VISION_START, VISION_END = TOKENS["vision_start_token_id"], TOKENS["vision_end_token_id"]
VIDEO_START, VIDEO_END = TOKENS["video_start_token_id"], TOKENS["video_end_token_id"]
AUDIO_START, AUDIO_END = TOKENS["audio_start_token_id"], TOKENS["audio_end_token_id"]

# of what the template writes for a video all is replaced
_PATTERNS = {
    "image": re.escape(IMAGE),
    "video": f"{re.escape(VISION_START + VIDEO + VISION_END)}|{re.escape(VIDEO)}",
    "audio": re.escape(AUDIO),
}
# a token with the mark in front is a user's text
_PLACEHOLDERS = re.compile(
    f"(?<!{TEXT_START})(?:" + "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _PATTERNS.items()) + ")"
)
# what an argument of a call with media of this kind is called
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}


def placeholders(texts: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index of the text, kind of medium) of each placeholder in reading order."""
    for index, text in enumerate(texts):
        for match in _PLACEHOLDERS.finditer(text):
            yield index, match.lastgroup


def check_placeholders(texts: Sequence[str], media: Mapping[str, Sequence]) -> None:
    """ValueError unless there is one placeholder per medium of each kind and the other way round."""
    found = {kind: [] for kind in media}
    for index, kind in placeholders(texts):
        found[kind].append(index)
    for kind, items in media.items():
        name, places = ARGUMENTS[kind], found[kind]
        if len(places) > len(items):
            index = places[len(items)]
            nth = places[: len(items)].count(index)
            raise ValueError(
                f"{name}: expected {len(places)}, one per placeholder in the text, got {len(items)}; "
                f"placeholder {nth} of text[{index}] has none"
            )
        if len(places) < len(items):
            raise ValueError(
                f"{name}[{len(places)}]: expected a placeholder in the text, got {len(places)} for {len(items)} {name}"
            )


def expanded(texts: Sequence[str], replacements: Mapping[str, Sequence[str]]) -> list[str]:
    """`texts` with what stands for each medium in place of its placeholder."""
    rest = {kind: iter(media) for kind, media in replacements.items()}
    return [_PLACEHOLDERS.sub(lambda match: next(rest[match.lastgroup]), text) for text in texts]
