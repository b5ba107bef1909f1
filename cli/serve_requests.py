"""Chat requests of OpenAI's API read and checked: what the model gets, and what is refused. Knows no server."""

import json
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_mimo.messages_mimo_v2 import plain_message
from modeling_mimo.processors.chat_mimo_v2 import MEDIA_KEYS, part_options
from modeling_mimo.processors.response_parsing_mimo_v2 import parse_response


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# type of a part of content -> kind of medium
MEDIA_TYPES = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}

# fields that change nothing in the answer of this server
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# fields it cannot follow -> values with which there is nothing to follow
NEUTRAL = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
READ = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "tools",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "frequency_penalty",
    "logit_bias",
    "generation_config",
    "chat_template_kwargs",
    "reasoning_effort",
}
# name, what is expected, and whether a number is that
NUMBERS = (
    ("temperature", "0 or more", lambda value: value >= 0),
    ("top_p", "more than 0 and at most 1", lambda value: 0 < value <= 1),
    ("max_tokens", "an integer of at least 1", lambda value: isinstance(value, int) and value >= 1),
    ("max_completion_tokens", "an integer of at least 1", lambda value: isinstance(value, int) and value >= 1),
    ("seed", "an integer of 64 bits", lambda value: isinstance(value, int) and -(2**63) <= value < 2**63),
    # Transformers' server makes it a `repetition_penalty` of 1 more
    ("frequency_penalty", "more than -1 and at most 2", lambda value: -1 < value <= 2),
)


@dataclass(frozen=True)
class MediaPolicy:
    """Where media of a client may come from, besides its request.

    downloads: http(s) URLs. folder: file:// URLs of files in here; None: no files of this machine.
    """

    downloads: bool = True
    folder: Path | None = None

    def check(self, url: Any, name: str) -> str:
        """`url` if it may be opened. ValueError: anything else, above all a path of this machine."""
        if isinstance(url, str):
            if url.startswith("data:") or (self.downloads and url.startswith(("http://", "https://"))):
                return url
            if url.startswith("file://") and self.folder is not None:
                path = Path(urllib.request.url2pathname(url.removeprefix("file://"))).resolve()
                if path.is_relative_to(self.folder.resolve()):
                    return str(path)
        expected = ["a data URL", *(["an http(s) URL"] if self.downloads else [])]
        expected += ["a file URL in the media folder"] if self.folder is not None else []
        got = url if isinstance(url, str) else type(url).__name__
        raise ValueError(f"{name}: expected {' or '.join(expected)}, got {got[:60]!r}")


def check_fields(body: Mapping[str, Any]) -> None:
    """ValueError: an unknown field, or one that this server would have to ignore."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("body: expected text, got half of a surrogate pair") from None
    for name, value in body.items():
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                allowed = " or ".join(repr(neutral) for neutral in NEUTRAL[name])
                raise ValueError(f"{name}: expected {allowed}, the only choice of this server, got {value!r}")
        elif name not in READ | IGNORED:
            raise ValueError(f"{name}: expected a field that this server knows, got an unknown one")
    for name, expected, fits in NUMBERS:
        value = body.get(name)
        if value is not None and not (_is_number(value) and fits(value)):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    for name, kind in (("stream", bool), ("stream_options", dict)):
        if not isinstance(body.get(name), (kind, type(None))):
            raise ValueError(f"{name}: expected {kind.__name__}, got {body[name]!r}")
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, Mapping) or not all(key.isdecimal() and _is_number(bias[key]) for key in bias):
        raise ValueError(f"logit_bias: expected numbers by token ids, got {bias!r}")
    if body.get("seed") is not None and (not isinstance(body["seed"], int) or isinstance(body["seed"], bool)):
        raise ValueError(f"seed: expected an integer, got {body['seed']!r}")


def generation_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `body` for a GenerationConfig. ValueError: `generation_config` is not the JSON text of an object."""
    settings = {name: value for name, value in body.items() if name not in ("seed", "stop")}
    if settings.get("logit_bias"):
        settings["logit_bias"] = {token: float(value) for token, value in settings["logit_bias"].items()}
    given = settings.get("generation_config")
    if given is not None:
        try:
            is_object = isinstance(json.loads(given), dict)
        except (TypeError, ValueError):
            is_object = False
        if not is_object:
            raise ValueError(f"generation_config: expected the JSON text of an object, got {given!r}")
    return settings


