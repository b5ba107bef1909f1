"""Conversations before they are rendered: media taken out of the messages, control tokens in texts marked as text."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END as TEXT_END
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_START as TEXT_START
from transformers.utils.chat_template_utils import mark_control_tokens

from modeling_mimo.messages_mimo_v2 import message_name
from modeling_mimo.unknown_names_mimo_v2 import unknown_name

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
    "image": ("min_pixels", "max_pixels", "detail"),
    "video": (
        "fps",
        "num_frames",
        "min_frames",
        "max_frames",
        "min_pixels",
        "max_pixels",
        "total_max_pixels",
        "start",
        "end",
    ),
    "audio": ("start", "end", "sampling_rate"),
}
# what Qwen's users call them
OPTION_ALIASES = {
    "image": {},
    "video": {"nframes": "num_frames", "video_start": "start", "video_end": "end"},
    "audio": {},
}
# a mapping in the place of a medium: key that holds it -> keys that may stand beside it. `format` and `path` say what
# the medium says itself
NESTED_KEYS = {
    "image": {"url": ("detail",), "data": ("detail",)},
    "audio": {"url": (), "data": ("format",), "array": ("sampling_rate", "path"), "audio_codes": ()},
    "video": {"url": (), "data": ()},
}
DETAILS = ("auto", "low", "high", "original")
# how OpenAI's and Anthropic's clients mark a prefix to be cached, which changes no answer
CACHE_MARKS = ("cache_control", "prompt_cache_breakpoint")
# names of Qwen's that have no equal here -> what to use
_NO_EQUAL = dict.fromkeys(
    ("resized_height", "resized_width"),
    "expected `max_pixels` and `min_pixels`, bounds of height x width at the image's own aspect ratio, got a side",
)
_FLATTEN = {"image": flatten_images, "video": flatten_videos, "audio": flatten_audio}


@dataclass
class Media:
    """The media of one kind in the order of their placeholders, and the settings that come with each."""

    items: list[Any] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)


def take_media(
    chats: list[list[dict]], batched: bool, as_text: bool = False
) -> tuple[list[list[dict]], dict[str, Media]]:
    """Chats whose media parts only say their kind, and the media. `chats`, of `plain_chats`, stay as they are.

    as_text: for text alone: parts have their media beside the kind, which a template may show, and a medium may come
        without data, a placeholder for one that comes later.

    ValueError: a message without a role, a part that is neither text nor a medium, a medium without data or with
    more than one, a key of a part that nobody reads.
    """
    media = {kind: Media() for kind in MEDIA_OPTIONS}
    emptied = []
    for row, chat in enumerate(chats):
        messages = []
        for index, message in enumerate(chat):
            name = message_name(row, index, batched)
            if not isinstance(message.get("role"), str):
                raise ValueError(f"{name}.role: expected a text, got {type(message.get('role')).__name__}")
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                parts = [_take_part(part, f"{name}.content[{at}]", media, as_text) for at, part in enumerate(content)]
                message = {**message, "content": parts}
            elif not isinstance(content, (str, type(None))):
                raise ValueError(f"{name}.content: expected a text or a list of parts, got {type(content).__name__}")
            messages.append(message)
        emptied.append(messages)
    return emptied, media


def _take_part(part: Mapping, name: str, media: dict[str, Media], as_text: bool) -> dict:
    kind = part_kind(part, name)
    options = part_options(part, kind, name)
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    found = [key for key in MEDIA_KEYS[kind] if key in part]
    if len(found) > 1 or not (found or as_text):
        keys = ", ".join(MEDIA_KEYS[kind])
        raise ValueError(f"{name}: expected one {kind} under one of {keys}, got {len(found)}")
    if not found:
        return {"type": kind}
    key = found[0]
    item = part[key]
    if isinstance(item, Mapping):
        # of OpenAI: {"url": ...}, and sound in base64 as {"data": ..., "format": ...}
        item = next((item[name] for name in ("url", "data") if name in item), item)
    items = _FLATTEN[kind](item)
    if len(items) != 1:
        raise ValueError(f"{name}: expected one {kind}, got {len(items)}")
    media[kind].items += items
    media[kind].options.append(options)
    # by the names that Transformers shows templates
    return {"type": kind, "url" if key == f"{kind}_url" else key: item} if as_text else {"type": kind}


def part_kind(part: Mapping, name: str) -> str:
    """What a part of content is: "text", or a kind of medium. ValueError: neither."""
    form = part.get("type")
    for kind, keys in MEDIA_KEYS.items():
        forms = (kind, f"{kind}_url", f"input_{kind}")
        if form in forms or (form is None and any(key in part for key in (*forms, *keys[:2]))):
            return kind
    if isinstance(part.get("text"), str):
        return "text"
    known = {key for kind in ("text", *MEDIA_KEYS) for key in _known_keys(kind)}
    for key in part:
        if form in (None, "text") and key not in known:
            raise ValueError(f"{name}: {unknown_name(str(key), known, 'a key of a part of content')}")
    raise ValueError(
        f"{name}: expected a text, an image, a video or audio, got {sorted(map(str, part))} of type {form!r}"
    )


def _known_keys(kind: str) -> tuple[str, ...]:
    if kind == "text":
        return ("type", "text", *CACHE_MARKS)
    return ("type", *MEDIA_KEYS[kind], *MEDIA_OPTIONS[kind], *OPTION_ALIASES[kind], *CACHE_MARKS)


def part_options(part: Mapping, kind: str, name: str) -> dict[str, Any]:
    """The settings that a part of content has for its medium, by the processor's names.

    ValueError: a key that nobody reads, in the part or in a mapping in the place of its medium; a setting twice.
    """
    _check_keys(part, _known_keys(kind), name, f"a key of parts of type {kind}")
    if kind == "text":
        return {}
    settings = [(f"{name}.{key}", OPTION_ALIASES[kind].get(key, key), value) for key, value in part.items()]
    for key in MEDIA_KEYS[kind]:
        item = part.get(key)
        if isinstance(item, Mapping):
            _check_nested(item, NESTED_KEYS[kind], f"{name}.{key}")
            settings += [(f"{name}.{key}.detail", "detail", item["detail"])] if "detail" in item else []
    options = {}
    for place, option, value in settings:
        if option in options:
            raise ValueError(f"{place}: expected {option} once, got it twice")
        if option == "detail" and value not in DETAILS:
            raise ValueError(f"{place}: expected one of {', '.join(DETAILS)}, got {value!r}")
        if option in MEDIA_OPTIONS[kind]:
            options[option] = value
    return options


def _check_nested(item: Mapping, forms: dict[str, tuple[str, ...]], name: str) -> None:
    _check_keys(item, {*forms, *(key for beside in forms.values() for key in beside)}, name, "a key of this mapping")
    found = [key for key in forms if key in item]
    if len(found) != 1:
        raise ValueError(f"{name}: expected one of {', '.join(forms)}, got {', '.join(map(str, item)) or 'none'}")
    _check_keys(item, (found[0], *forms[found[0]]), name, f"a key that stands beside `{found[0]}`")


def _check_keys(found: Iterable, known: Iterable[str], name: str, what: str) -> None:
    for key in found:
        if key in _NO_EQUAL:
            raise ValueError(f"{name}: `{key}`: {_NO_EQUAL[key]}")
        if key not in known:
            raise ValueError(f"{name}: {unknown_name(str(key), known, what)}")


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
