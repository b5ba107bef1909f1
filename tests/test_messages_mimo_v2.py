"""Conversations come as whatever their messages come as: objects of clients, rows of datasets, odd parts."""

import base64
import dataclasses
import re
import warnings
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow
import pytest
import torch
from openai.types.chat import ChatCompletion
from PIL import Image
from pydantic import BaseModel, create_model
from transformers import AutoProcessor

from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.messages_mimo_v2 import plain_chats


MEDIA = Path(__file__).parents[1] / "examples" / "media"
CHART, SPEECH = str(MEDIA / "chart.png"), str(MEDIA / "speech.wav")
SMALL = {"max_pixels": 16384}
PNG = base64.b64encode((MEDIA / "chart.png").read_bytes()).decode()
WAV = base64.b64encode((MEDIA / "speech.wav").read_bytes()).decode()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("messages") / "omni", "tiny", vision=True, audio=True)
    return AutoProcessor.from_pretrained(folder)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def words(text):
    return {"type": "text", "text": text}


CALL = {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    user(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}, "max_pixels": 16384},
        words("Where?"),
    ),
    {"role": "assistant", "content": "I look.", "reasoning_content": "Oslo?", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0", "content": "12 degrees"},
    user(words("And now?")),
]


def as_dataclass(members):
    made = dataclasses.make_dataclass("Made", list(members))
    return made(**{name: converted(value, as_dataclass) for name, value in members.items()})


def as_pydantic(members):
    fields = {name: (Any, ...) for name in members}
    return create_model("Made", **fields)(**{name: converted(value, as_pydantic) for name, value in members.items()})


def as_user_dict(members):
    return UserDict({name: converted(value, as_user_dict) for name, value in members.items()})


def as_proxy(members):
    return MappingProxyType({name: converted(value, as_proxy) for name, value in members.items()})


def converted(value, form):
    """`value` with objects in the place of all mappings."""
    if isinstance(value, list):
        return [converted(item, form) for item in value]
    return form(value) if isinstance(value, Mapping) else value


FORMS = [as_dataclass, as_pydantic, as_user_dict, as_proxy]


def both(processor, conversation, **kwargs):
    """Text and inputs of a conversation."""
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", **SMALL, **kwargs
    )
    return processor.apply_chat_template(conversation, **kwargs), inputs


def assert_same(got, expected):
    assert got[0] == expected[0]
    assert got[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(got[1][name], tensor), name


# objects


@pytest.mark.parametrize("form", FORMS)
def test_objects_are_taken_in_every_place_and_in_batches(processor, form):
    expected = both(processor, CHAT)
    assert_same(both(processor, converted(CHAT, form)), expected)
    for place in range(len(CHAT)):
        chat = [converted(message, form) if at == place else message for at, message in enumerate(CHAT)]
        assert_same(both(processor, chat), expected)
    short = [{"role": "user", "content": "Hi"}]
    assert_same(both(processor, converted([short, CHAT], form)), both(processor, [short, CHAT]))
    assert_same(both(processor, (form(short[0]),)), both(processor, short))


def completion(**message):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    return ChatCompletion.model_validate(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "mimo", "choices": [choice]}
    )


def test_what_the_openai_client_returns_goes_back_into_the_conversation(processor):
    function = {"name": "weather", "arguments": '{"city": "Oslo", "days": null}'}
    calls = [{"id": "call_0", "type": "function", "function": function}]
    # tool results follow, so the call comes last in its turn
    for message in (
        {"content": "Hello"},
        {"content": "Hello", "reasoning_content": "Greet."},
        {"content": None, "tool_calls": calls},
        {"content": None, "reasoning_content": "Ask.", "tool_calls": calls},
    ):
        answer = completion(**message).choices[0].message
        plain = {"role": "assistant", **{key: value for key, value in message.items() if value is not None}}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for chat in ([user(words("Q")), answer], [answer], [[answer, user(words("Q"))], [user(words("Q"))]]):
                expected = converted_answers(chat, answer, plain)
                assert_same(both(processor, chat), both(processor, expected))
    text = processor.apply_chat_template([user(words("Q")), answer])
    assert "<think>Ask.</think><tool_call>\n<function=weather>\n<parameter=city>Oslo</parameter>" in text
    assert "<parameter=days>None</parameter>" in text


