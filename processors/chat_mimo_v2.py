"""Conversations before they are rendered: media taken out of the messages, control tokens in texts marked as text."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END as TEXT_END
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START as TEXT_START
from transformers.utils.chat_template_utils import mark_control_tokens

from .audio_files_mimo_v2 import flatten_audio
from .media_loading_mimo_v2 import flatten_images, flatten_videos


# kind of medium -> keys of a part of content that hold it; the chat template knows a medium by the first two as well
MEDIA_KEYS = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "audio": ("audio", "audio_url", "input_audio", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}
# settings that a part may carry for its own medium
MEDIA_OPTIONS = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "num_frames", "min_pixels", "max_pixels", "start", "end"),
    "audio": ("start", "end", "sampling_rate"),
}
_FLATTEN = {"image": flatten_images, "video": flatten_videos, "audio": flatten_audio}


@dataclass
class Media:
    """The media of one kind in the order of their placeholders, and the settings that come with each."""

    items: list[Any] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)


def with_mapped_arguments(chats: Sequence[Sequence[dict]], batched: bool) -> list[list[dict]]:
    """`chats` with the arguments of each call as a mapping, which the chat template needs; OpenAI's are JSON text.

    ValueError: arguments that are neither, named by their indices.
    """
    mapped = []
    for row, chat in enumerate(chats):
        messages = []
        for index, message in enumerate(chat):
            calls = message.get("tool_calls")
            if isinstance(calls, (list, tuple)):
                name = f"{_message_name(row, index, batched)}.tool_calls"
                calls = [_with_mapped_arguments(call, f"{name}[{at}]") for at, call in enumerate(calls)]
                message = {**message, "tool_calls": calls}
            messages.append(message)
        mapped.append(messages)
    return mapped


def _with_mapped_arguments(call: Any, name: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_mapped_arguments(call["function"], name)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    with suppress(ValueError):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}: expected arguments as a mapping or its JSON text, got {arguments!r}")
    return {**call, "arguments": arguments}


def _message_name(row: int, index: int, batched: bool) -> str:
    return f"messages[{row}][{index}]" if batched else f"messages[{index}]"


def take_media(chats: list[list[dict]], batched: bool) -> tuple[list[list[dict]], dict[str, Media]]:
    """Chats whose media parts only say their kind, and the media. `chats` stay as they are.

    ValueError: a part that is neither text nor a medium, or a medium without data.
    """
    media = {kind: Media() for kind in MEDIA_OPTIONS}
    emptied = []
    for row, chat in enumerate(chats):
        messages = []
        for index, message in enumerate(chat):
            name = _message_name(row, index, batched)
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                parts = [_take_part(part, f"{name}.content[{at}]", media) for at, part in enumerate(content)]
                message = {**message, "content": parts}
            elif not isinstance(content, (str, type(None))):
                raise ValueError(f"{name}.content: expected a text or a list of parts, got {type(content).__name__}")
            messages.append(message)
        emptied.append(messages)
    return emptied, media


def _take_part(part: Any, name: str, media: dict[str, Media]) -> dict:
    if not isinstance(part, Mapping):
        raise ValueError(f"{name}: expected a mapping with a type, got {type(part).__name__}")
    kind = _kind(part)
    if kind is None:
        if not isinstance(part.get("text"), str):
            raise ValueError(
                f"{name}: expected a text, an image, a video or audio, got {sorted(part)} of type {part.get('type')!r}"
            )
        return dict(part)
    found = [part[key] for key in MEDIA_KEYS[kind] if part.get(key) is not None]
    if len(found) != 1:
        keys = ", ".join(MEDIA_KEYS[kind])
        raise ValueError(f"{name}: expected one {kind} under one of {keys}, got {len(found)}")
    item = found[0]
    if isinstance(item, Mapping):
        # of OpenAI: {"url": ...}, and sound in base64 as {"data": ..., "format": ...}
        item = next((item[key] for key in ("url", "data") if key in item), item)
    items = _FLATTEN[kind](item)
    if len(items) != 1:
        raise ValueError(f"{name}: expected one {kind}, got {len(items)}")
    media[kind].items += items
    media[kind].options.append({key: part[key] for key in MEDIA_OPTIONS[kind] if part.get(key) is not None})
    return {"type": kind}


def _kind(part: Mapping) -> str | None:
    """The medium that the chat template writes a placeholder for."""
    for kind in MEDIA_KEYS:
        if part.get("type") in (kind, f"{kind}_url", f"input_{kind}") or kind in part or f"{kind}_url" in part:
            return kind
    return None


class ControlTokens:
    """Marks tokens of a tokenizer where a user wrote them, so that they are encoded as plain text.

    Goes beyond `mark_control_tokens` of Transformers, which it uses: keys of mappings are marked as well (the template
    writes names of tool parameters), and a token does not arise where two texts meet.
    """

    def __init__(self, tokens: Iterable[str]):
        self._tokens = sorted(tokens, key=len, reverse=True)
        self._inside = re.compile("|".join(map(re.escape, self._tokens)))
        self._beginnings = tuple({token[:length] for token in self._tokens for length in range(1, len(token))})
        self._endings = tuple({token[length:] for token in self._tokens for length in range(1, len(token))})

    def mark(self, value: Any) -> Any:
        """`value` with marks in all of its strings; tuples become lists."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self._mark_key(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def _mark_text(self, text: str) -> str:
        marked = mark_control_tokens(text, self._inside)
        # a lone mark is dropped before encoding, but what stands behind it is encoded apart
        return marked + TEXT_END if marked.endswith(self._beginnings) else marked

    def _mark_key(self, key: Any) -> Any:
        if not isinstance(key, str):
            return key
        # marks of the user's own would hide what the key is without them
        key = key.replace(TEXT_START, "").replace(TEXT_END, "")
        marked = self._mark_text(key)
        # the chat template writes keys as <KEY> and </KEY>
        completes = marked.startswith(self._endings) or f"<{key}>" in self._tokens or f"</{key}>" in self._tokens
        return TEXT_END + marked if completes else marked


def mark_chats(tokenizer, chats: list[list[dict]], tools: list | None, variables: dict) -> tuple[list, list, dict]:
    """`chats`, `tools` and template variables with marks on every added token of `tokenizer` that they contain.

    In assistant messages the tokens that are not special (`<think>`, `<tool_call>`, ...) stay: models write them.
    """
    added = tokenizer.added_tokens_decoder.values()
    every = ControlTokens(token.content for token in added)
    special = ControlTokens(token.content for token in added if token.special)
    marked = [
        [(special if message.get("role") == "assistant" else every).mark(message) for message in chat]
        for chat in chats
    ]
    schemas = tools and [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]
    return marked, every.mark(schemas), every.mark(variables)