def stop_strings(body: Mapping[str, Any]) -> list[str]:
    """ValueError: not a text or a list of texts."""
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop: expected a text or a list of texts, got {stop!r}")
    return stops


def template_variables(body: Mapping[str, Any], thinking: bool | None) -> dict[str, Any]:
    """Arguments of the chat template. `thinking` is the server's default; None: that of the template."""
    variables = {} if thinking is None else {"enable_thinking": thinking}
    if body.get("reasoning_effort") is not None:
        # the model knows no degrees
        variables["enable_thinking"] = body["reasoning_effort"] not in ("none", "minimal")
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"chat_template_kwargs: expected a mapping, got {given!r}")
    for name in given:
        if name not in ("enable_thinking", "keep_all_reasoning"):
            raise ValueError(f"chat_template_kwargs: expected enable_thinking or keep_all_reasoning, got {name!r}")
    return {**variables, **given}


def chat_tools(body: Mapping[str, Any]) -> list[dict] | None:
    """ValueError: a tool that is no function with a name."""
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return None
    if not isinstance(tools, list):
        raise ValueError(f"tools: expected a list, got {tools!r}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        schema = function.get("parameters") if isinstance(function, dict) else None
        properties = schema.get("properties") if isinstance(schema, dict) else None
        fits = isinstance(function, dict) and isinstance(function.get("name"), str)
        fits = fits and isinstance(schema, (dict, type(None))) and isinstance(properties, (dict, type(None)))
        if not fits or not all(isinstance(value, dict) for value in (properties or {}).values()):
            raise ValueError(f"tools[{index}]: expected a function with a name and a JSON schema, got {tool!r}")
    try:
        parse_response("", tools)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"tools: expected JSON schemas of parameters, got something else: {error}") from error
    return tools


def chat_messages(body: Mapping[str, Any], policy: MediaPolicy, has_senses: bool) -> list[dict[str, Any]]:
    """The conversation as `apply_chat_template` takes it. ValueError: one that cannot be used, by its indices."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list of at least one message, got none")
    return [_message(message, f"messages[{index}]", policy, has_senses) for index, message in enumerate(messages)]


def _message(message: Any, name: str, policy: MediaPolicy, has_senses: bool) -> dict[str, Any]:
    message = plain_message(message, name)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name}.role: expected one of {', '.join(ROLES)}, got {role!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{name}.content[{at}]", policy, has_senses) for at, part in enumerate(content)]
    elif not isinstance(content, (str, type(None))):
        raise ValueError(f"{name}.content: expected a text or a list of parts, got {type(content).__name__}")
    read = {"role": ROLES[role], "content": content or ""}
    if isinstance(message.get("reasoning_content"), str):
        read["reasoning_content"] = message["reasoning_content"]
    if message.get("tool_calls"):
        read["tool_calls"] = message["tool_calls"]
    return read


def _part(part: dict[str, Any], name: str, policy: MediaPolicy, has_senses: bool) -> dict[str, Any]:
    """A text, or `{"type": KIND, KIND: url, ...}` with the settings of the medium."""
    form = part.get("type")
    if form == "text" and isinstance(part.get("text"), str):
        part_options(part, "text", name)
        return {"type": "text", "text": part["text"]}
    if not isinstance(form, str) or form not in MEDIA_TYPES:
        raise ValueError(f"{name}.type: expected text or one of {', '.join(MEDIA_TYPES)}, got {form!r}")
    kind = MEDIA_TYPES[form]
    if not has_senses:
        raise ValueError(f"{name}: expected text, the served model neither sees nor hears, got {form}")
    options = part_options(part, kind, name)
    for key in MEDIA_KEYS[kind]:
        if key in part and key != form:
            raise ValueError(f"{name}.{key}: expected {form} alone, got {key} with it")
    value = part.get(form)
    if form == "input_audio" and isinstance(value, dict) and isinstance(value.get("data"), str):
        data = value["data"]
        url = data if data.startswith("data:") else f"data:audio/{value.get('format', 'wav')};base64,{data}"
    else:
        url = value.get("url") if isinstance(value, dict) else value
    for key, number in options.items():
        if key != "detail" and not _is_number(number):
            raise ValueError(f"{name}.{key}: expected a number, got {number!r}")
    return {"type": kind, kind: policy.check(url, f"{name}.{form}"), **options}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
