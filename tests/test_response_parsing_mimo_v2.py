"""Answers read back: the rules on written examples, the chat template's inverse, and streams cut anywhere."""

import importlib.resources
import random
from enum import Enum

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from modeling_mimo.processors.response_parsing_mimo_v2 import (
    STOP_TOKENS,
    MiMoV2ResponseStreamParser,
    parse_response,
)


TEMPLATE = (importlib.resources.files("modeling_mimo") / "data" / "chat_template.jinja").read_text(encoding="utf-8")
CALL = "<tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</tool_call>"
COMPACT = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def message(content="", **fields):
    return {"role": "assistant", "content": content, **fields}


def collected(deltas):
    """The message that a client builds from deltas."""
    fields = {"content": ""}
    for delta in deltas:
        ((key, value),) = delta.items()
        assert value
        fields[key] = fields[key] + value if key in fields else value
    return fields


def streamed(chunks, **kwargs):
    parser = MiMoV2ResponseStreamParser(**kwargs)
    deltas = [delta for chunk in chunks for delta in parser.feed(chunk)]
    deltas += parser.close()
    assert parser.message == {"role": "assistant", **parser.message}
    shown = {key: value for key, value in parser.message.items() if key != "role"}
    if not shown.get("reasoning_content", True):
        del shown["reasoning_content"]
    assert collected(deltas) == shown
    return parser.message


FORMS = {
    "thinking": ("<think>R\n</think>C", message("C", reasoning_content="R\n")),
    "no thinking": ("C", message("C")),
    "empty thinking": ("<think></think>C", message("C")),
    "whitespace before thinking": ("\n <think>R</think>C", message("C", reasoning_content="R")),
    "whitespace before content": ("\n C", message("\n C")),
    "nothing": ("", message()),
    "whitespace alone": (" \n", message(" \n")),
    "thinking cut off": ("<think>R <tool_call>", message(reasoning_content="R <tool_call>")),
    "tag cut off": ("<think>R</thi", message(reasoning_content="R</thi")),
    "opening tag cut off": ("<thi", message("<thi")),
    "thinking inside thinking": ("<think>a<think>b</think>c", message("c", reasoning_content="a<think>b")),
    "thinking not at the start": ("a<think>b</think>c", message("a<think>b</think>c", reasoning_content="")),
    "one call": (f"C{CALL}", message("C", tool_calls=[call("f", a="1")])),
    "one call of V2.6": (f"C{COMPACT}", message("C", tool_calls=[call("f", a="1")])),
    "two calls": (CALL + COMPACT, message(tool_calls=[call("f", a="1")] * 2)),
    "whitespace around calls": (f"C\n\n{CALL}\n{CALL}\n", message("C\n\n", tool_calls=[call("f", a="1")] * 2)),
    "text between calls": (f"C{CALL} D\n{CALL}\nE", message("C D\n\nE", tool_calls=[call("f", a="1")] * 2)),
    "call without arguments": ("<tool_call><function=f></function></tool_call>", message(tool_calls=[call("f")])),
    "value as written": (
        "<tool_call><function=f><parameter=a>\n x </parameter><parameter=b></parameter></function></tool_call>",
        message(tool_calls=[call("f", a="\n x ", b="")]),
    ),
    "tags in a value": (
        CALL.replace(">1<", "><think>&</parameter>x </function> </tool_call> <parameter=<"),
        message(tool_calls=[call("f", a="<think>&</parameter>x </function> </tool_call> <parameter=")]),
    ),
    "call with two values of one name": (
        "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
        message(tool_calls=[call("f", a="2")]),
    ),
    "call in thinking": (f"<think>{CALL}</think>", message(reasoning_content=CALL)),
    "call cut off": (CALL[:-5], message(CALL[:-5])),
    "second call cut off": (CALL + CALL[:30], message(CALL[:30], tool_calls=[call("f", a="1")])),
    "call that is none": (
        f"Use <tool_call> so: {CALL}",
        message("Use <tool_call> so: ", tool_calls=[call("f", a="1")]),
    ),
    "call with text inside": (
        CALL.replace("<function", "x<function") + CALL,
        message(CALL.replace("<function", "x<function"), tool_calls=[call("f", a="1")]),
    ),
    "call without a name": (CALL.replace("=f", "="), message(CALL.replace("=f", "="))),
    "end of turn": ("<think>R</think>C<|im_end|><|endoftext|><|endoftext|>", message("C", reasoning_content="R")),
    "end of turn in thinking": ("<think>R<|im_end|>", message(reasoning_content="R")),
    "end of turn cut off": ("C<|im_en", message("C<|im_en")),
    "end of turn in a call": (CALL[:40] + "<|im_end|>", message(CALL[:40])),
    "end of audio": ("C<|mimo_audio_eod|>x", message("C")),
}


@pytest.mark.parametrize(("text", "expected"), FORMS.values(), ids=FORMS)
def test_each_form_is_read_as_documented(text, expected):
    assert parse_response(text) == expected