def converted_answers(chat, answer, plain):
    if isinstance(chat, list):
        return [converted_answers(item, answer, plain) for item in chat]
    return plain if chat is answer else chat


def test_pictures_in_objects_are_not_copied(processor):
    class Part(BaseModel, arbitrary_types_allowed=True):
        type: str = "image"
        image: Image.Image

    @dataclasses.dataclass
    class Message:
        content: list
        role: str = "user"

    with Image.open(CHART) as picture:
        (((message,),), batched) = plain_chats([Message([Part(image=picture)])])
        assert not batched
        assert message["content"][0]["image"] is picture


class Stranger:
    role, content = "user", "Hi"


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([Stranger()], r"messages\[0\]: expected a mapping, a dataclass or a pydantic model, got Stranger"),
        ([user(), Stranger()], r"messages\[1\]: expected a mapping, a dataclass or a pydantic model, got Stranger"),
        ([user(), [user()]], r"messages\[1\]: expected a mapping, a dataclass or a pydantic model, got list"),
        ([[user()], [user(), Stranger()]], r"messages\[1\]\[1\]: expected a mapping, .* got Stranger"),
        ([[user()], user()], r"messages\[1\]: expected a list of messages, got dict"),
        ([as_dataclass], r"messages\[0\]: expected a mapping, .* got function"),
        ([Stranger], r"messages\[0\]: expected a mapping, .* got type"),
        (["Hi"], r"messages\[0\]: expected a mapping, .* got str"),
        ([None], r"messages\[0\]: expected a mapping, .* got NoneType"),
        ([user(words("a"), Stranger())], r"messages\[0\]\.content\[1\]: expected a mapping with a type, got Stranger"),
        (
            [{"role": "assistant", "tool_calls": [CALL, Stranger()]}],
            r"messages\[0\]\.tool_calls\[1\]: expected a call of a function, got Stranger",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": Stranger()}]}],
            r"messages\[0\]\.tool_calls\[0\]: expected a call of a function, got Stranger",
        ),
        ([], r"conversation: expected at least one message, got none"),
        ([[user()], []], r"messages\[1\]: expected at least one message, got none"),
        ([[]], r"messages\[0\]: expected at least one message, got none"),
        ("Hi", r"conversation: expected a list of messages, got str"),
        (user(), r"conversation: expected a list of messages, got dict"),
        (None, r"conversation: expected a list of messages, got NoneType"),
    ],
)
def test_what_is_no_conversation_is_named_in_one_line(processor, conversation, message, tokenize):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        processor.apply_chat_template(conversation, tokenize=tokenize)


# None


def rows(messages):
    """`messages` as a dataset gives them back: with None for all keys of the others."""
    return pyarrow.array(messages).to_pylist()


def test_rows_of_a_dataset_are_what_was_written(processor):
    chat = [
        user({"type": "image", "image": CHART, "max_pixels": 16384}, words("Which bar?")),
        {"role": "assistant", "content": [words("It is")], "reasoning_content": "Look."},
        user({"type": "image_url", "image_url": {"url": CHART}}, {"type": "image_url", "image_url": {"url": CHART}}),
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": [words("12")]},
    ]
    read = rows(chat)
    assert read[0]["content"][1] == {"type": "text", "text": "Which bar?", "image": None, "max_pixels": None} | {
        "image_url": None
    }
    assert_same(both(processor, read), both(processor, chat))
    assert "Which bar?" in processor.apply_chat_template(read)


