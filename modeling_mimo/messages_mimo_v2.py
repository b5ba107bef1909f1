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
"""Conversations as plain mappings, whatever objects their messages come as."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


def plain_chats(conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
    """A conversation, or a batch of them, as chats of plain messages, and whether it is a batch.

    Messages, parts of content, what stands in these, and calls of tools may be mappings of any kind, dataclasses, or
    models of pydantic (or whatever has `model_dump`). A key that holds None is left out: datasets fill rows with None
    for the keys that other rows have. Only arguments of calls keep theirs, which are data; JSON text, as OpenAI has
    it, becomes the mapping that the chat template needs.

    ValueError: nothing to read, an object of another kind, a call without a name or arguments, by its place.
    """
    if not _is_list(conversation):
        raise ValueError(f"conversation: expected a list of messages, got {type(conversation).__name__}")
    if not conversation:
        raise ValueError("conversation: expected at least one message, got none")
    batched = _is_list(conversation[0])
    chats = []
    for row, chat in enumerate(conversation if batched else [conversation]):
        if not _is_list(chat):
            raise ValueError(f"messages[{row}]: expected a list of messages, got {type(chat).__name__}")
        if not chat:
            raise ValueError(f"messages[{row}]: expected at least one message, got none")
        chats.append([plain_message(message, message_name(row, at, batched)) for at, message in enumerate(chat)])
    return chats, batched


def message_name(row: int, index: int, batched: bool) -> str:
    """What errors call a message."""
    return f"messages[{row}][{index}]" if batched else f"messages[{index}]"


def plain_message(message: Any, name: str) -> dict[str, Any]:
    """One message as `plain_chats` gives it, which errors call `name`."""
    plain = _members(message, name, "a mapping, a dataclass or a pydantic model")
    if _is_list(plain.get("content")):
        parts = enumerate(plain["content"])
        plain["content"] = [_plain_part(part, f"{name}.content[{index}]") for index, part in parts]
    if "tool_calls" in plain:
        name = f"{name}.tool_calls"
        if not _is_list(plain["tool_calls"]):
            raise ValueError(f"{name}: expected a list of calls, got {type(plain['tool_calls']).__name__}")
        plain["tool_calls"] = [_plain_call(call, f"{name}[{at}]") for at, call in enumerate(plain["tool_calls"])]
    return plain


def _plain_part(part: Any, name: str) -> dict[str, Any]:
    # {"image_url": {"url": ...}}, while pictures and sounds in memory stay what they are
    return {
        key: value if (members := _raw_members(value)) is None else _without_none(members)
        for key, value in _members(part, name, "a mapping with a type").items()
    }


def _plain_call(call: Any, name: str) -> dict[str, Any]:
    plain = _members(call, name, "a call of a function")
    if "function" in plain:
        return {**plain, "function": _plain_call(plain["function"], name)}
    if not isinstance(plain.get("name"), str):
        raise ValueError(f"{name}: expected a function with a name, got {sorted(map(str, plain))}")
    arguments = _plain_data(plain.get("arguments", {}))
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(f"{name}: expected arguments as a mapping or its JSON text, got {arguments!r}")
    return {**plain, "arguments": arguments}


def _plain_data(value: Any) -> Any:
    """`value` as mappings, lists and what else JSON knows."""
    if (members := _raw_members(value)) is not None:
        return {key: _plain_data(member) for key, member in members.items()}
    return [_plain_data(item) for item in value] if _is_list(value) else value


def _members(value: Any, name: str, expected: str) -> dict[str, Any]:
    members = _raw_members(value)
    if members is None:
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    return _without_none(members)


def _raw_members(value: Any) -> dict[str, Any] | None:
    """One level of an object with named members; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, type):
        return None
    # `dataclasses.asdict` would copy pictures and sounds
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.model_dump() if callable(getattr(value, "model_dump", None)) else None


def _without_none(members: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in members.items() if value is not None}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