@pytest.mark.parametrize("text", [text for text, _ in FORMS.values()], ids=FORMS)
def test_every_cut_of_a_stream_gives_the_same(text):
    whole = parse_response(text)
    assert streamed(text) == whole
    for cut in range(len(text) + 1):
        assert streamed([text[:cut], text[cut:]]) == whole


class RandomAnswer:
    """Answers pieced together from tags, beginnings of tags and text, most of them malformed somewhere."""

    PIECES = (
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>",
        "<parameter=b>", "</parameter>", "\n", " ", "x", "<", "</", "<thi", "<tool_c", "</par", "<|im", CALL, COMPACT,
    )  # fmt: skip

    def __init__(self, seed):
        self.random = random.Random(seed)

    def text(self):
        start = self.random.choice(("", "<think>", "<think>R</think>", "<think></think>"))
        end = self.random.choice(("", "", *STOP_TOKENS))
        return start + "".join(self.random.choices(self.PIECES, k=self.random.randint(0, 14))) + end

    def cut(self, text):
        chunks = []
        while text:
            length = self.random.choice((1, 1, 2, 3, 5, 8, 20))
            chunks, text = [*chunks, text[:length]], text[length:]
        return chunks


def test_random_answers_in_random_chunks_equal_the_whole():
    called = 0
    for seed in range(1500):
        answer = RandomAnswer(seed)
        text = answer.text()
        whole = parse_response(text)
        called += "tool_calls" in whole
        assert streamed(answer.cut(text)) == whole, text
    assert called > 300


def test_nothing_is_lost_without_a_complete_call():
    checked = 0
    for seed in range(1500):
        text = RandomAnswer(seed).text()
        whole = parse_response(text)
        if "tool_calls" in whole:
            continue
        checked += 1
        end = min([text.index(token) for token in STOP_TOKENS if token in text], default=len(text))
        body = text[:end]
        if body.lstrip().startswith("<think>"):
            body = body.lstrip().removeprefix("<think>").replace("</think>", "", 1)
        assert whole.get("reasoning_content", "") + whole["content"] == body, text
    assert checked > 300


def test_a_beginning_of_a_tag_waits_until_it_is_none():
    parser = MiMoV2ResponseStreamParser()
    assert parser.feed("<thi") == []
    assert parser.feed("nk>a</") == [{"reasoning_content": "a"}]
    assert parser.feed("b") == [{"reasoning_content": "</b"}]
    assert parser.feed("</think>c<tool") == [{"content": "c"}]
    assert parser.feed("s<|im") == [{"content": "<tools"}]
    assert parser.feed("_end|>more") == []
    assert parser.feed("more") == parser.close() == []


def test_text_comes_as_soon_as_it_is_no_call_and_in_one_piece():
    parser = MiMoV2ResponseStreamParser()
    assert parser.feed("a<tool_call> x") == [{"content": "a<tool_call> x"}]
    assert parser.feed("<tool_call><function=f\n") == [{"content": "<tool_call><function=f\n"}]
    assert parser.feed("<tool_call><function=>") == [{"content": "<tool_call><function=>"}]
    assert parser.feed("<tool_call><function=f>\n<par") == []
    assert parser.feed("s") == [{"content": "<tool_call><function=f>\n<pars"}]


def test_a_call_comes_when_it_is_complete():
    parser = MiMoV2ResponseStreamParser()
    assert parser.feed(CALL[:-1]) == []
    assert parser.message == message()
    assert parser.feed(">") == [{"tool_calls": [call("f", a="1")]}]


def test_the_message_is_not_the_parsers_own():
    parser = MiMoV2ResponseStreamParser()
    parser.feed(CALL)
    parser.message["tool_calls"][0]["function"]["arguments"]["a"] = "changed"
    assert parser.message["tool_calls"] == [call("f", a="1")]


def test_what_the_prompt_began_belongs_to_the_message():
    prompt = "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    assert parse_response("b</think>c", prefix=prompt + "<think>a") == message("c", reasoning_content="ab")
    assert parse_response("c", prefix=prompt + "<think></think>") == message("c")
    assert parse_response("c", prefix=prompt + "<think>a</think>b") == message("bc", reasoning_content="a")
    # an older answer, or no answer
    assert parse_response("c", prefix=prompt + "<think>a</think>b<|im_end|>") == message("c")
    assert parse_response("c", prefix="<think>") == message("c")
    assert MiMoV2ResponseStreamParser(prefix=prompt + "<think>a").feed("b") == [{"reasoning_content": "b"}]


ROUND_TRIPS = [
    "<think>R</think>C",
    "<think></think>C",
    "<think></think>",
    "<think> R\n</think>\n\nC ",
    "<think>R</think>" + CALL,
    f"<think>R</think>Look:\n\n{CALL}{CALL}",
    "<think></think>" + CALL.replace(">1<", ">\n<b>1</b> & {'x'} </parameter> \n<"),
    "<think></think><tool_call>\n<function=f>\n</function>\n</tool_call>",
    "<think>a<think>b</think>c",
    "<think></think>a</think>b",
    "<think>R</think>cut <tool_call>\n<function=f>\n<param",
]


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_the_chat_template_writes_a_message_as_it_was_read(text):
    history = [{"role": "user", "content": "Q"}, parse_response(text + "<|im_end|>")]
    rendered, _ = render_jinja_template([history], chat_template=TEMPLATE)
    assert rendered[0].endswith(f"<|im_start|>assistant\n{text}<|im_end|>")