@pytest.mark.parametrize("form", [dict, *FORMS])
def test_none_in_any_place_is_an_absent_key(processor, form):
    expected = both(processor, CHAT)

    def filled(value):
        """With None under every key that has a meaning here and is not there."""
        if isinstance(value, list):
            return [filled(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = {"image", "text", "url", "detail", "fps", "tool_calls", "reasoning_content", "name", "function", "foo"}
        absent = dict.fromkeys(keys - value.keys())
        return value if "city" in value else absent | {key: filled(member) for key, member in value.items()}

    assert_same(both(processor, converted(filled(CHAT), form)), expected)


def test_none_in_arguments_and_results_is_data(processor):
    call = {"name": "f", "arguments": {"a": None, "b": [None, {"c": None}]}}
    chat = [user(words("Q")), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": '{"a": null}'}]
    for conversation in (chat, *(converted(chat, form) for form in FORMS)):
        text = processor.apply_chat_template(conversation)
        assert '<parameter=a>None</parameter>\n<parameter=b>[null, {"c": null}]</parameter>' in text
        assert '<tool_response>\n{"a": null}\n</tool_response>' in text
    assert chat[1]["tool_calls"][0]["arguments"] == {"a": None, "b": [None, {"c": None}]}


# text and tokens


def said(role, content, **members):
    return [user(words("Q")), {"role": role, "content": content, **members}]


def calling(*calls):
    return [user(words("Q")), {"role": "assistant", "content": "", "tool_calls": list(calls)}]


IMAGE = {"type": "image", "image": CHART}
ODD = {
    "plain string part": [user("hello")],
    "number part": [user(5)],
    "None part": [user(None)],
    "list part": [user([words("a")])],
    "empty part": [user({})],
    "type alone": [user({"type": "text"})],
    "text None": [user({"type": "text", "text": None})],
    "text number": [user({"type": "text", "text": 5})],
    "text list": [user({"type": "text", "text": ["a"]})],
    "text under content": [user({"type": "text", "content": "x"})],
    "text without type": [user({"text": "x"})],
    "text of Responses": [user({"type": "input_text", "text": "x"})],
    "text with an image": [user({"type": "text", "text": "x", "image": CHART})],
    "text with an empty image": [user({"type": "text", "text": "x", "image": None})],
    "text to be cached": [user({"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}})],
    "image without type": [user({"image": CHART})],
    "image url without type": [user({"image_url": {"url": CHART}})],
    "image of OpenAI": [user({"type": "image_url", "image_url": {"url": CHART, "detail": "low"}})],
    "image of Responses": [user({"type": "input_image", "image_url": CHART, "detail": "high"})],
    "image url elsewhere": [user({"type": "image_url", "url": CHART})],
    "image with text": [user({**IMAGE, "text": "lost"})],
    "image with a video": [user({**IMAGE, "video": "clip.mp4"})],
    "two images": [user({"type": "image", "image": [CHART, CHART]})],
    "image twice": [user({**IMAGE, "url": CHART})],
    "no image in a list": [user({"type": "image", "image": []})],
    "image in an empty mapping": [user({"type": "image_url", "image_url": {}})],
    "image in a mapping of None": [user({"type": "image_url", "image_url": {"url": None}})],
    "image in another mapping": [user({"type": "image", "image": {"source": CHART}})],
    "image of a dataset": [user({"type": "image", "image": {"bytes": b"x", "path": None}})],
    "unknown detail": [user({"type": "image_url", "image_url": {"url": CHART, "detail": "fine"}})],
    "unknown key": [user({**IMAGE, "max_pixel": 1})],
    "unknown type": [user({"type": "imge", "image": CHART})],
    "file": [user({"type": "file", "file": {"file_id": "x"}})],
    "refusal": said("assistant", [{"type": "refusal", "refusal": "no"}]),
    "type of its own": [user({"type": ["text"], "text": "x"})],
    "sound of OpenAI": [user({"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}, words("?"))],
    "sound without type": [user({"input_audio": {"data": WAV, "format": "wav"}})],
    "sound twice": [user({"type": "audio", "audio": {"url": SPEECH, "data": WAV}})],
    "format of a URL": [user({"type": "audio", "audio": {"url": SPEECH, "format": "wav"}})],
    "Qwen's size": [user({**IMAGE, "resized_height": 64, "resized_width": 64})],
    "content mapping": said("user", {"type": "text", "text": "x"}),
    "content number": said("user", 5),
    "content None": said("assistant", None),
    "no content": [user(words("Q")), {"role": "assistant"}],
    "empty content": [user()],
    "tool mapping": said("tool", {"a": 1}),
    "tool number": said("tool", 1),
    "tool None": said("tool", None),
    "tool media": said("tool", [IMAGE]),
    "no role": [{"content": "x"}],
    "role None": said(None, "x"),
    "role number": said(5, "x"),
    "unknown role": said("critic", "x"),
    "calls of nothing": calling({}),
    "call without a name": calling({"function": {"arguments": "{}"}}),
    "call without arguments": calling({"function": {"name": "f"}}),
    "arguments None": calling({"function": {"name": "f", "arguments": None}}),
    "arguments in a list": calling({"function": {"name": "f", "arguments": [1]}}),
    "number as the name of an argument": calling({"function": {"name": "f", "arguments": {1: 2}}}),
    "number as a key": [user({"type": "imge", 1: 2})],
    "broken arguments": calling({"function": {"name": "f", "arguments": "{"}}),
    "custom call": calling({"type": "custom", "custom": {"name": "f", "input": "x"}}),
    "calls in a text": said("assistant", "", tool_calls="f()"),
    "calls in a mapping": said("assistant", "", tool_calls={"name": "f"}),
    "function None": calling({"name": "f", "arguments": {}, "function": None}),
    "call is a text": calling("f()"),
}


# the others are refused
TAKEN = {
    "text without type",
    "text of Responses",
    "text with an empty image",
    "text to be cached",
    "image without type",
    "image url without type",
    "image of OpenAI",
    "image of Responses",
    "image url elsewhere",
    "type of its own",
    "sound of OpenAI",
    "sound without type",
    "content None",
    "no content",
    "empty content",
    "tool None",
    "tool media",
    "unknown role",
    "call without arguments",
    "arguments None",
    "function None",
}


def outcome(run):
    """A text, or the error."""
    try:
        return run()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("name", ODD)
def test_odd_messages_are_the_same_text_or_the_same_error_in_both_forms(processor, name):
    def tokenized():
        ids = processor.apply_chat_template(ODD[name], tokenize=True, **SMALL)[0]
        # a medium is as many tokens as it needs
        return re.sub(r"(<\|(image|audio)_pad\|>)+", r"\1", processor.tokenizer.decode(ids))

    got = outcome(lambda: processor.apply_chat_template(ODD[name]))
    assert outcome(tokenized) == got
    assert got.startswith("<|im_start|>" if name in TAKEN else "ValueError messages[")
    assert name in TAKEN or "\n" not in got


def test_a_medium_without_data_is_a_placeholder_in_text_alone(processor):
    """As users of Transformers write it, who hand the pictures to the call."""
    chat = [user({"type": "image"}, {"type": "image_url", "image_url": None}, {"type": "video"}, {"type": "audio"})]
    text = processor.apply_chat_template(chat)
    assert [text.count(f"<|{kind}_pad|>") for kind in ("image", "video", "audio")] == [2, 1, 1]
    with pytest.raises(ValueError, match=r"^messages\[0\]\.content\[0\]: expected one image under one of .*, got 0$"):
        processor.apply_chat_template(chat, tokenize=True)


def test_a_template_of_the_users_may_show_the_media_of_a_text(processor):
    part = "{{ part.type }}={{ part.url or part.image or part.text }} "
    template = f"{{% for part in messages[0].content %}}{part}{{% endfor %}}"
    chat = [user(IMAGE, {"type": "image_url", "image_url": {"url": CHART}}, words("Which?"))]
    for conversation in (chat, converted(chat, as_dataclass)):
        shown = processor.apply_chat_template(conversation, chat_template=template)
        assert shown == f"image={CHART} image={CHART} text=Which? "
