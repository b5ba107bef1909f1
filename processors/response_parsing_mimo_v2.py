"""MiMo-V2's answers read back: text as the model wrote it -> a message with reasoning, content and tool calls.

    <think>REASONING</think>CONTENT<tool_call>
    <function=NAME>
    <parameter=ARG>VALUE</parameter>
    </function>
    </tool_call>

V2.6 writes the same without newlines. One incremental parser serves streams and whole texts. Transformers' own, driven
by a `response_template`, is not used: it loses the text of a call that was cut off and rescans a long call per chunk.
"""

import copy
import json
import re
from collections.abc import Callable, Generator, Iterable
from inspect import isroutine
from typing import Any, NamedTuple

from transformers.utils import get_json_schema


# the tokens that end a turn (generation_config.json of the released repositories); whatever follows them is padding
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|mimo_audio_eod|>")

ASSISTANT_START = "<|im_start|>assistant\n"

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"([^<>\n]*)(>?)")
_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class MiMoV2ResponseStreamParser:
    """Reads an answer chunk by chunk; every cut of the same text gives the same message.

    tools: as `apply_chat_template` takes them (JSON schemas or functions). With them an argument gets the type that
        its schema names if its text fits, without them every argument is a string.
    prefix: the prompt before the answer. What it wrote of the answer belongs to the message, not to the deltas.
    stop_strings: texts that end the answer as a stop token does; what is left out begins with the first of them.

    - Reasoning stands between `<think>` at the start and the first `</think>`, or the end of the text.
    - A value is kept as written. It ends at the first `</parameter>` that `<parameter=` or `</function>` follows, with
      nothing but whitespace between. A parameter that comes twice keeps its last value.
    - A `<tool_call>` that is written in another way, or cut off, is content as it stands.
    - Text after a call continues the content. Dropped is only whitespace: before `<think>`, in a call outside its
      values, and alone after a call. The answer ends at the first of STOP_TOKENS.
    """

    def __init__(
        self, tools: Iterable[dict | Callable] | None = None, prefix: str = "", stop_strings: Iterable[str] = ()
    ):
        self._accepted = _accepted_by_tool(tools or ())
        self._stops = STOP_TOKENS
        # text that may be the beginning of a stop
        self._held = ""
        # text that is not yet part of the message: a call is read ahead of it
        self._text = ""
        self._ended = False
        self._message: dict[str, Any] = {"role": "assistant", "content": ""}
        self._deltas: list[dict[str, Any]] = []
        self._steps = self._read_message()
        _, opened, begun = prefix.rpartition(ASSISTANT_START)
        # a turn that is closed is an older answer
        if opened and not any(token in begun for token in STOP_TOKENS):
            self.feed(begun)
        self._stops = (*STOP_TOKENS, *stop_strings)

    @property
    def message(self) -> dict[str, Any]:
        """What has been read so far: `role`, `content`, and `reasoning_content` and `tool_calls` where there are any.

        It goes back into `apply_chat_template` as it is.
        """
        message = copy.deepcopy(self._message)
        if "</think>" in message["content"]:
            # an empty field keeps the chat template from cutting the content there
            message.setdefault("reasoning_content", "")
        return message

    @property
    def ended(self) -> bool:
        """Whether a stop has come, or `close` was called."""
        return self._ended

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Takes the next piece of the answer.

        Returns what it adds, in order, each a mapping with one key: `reasoning_content` or `content` with text to
        append, or `tool_calls` with a list of one complete call.
        """
        if self._ended:
            return []
        text = self._held + text
        stops = [text.index(token) for token in self._stops if token in text]
        self._ended = bool(stops)
        kept = min(stops) if stops else len(text) - _partial_length(text, self._stops)
        self._held = "" if stops else text[kept:]
        return self._advance(text[:kept])

    def close(self) -> list[dict[str, Any]]:
        """Ends the answer. Returns what that adds, as `feed` does; `message` is complete then."""
        held, self._held, self._ended = self._held, "", True
        return self._advance(held)

    def _advance(self, text: str) -> list[dict[str, Any]]:
        self._text += text
        # runs to where it needs more text
        next(self._steps, None)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _add(self, key: str, value: str | list[dict]) -> None:
        if not value:
            return
        self._message[key] = self._message[key] + value if key in self._message else value
        if self._deltas and key in self._deltas[-1]:
            value = self._deltas.pop()[key] + value
        self._deltas.append({key: value})

    # the generators below wait for more text at each `yield`

    def _read_message(self) -> Generator[None, None, None]:
        think = yield from self._next_tag(0, "<think>")
        if think is not None:
            self._text = self._text[think[1] :]
            yield from self._copy("reasoning_content", "</think>")
        while (yield from self._copy("content", "<tool_call>")):
            call = yield from self._read_call()
            if call is None:
                self._add("content", "<tool_call>")
                continue
            self._add("tool_calls", [call])
            another = yield from self._next_tag(0, "<tool_call>")
            if another is not None or not self._text.strip():
                self._text = self._text.lstrip()

    def _copy(self, key: str, tag: str) -> Generator[None, None, bool]:
        """Moves text up to `tag` to the message and drops the tag. False: the text ended before one came."""
        while tag not in self._text and not self._ended:
            kept = len(self._text) - _partial_length(self._text, (tag,))
            self._add(key, self._text[:kept])
            self._text = self._text[kept:]
            yield
        text, found, self._text = self._text.partition(tag)
        self._add(key, text)
        return bool(found)

    def _read_call(self) -> Generator[None, None, dict | None]:
        """The call whose `<tool_call>` stood before the text, taken from it; None: there is none, nothing is taken."""
        tag = yield from self._next_tag(0, "<function=")
        function = None if tag is None else (yield from self._read_name(tag[1]))
        if function is None:
            return None
        name, position = function
        arguments = {}
        while True:
            tag = yield from self._next_tag(position, "<parameter=", "</function>")
            if tag is None:
                return None
            if tag[0] == "</function>":
                break
            parameter = yield from self._read_name(tag[1])
            value = None if parameter is None else (yield from self._read_value(parameter[1]))
            if value is None:
                return None
            text, position = value
            arguments[parameter[0]] = text
        tag = yield from self._next_tag(tag[1], "</tool_call>")
        if tag is None:
            return None
        self._text = self._text[tag[1] :]
        accepted = self._accepted.get(name, {})
        typed = {key: _typed(text, accepted[key]) if key in accepted else text for key, text in arguments.items()}
        return {"type": "function", "function": {"name": name, "arguments": typed}}

    def _next_tag(self, start: int, *tags: str) -> Generator[None, None, tuple[str, int] | None]:
        """The one of `tags` that comes next from `start`, after whitespace, and where it ends."""
        longest = max(map(len, tags))
        while True:
            begin = _SPACE.match(self._text, start).end()
            ahead = self._text[begin : begin + longest]
            for tag in tags:
                if ahead.startswith(tag):
                    return tag, begin + len(tag)
            if self._ended or not any(tag.startswith(ahead) for tag in tags):
                return None
            yield

    def _read_name(self, start: int) -> Generator[None, None, tuple[str, int] | None]:
        """The name from `start` to the next `>`, and where the tag ends."""
        while True:
            match = _NAME.match(self._text, start)
            if match[1] and match[2]:
                return match[1], match.end()
            if self._ended or match.end() < len(self._text) or match[2]:
                return None
            yield

    def _read_value(self, start: int) -> Generator[None, None, tuple[str, int] | None]:
        """The value from `start` to its `</parameter>`, and where that tag ends."""
        closing = "</parameter>"
        searched = start
        while True:
            end = self._text.find(closing, searched)
            if end >= 0:
                position = end + len(closing)
                if (yield from self._next_tag(position, "<parameter=", "</function>")):
                    return self._text[start:end], position
                searched = end + 1
            elif self._ended:
                return None
            else:
                searched = max(start, len(self._text) - len(closing) + 1)
                yield


def parse_response(text: str, tools: Iterable[dict | Callable] | None = None, prefix: str = "") -> dict[str, Any]:
    """The message that `text`, a whole answer, stands for. Arguments and rules: `MiMoV2ResponseStreamParser`."""
    parser = MiMoV2ResponseStreamParser(tools, prefix)
    parser.feed(text)
    parser.close()
    return parser.message


def _partial_length(text: str, tags: Iterable[str]) -> int:
    """Length of the longest end of `text` with which one of `tags` begins."""
    longest = max(map(len, tags)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


class _Accepted(NamedTuple):
    """What a JSON schema lets an argument be: names of types in the order of the schema, and listed values."""

    types: tuple[str, ...]
    values: tuple[Any, ...]


def _accepted_by_tool(tools: Iterable[dict | Callable]) -> dict[str, dict[str, _Accepted]]:
    """Name of each tool -> name of each of its arguments -> what the argument may be."""
    accepted = {}
    for index, tool in enumerate(tools):
        tool = get_json_schema(tool) if isroutine(tool) else tool
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools[{index}]: expected a function or its JSON schema, got {tool!r}")
        parameters = function.get("parameters") or {}
        properties = parameters.get("properties") or {}
        accepted[function["name"]] = {
            name: _accepted(schema, parameters, frozenset()) for name, schema in properties.items()
        }
    return accepted


def _accepted(schema: Any, root: dict, seen: frozenset[str]) -> _Accepted:
    """`root` is where references ("#/$defs/NAME", as Pydantic writes them) lead; `seen` are those followed so far."""
    if not isinstance(schema, dict):
        return _Accepted((), ())
    declared = schema.get("type", ())
    types = (declared,) if isinstance(declared, str) else tuple(declared)
    types += ("null",) if schema.get("nullable") else ()
    values = (*schema.get("enum", ()), *([schema["const"]] if "const" in schema else []))
    choices = [choice for union in ("anyOf", "oneOf", "allOf") for choice in schema.get(union, ())]
    reference = schema.get("$ref")
    if reference is not None and reference not in seen:
        target = root
        for key in reference.split("/")[1:]:
            target = target.get(key, {})
        choices.append(target)
        seen = seen | {reference}
    for choice in choices:
        more = _accepted(choice, root, seen)
        types, values = types + more.types, values + more.values
    return _Accepted(types, values)


def _typed(text: str, accepted: _Accepted) -> Any:
    """Null, a listed value, or a value of the first type that `text` fits; else `text`."""
    if "null" in accepted.types and text.strip() in ("null", "None"):
        return None
    for value in accepted.values:
        # the chat template writes lists and mappings as JSON and other values as Python does
        if text in (str(value), json.dumps(value, ensure_ascii=False)):
            return value
    for name in accepted.types:
        try:
            return _CASTS[name](text)
        except (KeyError, ValueError):
            continue
    return text


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(text)
    # JSON Schema's integers include 3.0
    return int(text.partition(".")[0])


def _number(text: str) -> int | float:
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(text)
    return int(text) if _INTEGER.fullmatch(text.strip()) and "." not in text else float(text)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.strip().lower()]


def _json(text: str, kind: type) -> Any:
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


_CASTS: dict[str, Callable[[str], Any]] = {
    "string": str,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "array": lambda text: _json(text, list),
    "object": lambda text: _json(text, dict),
}