def test_random_messages_come_back_from_the_chat_template():
    for seed in range(300):
        rng = random.Random(seed)

        def text(words=("a", " ", "\n", "<b>", "</parameter>x", "<tool_call>", "{", "é", "<think>"), rng=rng):
            return "".join(rng.choices(words, k=rng.randint(0, 5)))

        calls = [call("f", **{f"k{i}": text() for i in range(rng.randint(0, 3))}) for _ in range(rng.randint(0, 3))]
        # a literal <tool_call> in the content is content again unless a function follows
        written = message(text(), **({"tool_calls": calls} if calls else {}))
        if reasoning := text():
            written["reasoning_content"] = reasoning
        rendered, _ = render_jinja_template([[{"role": "user", "content": "Q"}, written]], chat_template=TEMPLATE)
        assert parse_response(rendered[0].rpartition("<|im_start|>assistant\n")[2]) == written


def typed(value, schema, **parameters):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, **parameters}}
    text = CALL.replace(">1<", f">{value}<")
    return parse_response(text, [{"type": "function", "function": tool}])["tool_calls"][0]["function"]["arguments"][
        "a"
    ]


TYPES = [
    ("7", {"type": "integer"}, 7),
    (" -7\n", {"type": "integer"}, -7),
    ("7.0", {"type": "integer"}, 7),
    ("7.5", {"type": "integer"}, "7.5"),
    ("1_000", {"type": "integer"}, "1_000"),
    ("seven", {"type": "integer"}, "seven"),
    ("7", {"type": "number"}, 7),
    ("7.0", {"type": "number"}, 7.0),
    ("1e3", {"type": "number"}, 1000.0),
    ("nan", {"type": "number"}, "nan"),
    ("true", {"type": "boolean"}, True),
    ("False", {"type": "boolean"}, False),
    ("1", {"type": "boolean"}, "1"),
    ("[1, null]", {"type": "array"}, [1, None]),
    ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
    ("[1]", {"type": "object"}, "[1]"),
    ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
    ("7", {"type": "string"}, "7"),
    (" 7\n", {"type": "string"}, " 7\n"),
    ("null", {"type": "string"}, "null"),
    ("null", {"type": "null"}, None),
    ("None", {"type": ["string", "null"]}, None),
    ("null", {"type": "string", "nullable": True}, None),
    ("7", {"type": ["string", "integer"]}, "7"),
    ("7", {"type": ["integer", "string"]}, 7),
    ("x", {"type": ["integer", "string"]}, "x"),
    ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
    ("null", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
    ("[7]", {"oneOf": [{"type": "integer"}, {"type": "array"}]}, [7]),
    ("2", {"enum": [1, 2, "x"]}, 2),
    ("True", {"enum": [True]}, True),
    ("x", {"const": "x"}, "x"),
    ("7", {}, "7"),
    ("7", {"type": "unheard"}, "7"),
    ("7", True, "7"),
]


@pytest.mark.parametrize(("value", "schema", "expected"), TYPES)
def test_an_argument_gets_the_type_that_its_schema_names_and_its_text_fits(value, schema, expected):
    got = typed(value, schema)
    assert got == expected
    assert type(got) is type(expected)


def test_references_of_a_schema_are_followed():
    size = {"type": "integer"}
    assert typed("7", {"$ref": "#/$defs/Size"}, **{"$defs": {"Size": size}}) == 7
    assert typed("7", {"allOf": [{"$ref": "#/$defs/Size"}]}, **{"$defs": {"Size": size}}) == 7
    assert typed("7", {"$ref": "#/$defs/Missing"}) == "7"
    endless = {"anyOf": [{"$ref": "#/$defs/Json"}, {"type": "integer"}]}
    assert typed("7", {"$ref": "#/$defs/Json"}, **{"$defs": {"Json": endless}}) == 7


def test_tools_may_be_functions_and_other_tools_calls_stay_strings():
    def f(a: int):
        """
        Does it.

        Args:
            a: How often.
        """

    assert parse_response(CALL, [f])["tool_calls"] == [call("f", a=1)]
    assert parse_response(CALL.replace("=f", "=g"), [f])["tool_calls"] == [call("g", a="1")]
    assert parse_response(CALL.replace("=a", "=b"), [f])["tool_calls"] == [call("f", b="1")]
    assert streamed(CALL, tools=[f])["tool_calls"] == [call("f", a=1)]


@pytest.mark.parametrize("tool", [{"parameters": {}}, "f", None, Enum])
def test_a_tool_without_a_name_is_an_error(tool):
    with pytest.raises(ValueError, match=r"^tools\[0\]: expected a function or its JSON schema, got"):
        parse_response(CALL, [tool])
