"""The shipped chat template renders byte for byte what the released one renders.

`data/chat_renderings.json` holds texts that the template inside the released `tokenizer_config.json` of MiMo-V2.5
produced (transformers 5.23). Where that template itself lies beside the checkout, random conversations are compared as
well.
"""

import importlib.resources
import json
import random
from pathlib import Path

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template


ROOT = Path(__file__).resolve().parents[1]
RELEASED = ROOT / "../shared/reference/data/MiMo-V2.5/chat_template.from_tokenizer_config.jinja"
TEMPLATE = (importlib.resources.files("modeling_mimo") / "data" / "chat_template.jinja").read_text(encoding="utf-8")
RENDERINGS = json.loads((ROOT / "tests/data/chat_renderings.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "Hello"}


def render(messages, template=TEMPLATE, **kwargs):
    return render_jinja_template([messages], chat_template=template, **kwargs)[0][0]


def outcome(messages, template, **kwargs):
    """The rendered text, or the type of the error."""
    try:
        return render(messages, template, **kwargs)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("rendering", RENDERINGS, ids=lambda rendering: rendering["name"])
def test_golden_rendering(rendering):
    assert render(**rendering["kwargs"]) == rendering["text"]


def test_renders_the_same_without_block_trimming():
    # Not every server sets trim_blocks and lstrip_blocks as transformers does.
    environment = jinja2.Environment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(TEMPLATE)
    for rendering in RENDERINGS:
        if rendering["name"] != "older name of reasoning":  # transformers renames that field before it renders
            assert template.render(**rendering["kwargs"]) == rendering["text"], rendering["name"]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        pytest.param([], jinja2.UndefinedError, id="no messages"),
        pytest.param([USER, {"content": "x"}], jinja2.UndefinedError, id="no role"),
        pytest.param([{"role": None, "content": "x"}], TypeError, id="null role"),
        pytest.param([{"role": "user", "content": None}], TypeError, id="null content"),
        pytest.param([{"role": "system", "content": None}], TypeError, id="null system content"),
        pytest.param([{"role": "user", "content": 5}], TypeError, id="number content"),
        pytest.param([{"role": "user", "content": [None]}], TypeError, id="null part"),
    ],
)
def test_bad_messages_raise(messages, error):
    with pytest.raises(error):
        render(messages)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        pytest.param({"function": {"name": "f", "arguments": '{"a": 1}'}}, TypeError, id="arguments as JSON text"),
        pytest.param({"function": {"name": "f", "arguments": None}}, TypeError, id="null arguments"),
        pytest.param({"function": {"arguments": {}}}, jinja2.UndefinedError, id="no name"),
        pytest.param({"function": None}, jinja2.UndefinedError, id="null function"),
        pytest.param({"name": "f", "arguments": {1: 2}}, TypeError, id="number as argument name"),
    ],
)
def test_bad_tool_calls_raise(call, error):
    with pytest.raises(error):
        render([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])


class RandomChat:
    """Conversations with every member the template reads, now and then missing or of a wrong type."""

    TEXTS = (
        "", " ", "plain", "two\nlines\n", " padded ", "Köln 東京 👩‍🚀", "<think>", "</think>", "<think>a</think>b",
        "a</think>b<think>c</think>", "<|im_end|>", "image", "some text", "audio_url", "{{ x }}", "&<>\"'",
    )  # fmt: skip
    VALUES = (None, True, False, 0, 7, -1.5, 1.0, 1e30, [], {}, [1, "a", None], {"a": {"b": [True]}}, "image")

    def __init__(self, seed):
        self.random = random.Random(seed)

    def chance(self, probability):
        return self.random.random() < probability

    def text(self):
        return "".join(self.random.choices(self.TEXTS, k=self.random.randint(0, 3)))

    def value(self):
        return self.text() if self.chance(0.5) else self.random.choice(self.VALUES)

    def some(self, **members):
        """A mapping with most of `members`; a few of them get a random value."""
        chosen = {key: make for key, make in members.items() if self.chance(0.7)}
        return {key: self.value() if self.chance(0.04) else make() for key, make in chosen.items()}

    def part(self):
        if self.chance(0.5):
            return {"type": "text", "text": self.text()}
        kinds = ("text", "image", "audio", "video", "image_url", "audio_url", "video_url", "file")
        part = {self.random.choice(kinds): self.value() for _ in range(self.random.randint(0, 2))}
        return {"type": self.random.choice(kinds), **part} if self.chance(0.6) else part

    def content(self):
        if self.chance(0.6):
            return self.text()
        return [self.part() if self.chance(0.97) else self.value() for _ in range(self.random.randint(0, 4))]

    def tool_call(self):
        function = {"name": "f" + self.text(), "arguments": {self.text(): self.value() for _ in range(3)}}
        function = function if self.chance(0.9) else self.some(name=self.text, arguments=dict)
        return {"type": "function", "function": function} if self.chance(0.8) else function

    def tool_calls(self):
        return [self.tool_call() for _ in range(self.random.randint(0, 3))]

    def message(self):
        message = {"role": self.random.choice(("user", "assistant", "assistant", "tool", "tool", "system", "critic"))}
        if self.chance(0.97):
            message["content"] = self.content() if self.chance(0.99) else self.value()
        if self.chance(0.4):
            message["reasoning_content"] = self.text() if self.chance(0.9) else self.value()
        if self.chance(0.3):
            message["tool_calls"] = self.tool_calls() if self.chance(0.98) else self.value()
        if self.chance(0.01):
            message["role"] = self.value()
        return message

    def schema(self):
        return self.some(type=self.text, description=self.text, enum=lambda: [1, "a"], default=self.value, name=str)

    def parameters(self):
        return self.some(
            type=lambda: "object",
            properties=lambda: {self.text(): self.schema() for _ in range(self.random.randint(0, 3))},
            required=lambda: [self.text()],
            additionalProperties=lambda: False,
        )

    def tool(self):
        function = self.some(name=self.text, description=self.text, parameters=self.parameters, strict=lambda: True)
        return {"type": "function", "function": function, "extra": 1} if self.chance(0.8) else function

    def kwargs(self):
        kwargs = {"messages": [self.message() for _ in range(self.random.randint(1, 8))]}
        if self.chance(0.5):
            kwargs["messages"].insert(0, {"role": "system", "content": self.content()})
        if self.chance(0.4):
            kwargs["tools"] = [self.tool() for _ in range(self.random.randint(0, 3))]
        for switch in ("add_generation_prompt", "enable_thinking", "keep_all_reasoning"):
            if self.chance(0.6):
                kwargs[switch] = self.random.choice((True, False, False, None))
        if self.chance(0.05):
            kwargs["system_message"] = self.content()
        return kwargs


@pytest.mark.skipif(not RELEASED.is_file(), reason="the released chat template does not lie beside this checkout")
def test_random_conversations_equal_the_released_template():
    released = RELEASED.read_text(encoding="utf-8")
    texts = 0
    for seed in range(600):
        kwargs = RandomChat(seed).kwargs()
        expected = outcome(template=released, **kwargs)
        texts += isinstance(expected, str)
        assert outcome(template=TEMPLATE, **kwargs) == expected, f"seed {seed}: {kwargs}"
    # Most conversations must be valid, or the comparison would only be one of errors.
    assert texts > 300
