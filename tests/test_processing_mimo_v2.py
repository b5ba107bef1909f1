"""MiMoV2Processor on real files: where it comes from, what it makes of conversations, and what it refuses."""

import copy
import json
import logging
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from patience import PATIENCE
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, pipeline
from transformers.utils import logging as transformers_logging

from modeling_mimo import MiMoV2Config
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.conversion.small_tokenizer import build_small_tokenizer
from modeling_mimo.processors import MiMoV2ImageProcessor, MiMoV2Processor, MiMoV2VideoProcessor


RENDERINGS = json.loads((Path(__file__).parent / "data/chat_renderings.json").read_text(encoding="utf-8"))
# "Hello" without thinking in ids of the released tokenizer, as a server of the released model counted them
HELLO_IDS = (
    "151644 8948 198 2610 525 20740 25612 11 264 10950 15235 17847 44936 553 71449 13 151645 151644 872 198 9707 "
    "151645 151644 77091 198 151667 151668"
)
FIRST_ADDED_ID = 151643
MODEL_INPUTS = {
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small checkpoint as released: no file of a processor of its own, but a stub that names Qwen's."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("released") / "mimo", "tiny", vision=True)
    assert json.loads((folder / "preprocessor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    assert not (folder / "processor_config.json").exists()
    return folder


@pytest.fixture(scope="module")
def processor(released):
    return MiMoV2Processor.from_pretrained(released)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two images and two videos as files, none like another."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, size in {"wide.png": (160, 96), "tall.jpg": (100, 130)}.items():
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
    for name, seconds, (width, height) in (("long.mp4", 5, (96, 64)), ("short.mp4", 2, (64, 128))):
        with av.open(str(folder / name), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(seconds * 10):
                frame = np.full((height, width, 3), index * 4, dtype=np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            file.mux(stream.encode())
    return folder


def user(*parts):
    return {"role": "user", "content": list(parts) if parts and isinstance(parts[0], dict) else parts[0]}


def text(words):
    return {"type": "text", "text": words}


def image(path, **options):
    return {"type": "image", "image": str(path), **options}


def video(path, **options):
    return {"type": "video", "video": str(path), **options}


def chat_inputs(processor, conversation, **kwargs):
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def pieces(processor, ids):
    """Added tokens one by one, and the text between them."""
    added = processor.tokenizer.added_tokens_decoder
    found = []
    for token in torch.as_tensor(ids).tolist():
        if token in added:
            found.append(str(added[token]))
        elif found and isinstance(found[-1], list):
            found[-1].append(token)
        else:
            found.append([token])
    return [piece if isinstance(piece, str) else processor.tokenizer.decode(piece) for piece in found]


def added_ids(processor, ids):
    return [
        token for token in torch.as_tensor(ids).flatten().tolist() if token in processor.tokenizer.added_tokens_decoder
    ]


# where a processor comes from


def test_auto_processor_returns_it_for_a_released_folder(released, tmp_path):
    assert type(AutoProcessor.from_pretrained(released)) is MiMoV2Processor
    assert type(AutoProcessor.from_pretrained(str(released), trust_remote_code=True)) is MiMoV2Processor
    config = MiMoV2Config.from_pretrained(released)
    assert type(AutoProcessor.from_pretrained(released, config=config)) is MiMoV2Processor
    root, name = released.parent, released.name
    assert type(AutoProcessor.from_pretrained(root, subfolder=name)) is MiMoV2Processor
    # with a config, the folder needs a tokenizer only
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(released / file, tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path, config=config)) is MiMoV2Processor


def test_auto_processor_returns_it_for_what_save_pretrained_wrote(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MiMoV2Processor
    shutil.copy(Path(processor.tokenizer.name_or_path) / "config.json", tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is MiMoV2Processor


def test_a_checkpoint_for_text_has_a_tokenizer_only(checkpoints, released, tmp_path):
    for name in ("fp8_fused", "fp8_split"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(checkpoints[name] / "config.json", folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(released / file, folder)
        assert isinstance(AutoProcessor.from_pretrained(folder), PreTrainedTokenizerBase)
        with pytest.raises(ValueError, match=r"expected `processor_config` in config.json.*use AutoTokenizer"):
            MiMoV2Processor.from_pretrained(folder)


OTHERS = """
import logging, sys, warnings
{imports}
from transformers import AutoProcessor
for folder in sys.argv[1:]:
    try:
        print(type(AutoProcessor.from_pretrained(folder)).__name__)
    except Exception as error:
        print(type(error).__name__, str(error).strip().splitlines()[0])
"""


def test_other_models_get_what_they_get_without_this_package(released, tmp_path):
    tokenizer = build_small_tokenizer(512)
    for name, model_type, named in (
        ("qwen", "qwen2_vl", "Qwen2VLProcessor"),
        ("llava", "llava", "LlavaProcessor"),
        ("unnamed", "llava", None),
        ("bert", "bert", None),
        ("unknown", "unheard_of", "Qwen2_5_VLProcessor"),
    ):
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        if model_type != "bert":
            stub = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}}
            stub |= {"processor_class": named} if named else {}
            (folder / "preprocessor_config.json").write_text(json.dumps(stub))
    (tmp_path / "empty").mkdir()
    folders = [str(path) for path in sorted(tmp_path.iterdir())] + [str(tmp_path / "missing")]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", OTHERS.format(imports=imports), *folders], stdout=subprocess.PIPE, text=True
        )
        for imports in ("", "import modeling_mimo, modeling_mimo.processors")
    ]
    outputs = [run.communicate(timeout=PATIENCE)[0].splitlines() for run in runs]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == len(folders)
    assert "LlavaProcessor" in outputs[0]
    assert not any("MiMo" in line for line in outputs[0])


def test_settings_are_those_of_the_config_not_of_the_stub(processor, released):
    settings = json.loads((released / "config.json").read_text())["processor_config"]
    assert processor.to_dict()["image_processor"] == MiMoV2ImageProcessor.from_processor_config(settings).to_dict()
    assert processor.to_dict()["video_processor"] == MiMoV2VideoProcessor.from_processor_config(settings).to_dict()
    assert processor.image_processor.min_pixels == 8192


def test_what_is_saved_loads_back_equal(processor, media, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = MiMoV2Processor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    conversations = [[user(image(media / "wide.png"), video(media / "short.mp4"), text("?"))], [user("Hi")]]
    got, expected = (chat_inputs(each, conversations) for each in (loaded, processor))
    assert got.keys() == expected.keys() == MODEL_INPUTS
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_settings_can_be_changed_on_loading(released):
    changed = AutoProcessor.from_pretrained(released, max_pixels=20_000)
    assert changed.image_processor.max_pixels == changed.video_processor.max_pixels == 20_000


def test_the_chat_template_is_the_folders_own_or_the_shipped_one(processor, released, tmp_path):
    shutil.copytree(released, tmp_path / "copy")
    path = tmp_path / "copy/tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert processor.chat_template == settings.pop("chat_template")
    path.write_text(json.dumps(settings))
    without = MiMoV2Processor.from_pretrained(tmp_path / "copy")
    assert without.chat_template == processor.chat_template
    parts = processor.image_processor, processor.tokenizer, processor.video_processor
    assert MiMoV2Processor(*parts, chat_template="other").chat_template == "other"
    (tmp_path / "copy/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert MiMoV2Processor.from_pretrained(tmp_path / "copy").apply_chat_template([user("Hi")]) == "Hi"


def test_token_ids_of_config_and_tokenizer_must_agree(released, tmp_path):
    shutil.copytree(released, tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    config = json.loads(path.read_text())
    right = config["processor_config"]["image_token_id"]
    config["processor_config"]["image_token_id"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^image_token_id: expected .* got 5 .* {right} for <\|image_pad\|>"):
        MiMoV2Processor.from_pretrained(tmp_path / "copy")


def test_unreleased_video_text_is_refused(processor):
    parts = processor.image_processor, processor.tokenizer, processor.video_processor
    with pytest.raises(NotImplementedError, match=r"^use_video_timestamps: "):
        MiMoV2Processor(*parts, use_video_timestamps=False)
    with pytest.raises(TypeError, match=r"^video_processor: expected a MiMoV2VideoProcessor, got a MiMoV2Image"):
        MiMoV2Processor(parts[0], parts[1], parts[0])


# what conversations become


def test_hello_has_the_structure_of_the_released_ids(processor):
    ids = chat_inputs(processor, [user("Hello")], enable_thinking=False, add_generation_prompt=True)["input_ids"][0]
    assert pieces(processor, ids) == [
        "<|im_start|>",
        "system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.",
        "<|im_end|>",
        "<|im_start|>",
        "user\nHello",
        "<|im_end|>",
        "<|im_start|>",
        "assistant\n",
        "<think>",
        "</think>",
    ]
    # the released tokenizer's added tokens in the order of their ids
    first = len(processor.tokenizer) - 32
    expected = [int(token) for token in HELLO_IDS.split() if int(token) >= FIRST_ADDED_ID]
    assert [token - first + FIRST_ADDED_ID for token in added_ids(processor, ids)] == expected


# where the processor says more than the template, which passes over what it does not know: rendering -> the medium
# that the template leaves out, or the start of the error
STRICTER = {
    "image spellings": "<|vision_start|><|image_pad|><|vision_end|>",
    "video spellings": "<|vision_start|><|video_pad|><|vision_end|>",
    "audio spellings": "messages[0].content[6].input_audio: expected one of url, data, array, audio_codes, got none",
    "media with two kinds or text in one part": "messages[0].content[1]: `audio`: expected a key of",
    "content parts of other kinds": "messages[0].content[0]: expected a text, an image, a video or audio",
    "content is a list of strings": "messages[0].content[0]: expected a mapping with a type, got str",
    "content is a mapping": "messages[0].content: expected a text or a list of parts, got dict",
}


@pytest.mark.parametrize("rendering", RENDERINGS, ids=lambda rendering: rendering["name"])
def test_golden_renderings_have_the_same_text_and_ids_with_and_without_sanitizing(processor, rendering):
    kwargs = dict(rendering["kwargs"])
    messages = kwargs.pop("messages")
    stricter = STRICTER.get(rendering["name"], "")
    if stricter.startswith("messages"):
        for tokenize in (True, False):
            with pytest.raises(ValueError, match=f"^{re.escape(stricter)}"):
                processor.apply_chat_template(messages, tokenize=tokenize, **kwargs)
        return
    text = rendering["text"].replace(stricter, stricter * 2, 1) if stricter else rendering["text"]
    assert processor.apply_chat_template(messages, **kwargs) == text
    if "_pad|>" in text:
        return
    sanitized, plain = (
        processor.apply_chat_template(messages, tokenize=True, sanitize_control_tokens=switch, **kwargs)
        for switch in (True, False)
    )
    assert plain == processor.tokenizer([text])["input_ids"]
    # the one text of a user that contains control tokens
    assert (sanitized == plain) is (rendering["name"] != "text that looks like tags")


def test_an_image_takes_a_quarter_of_its_patches_in_tokens(processor, media):
    inputs = chat_inputs(processor, [user(text("A"), image(media / "wide.png"), text("B"), image(media / "tall.jpg"))])
    assert inputs["image_grid_thw"].prod(1).sum() == len(inputs["pixel_values"])
    found = pieces(processor, inputs["input_ids"][0])
    counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    expected = ["user\nA", "<|vision_start|>", *["<|image_pad|>"] * counts[0], "<|vision_end|>"]
    expected += ["B", "<|vision_start|>", *["<|image_pad|>"] * counts[1], "<|vision_end|>", "<|im_end|>"]
    assert counts[0] != counts[1]
    assert found[4:] == expected


def test_a_video_is_pairs_of_frames_behind_their_times(processor, media):
    inputs = chat_inputs(processor, [user(text("A"), video(media / "long.mp4"), text("B"))], fps=2)
    time, height, width = inputs["video_grid_thw"][0].tolist()
    assert time == 5
    expected = ["user\nA", "<|mimo_video_start|>"]
    for pair in range(time):
        # frames at 0, 0.5, 1, ... s; the first of each pair counts
        expected += [
            f"00:{pair:02d}",
            "<|vision_start|>",
            *["<|video_pad|>"] * (height * width // 4),
            "<|vision_end|>",
        ]
    assert pieces(processor, inputs["input_ids"][0])[4:] == [*expected, "<|mimo_video_end|>", "B", "<|im_end|>"]


def test_times_have_the_ids_of_their_own_text(processor, media):
    frames = np.zeros((6, 64, 64, 3), dtype=np.uint8)
    inputs = chat_inputs(processor, [user(video("x") | {"video": (frames, [0.0, 1.9, 59.99, 61.0, 6000.0, 6001.0])})])
    ids = inputs["input_ids"][0].tolist()
    start = processor.token_ids["vision_start_token_id"]
    ends = [processor.token_ids[name] for name in ("vision_end_token_id", "video_start_token_id")]
    times = []
    for position in [index for index, token in enumerate(ids) if token == start]:
        first = max(index for index in range(position) if ids[index] in ends)
        times.append(ids[first + 1 : position])
    assert times == [processor.tokenizer(words)["input_ids"] for words in ("00:00", "00:59", "100:00")]


def test_a_batch_is_each_conversation_alone_padded_on_the_left(processor, media):
    conversations = [
        [user(image(media / "wide.png"), video(media / "short.mp4"), text("?"))],
        [user("Hi")],
        [
            user(video(media / "long.mp4"), image(media / "tall.jpg"), image(media / "wide.png")),
            {"role": "assistant", "content": "A"},
            user(video(media / "short.mp4")),
        ],
    ]
    batch = chat_inputs(processor, conversations, add_generation_prompt=True)
    alone = [chat_inputs(processor, conversation, add_generation_prompt=True) for conversation in conversations]
    assert batch.keys() == MODEL_INPUTS
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], alone):
        padding = len(row) - single["input_ids"].shape[1]
        assert mask.tolist() == [0] * padding + [1] * (len(row) - padding)
        assert torch.equal(row[padding:], single["input_ids"][0])
        assert set(row[:padding].tolist()) <= {processor.tokenizer.pad_token_id}
    for key in MODEL_INPUTS - {"input_ids", "attention_mask"}:
        assert torch.equal(batch[key], torch.cat([single[key] for single in alone if key in single]))


def test_every_spelling_of_a_part_is_the_same_image_or_video(processor, media):
    path = str(media / "wide.png")
    with Image.open(path) as opened:
        opened.load()
        parts = [
            {"type": "image", "path": path},
            {"type": "image", "url": path},
            {"type": "image", "image": opened},
            {"image": Path(path)},
            {"type": "image_url", "image_url": {"url": path}},
            {"type": "image_url", "image_url": path},
            {"type": "image", "image": (media / "wide.png").read_bytes()},
        ]
        expected = chat_inputs(processor, [user(image(path))])
        for part in parts:
            got = chat_inputs(processor, [user(part)])
            assert all(torch.equal(got[key], expected[key]) for key in expected), part
    path = str(media / "short.mp4")
    expected = chat_inputs(processor, [user(video(path))])
    for part in ({"type": "video", "url": path}, {"type": "video_url", "video_url": {"url": path}}, {"video": path}):
        got = chat_inputs(processor, [user(part)])
        assert all(torch.equal(got[key], expected[key]) for key in expected), part


def test_settings_apply_to_a_call_and_in_a_part_to_its_medium(processor, media):
    plain = [user(image(media / "wide.png"), image(media / "wide.png"), video(media / "long.mp4"))]
    small = [
        user(image(media / "wide.png"), image(media / "wide.png", max_pixels=9000), video(media / "long.mp4", fps=2))
    ]
    first, second = chat_inputs(processor, plain)["image_grid_thw"].prod(1).tolist()
    assert first == second
    inputs = chat_inputs(processor, small)
    assert inputs["image_grid_thw"].prod(1).tolist()[0] == first
    assert inputs["image_grid_thw"].prod(1).tolist()[1] < first
    assert inputs["video_grid_thw"][0, 0] == 5
    for kwargs in ({"max_pixels": 9000, "fps": 2}, {"processor_kwargs": {"max_pixels": 9000, "fps": 2}}):
        inputs = chat_inputs(processor, plain, **kwargs)
        assert inputs["image_grid_thw"].prod(1).tolist()[0] < first
        assert inputs["video_grid_thw"][0, 0] == 5
    assert chat_inputs(processor, small, num_frames=4)["video_grid_thw"][0, 0] == 5
    nested = {"images_kwargs": {"max_pixels": 9000}, "videos_kwargs": {"num_frames": 4}}
    inputs = chat_inputs(processor, plain, processor_kwargs=nested)
    assert inputs["image_grid_thw"].prod(1).tolist()[0] < first
    assert inputs["video_grid_thw"][0, 0] == 2


def test_known_settings_warn_of_nothing_and_unknown_ones_are_errors(processor, media, caplog, monkeypatch):
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        chat_inputs(processor, [user(image(media / "wide.png"))], max_pixels=9000, fps=2, enable_thinking=False)
        processor(text="a", padding=False, return_mm_token_type_ids=True)
    assert caplog.messages == []
    for tokenize in (True, False):
        with pytest.raises(ValueError, match=r"^`max_pixel`: expected an argument .*; did you mean `max_pixels`\?$"):
            processor.apply_chat_template([user("Hi")], tokenize=tokenize, max_pixel=3)
    with pytest.raises(ValueError, match=r"^`max_pixel`: expected an argument .*; did you mean `max_pixels`\?$"):
        processor(text="a", max_pixel=3)


def test_the_messages_stay_as_they_are(processor, media):
    messages = [
        user(image(media / "wide.png"), text("<|im_end|>")),
        {"role": "assistant", "content": "<think>a</think>"},
    ]
    tools = [{"name": "f", "parameters": {"properties": {"<think>": {"type": "string"}}}}]
    before = copy.deepcopy((messages, tools))
    chat_inputs(processor, messages, tools=tools)
    assert (messages, tools) == before


def test_history_keeps_reasoning_and_calls(processor):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
    history = [
        user("Q"),
        {"role": "assistant", "reasoning_content": "R", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "<think>S</think>A"},
    ]
    ids = chat_inputs(processor, history)["input_ids"][0]
    found = pieces(processor, ids)[6:]
    assert found[:6] == ["<|im_start|>", "assistant\n", "<think>", "R", "</think>", "<tool_call>"]
    assert found[7:12] == ["</tool_call>", "<|im_end|>", "<|im_start|>", "tool\n", "<tool_response>"]
    assert found[-6:] == ["assistant\n", "<think>", "S", "</think>", "A", "<|im_end|>"]


def test_arguments_may_be_json_text(processor):
    def history(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [user("Q"), {"role": "assistant", "content": None, "tool_calls": [call]}]

    for tokenize in (True, False):
        got, expected = (
            processor.apply_chat_template(history(arguments), tokenize=tokenize)
            for arguments in ('{"a": [1], "b": "c"}', {"a": [1], "b": "c"})
        )
        assert got == expected
    for arguments in ("{", "[1]", "5"):
        with pytest.raises(ValueError, match=r"^messages\[1\]\.tool_calls\[0\]: expected arguments as a mapping"):
            processor.apply_chat_template(history(arguments))


CONTROL = ["<|image_pad|>", "<|vision_start|><|video_pad|><|vision_end|>", "<|im_end|>", "<|im_start|>system\n"]
CONTROL += ["<|mimo_video_start|>", "<think>", "</think>", "<tool_call>", "<|audio_pad|>", "<|endoftext|>"]


@pytest.mark.parametrize("token", CONTROL)
def test_what_a_user_types_is_text(processor, media, token):
    def messages(words):
        half = len(words) // 2
        return [
            {"role": "system", "content": f"S {words}"},
            user(image(media / "wide.png"), text(words), text(words[:half]), text(words[half:]), text("Q")),
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": "b"}}]},
            {"role": "tool", "content": [text(words)]},
        ]

    def tools(words):
        inner = words.strip("<>\n")
        schema = {"type": "string", "description": words, inner: words, words: 1, "enum": [words]}
        return [{"name": words, "description": words, "parameters": {"properties": {words: schema}, inner: [words]}}]

    def rendered(words):
        return processor.apply_chat_template(messages(words), tools=tools(words))

    inputs = chat_inputs(processor, messages(token), tools=tools(token))
    innocent = chat_inputs(processor, messages("words"), tools=tools("words"))
    assert added_ids(processor, inputs["input_ids"]) == added_ids(processor, innocent["input_ids"])
    # and nothing of the text is lost
    count = int(inputs["image_grid_thw"].prod()) // 4
    expected = rendered(token).replace(
        "<|vision_start|><|image_pad|>", "<|vision_start|>" + "<|image_pad|>" * count, 1
    )
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == expected


def test_a_users_own_marks_hide_nothing(processor):
    def ids(key, words):
        tools = [{"name": "f", "parameters": {key: words}}]
        return added_ids(processor, processor.apply_chat_template([user(words)], tools=tools, tokenize=True))

    for start, end in (("\U000f0000", ""), ("\U000f0001", ""), ("", "\U000f0001"), ("\U000f0000", "\U000f0001")):
        assert ids(f"{start}think{end}", f"{start}<|im_{end}end|>") == ids("key", "words")


def test_pieces_of_control_tokens_never_become_one(processor):
    rng = random.Random(0)
    tokens = list(processor.tokenizer.added_tokens_encoder)
    words = ["<", "</", ">", "|>", "<|", "think", "tool_call", "a", " ", "\n", "\U000f0000", "\U000f0001", *tokens]
    for token in tokens:
        start = rng.randrange(len(token))
        words += [token[start:], token[:start], token[start : rng.randint(start, len(token))]]

    def innocent():
        return "a"

    def any_text():
        return "".join(rng.choices(words, k=rng.randint(0, 3)))

    def ids(write):
        messages = [
            {"role": "system", "content": write()},
            user(text(write()), text(write()), text(write())),
            {"role": "tool", "content": write()},
            user(write()),
        ]
        properties = {write(): {"type": write(), "description": write(), write(): write()}}
        parameters = {"type": "object", "properties": properties, write(): {write(): write()}}
        tools = [{"name": write(), "description": write(), "parameters": parameters, write(): write()}]
        return added_ids(processor, processor.apply_chat_template(messages, tools=tools, tokenize=True))

    expected = ids(innocent)
    for _ in range(300):
        assert ids(any_text) == expected


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|im_start|>user\n"])
def test_an_assistants_history_opens_no_turns_and_places_no_media(processor, token):
    def history(words):
        return [user("Q"), {"role": "assistant", "content": f"<think>{words}</think>{words}"}]

    ids, innocent = (chat_inputs(processor, history(words))["input_ids"] for words in (token, "words"))
    assert added_ids(processor, ids) == added_ids(processor, innocent)


def test_random_texts_encode_as_without_sanitizing_when_they_hold_no_control_tokens(processor):
    rng = random.Random(0)
    words = ("a", " b", "\n", "<", ">", "<b>", "|", "Köln", " 12", "\n\n", "<|", "think", "/", "{}", "é")
    for _ in range(200):
        content = "".join(rng.choices(words, k=12))
        if any(token in content for token in processor.tokenizer.added_tokens_encoder):
            continue
        history = [user(content), {"role": "assistant", "content": content}, {"role": "tool", "content": content}]
        ids = [
            processor.apply_chat_template(history, tokenize=True, sanitize_control_tokens=switch)
            for switch in (True, False)
        ]
        assert ids[0] == ids[1], content


def test_a_turn_can_be_continued(processor):
    history = [user("Q <|im_end|>"), {"role": "assistant", "content": "<think>R</think>A is"}]
    ids = chat_inputs(processor, history, continue_final_message=True)["input_ids"][0]
    assert pieces(processor, ids)[-4:] == ["<think>", "R", "</think>", "A is"]


# plain calls


def test_a_plain_call_fills_placeholders_in_order(processor, media):
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    clip = "<|vision_start|><|video_pad|><|vision_end|>"
    paths = [str(media / name) for name in ("wide.png", "tall.jpg")]
    clips = [str(media / name) for name in ("long.mp4", "short.mp4")]
    texts = [f"A{place}B{clip}", "C", f"{clip}{place}D"]
    inputs = processor(images=paths, text=texts, videos=clips, return_tensors="pt")
    conversation = [[image(paths[0]), text("B"), video(clips[0])], [text("C")], [video(clips[1]), image(paths[1])]]
    expected = chat_inputs(processor, [[user(*parts)] for parts in conversation])
    for key in MODEL_INPUTS - {"input_ids", "attention_mask"}:
        assert torch.equal(inputs[key], expected[key])
    per_text = [[paths[0]], [], [paths[1]]]
    again = processor(images=per_text, text=texts, videos=clips, return_tensors="pt")
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)
    frames = [Image.new("RGB", (64, 64), (level, 0, 0)) for level in (0, 50, 100, 150)]
    as_frames = [
        processor(text=clip, videos=videos, return_tensors="pt")["video_grid_thw"].tolist()
        for videos in (frames, [frames], [[frames]], [np.stack(frames)], (frames, [0, 1, 2, 3]))
    ]
    assert len(as_frames[0]) == 1
    assert as_frames[:4] == [as_frames[0]] * 4
    # times are the frames' own, so all of them are taken
    assert as_frames[4][0][0] == 2
    alone = processor(images=paths[1], text=texts[2], videos=clips[1], return_tensors="pt")
    assert torch.equal(alone["input_ids"][0], inputs["input_ids"][2][-alone["input_ids"].shape[1] :])


def test_without_tensors_rows_are_lists(processor, media):
    inputs = processor(text=["a", "a b c"], images=None)
    assert [len(row) for row in inputs["input_ids"]] == [len(inputs["input_ids"][1])] * 2
    assert processor(text=["a", "a b c"], padding=False)["attention_mask"][0] == [1]
    assert processor(images=str(media / "wide.png")).keys() == {"pixel_values", "image_grid_thw"}
    arrays = processor(text="a<|image_pad|>", images=str(media / "wide.png"), return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())


def test_token_types_on_request(processor, media):
    texts = "a<|image_pad|>b<|vision_start|><|video_pad|><|vision_end|>"
    paths = {"images": str(media / "wide.png"), "videos": str(media / "short.mp4")}
    plain = processor(text=texts, return_tensors="pt", **paths)
    assert "mm_token_type_ids" not in plain
    types = processor(text=texts, return_tensors="pt", return_mm_token_type_ids=True, **paths)["mm_token_type_ids"]
    assert (types == 1).sum() == plain["image_grid_thw"].prod() // 4
    assert (types == 2).sum() == plain["video_grid_thw"].prod() // 4


# what is refused


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (
            ["<|image_pad|>", "a<|image_pad|><|image_pad|>"],
            2,
            r"images: expected 3, .* got 2; placeholder 1 of text\[1\]",
        ),
        (["<|image_pad|>"], 0, r"images: expected 1, .* got 0; placeholder 0 of text\[0\] has none"),
        (["<|image_pad|>", "a"], 3, r"images\[1\]: expected a placeholder in the text, got 1 for 3 images"),
        (["a"], 1, r"images\[0\]: expected a placeholder in the text, got 0 for 1 images"),
    ],
)
def test_placeholders_and_media_must_match(processor, media, texts, images, message):
    paths = [str(media / "wide.png")] * images
    with pytest.raises(ValueError, match=f"^{message}"):
        processor(text=texts, images=paths)
    clips = [str(media / "short.mp4")] * images
    with pytest.raises(ValueError, match=f"^{message.replace('images', 'videos')}"):
        processor(text=[words.replace("image_pad", "video_pad") for words in texts], videos=clips)


def test_truncation_may_not_cut_media(processor, media):
    with pytest.raises(ValueError, match=r"Mismatch in `image` token count"):
        processor(text="<|image_pad|>", images=str(media / "wide.png"), truncation=True, max_length=3)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image"}, "expected one image under one of image, image_url, url, path, base64, got 0"),
        ({"type": "video", "video": None}, "expected one video under one of .*, got 0"),
        ({"type": "image", "image": "a", "url": "b"}, "expected one image under one of .*, got 2"),
        ({"type": "image", "image": ["a", "b"]}, "expected one image, got 2"),
        (
            {"type": "file", "file": "a"},
            r"expected a text, an image, a video or audio, got \['file', 'type'\] of type 'file'",
        ),
        ({"type": "text"}, "expected a text, an image, a video or audio, got"),
        ("words", "expected a mapping with a type, got str"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(processor, part, message):
    with pytest.raises(ValueError, match=rf"^messages\[1\]\.content\[1\]: {message}"):
        chat_inputs(processor, [user("Q"), {"role": "user", "content": [text("a"), part]}])
    with pytest.raises(ValueError, match=rf"^messages\[1\]\[0\]\.content\[0\]: {message}"):
        chat_inputs(processor, [[user("Q")], [{"role": "user", "content": [part]}]])


def test_sound_without_data_or_placeholder_is_named(processor):
    with pytest.raises(
        ValueError, match=r"^messages\[0\]\.content\[1\]: expected one audio under one of audio, .* got 0"
    ):
        chat_inputs(processor, [user(text("a"), {"type": "input_audio"})])
    with pytest.raises(ValueError, match=r"^audio: expected 1, .* placeholder 0 of text\[1\] has none"):
        processor(text=["a", "<|mimo_audio_start|><|audio_pad|><|mimo_audio_end|>"])
    with pytest.raises(ValueError, match=r"^audio\[0\]: expected a placeholder in the text"):
        processor(text="a", audio=np.zeros(10))


def test_a_file_that_cannot_be_read_is_named_by_its_index(processor, media, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    conversations = [[user(image(media / "wide.png"))], [user(image(media / "tall.jpg"), image(broken))]]
    with pytest.raises(ValueError, match=r"^images\[2\]: "):
        chat_inputs(processor, conversations)
    conversations[0][0]["content"][0]["max_pixels"] = 9000
    with pytest.raises(ValueError, match=r"^images\[2\]: "):
        chat_inputs(processor, conversations)
    for options in ({}, {"fps": 2}):
        with pytest.raises(FileNotFoundError, match=r"^videos\[1\]: "):
            chat_inputs(processor, [user(video(media / "short.mp4"), video(tmp_path / "missing.mp4", **options))])


@pytest.mark.parametrize("kwargs", [{}, {"text": 5}, {"text": [1]}, {"text": [["a"]]}])
def test_a_call_without_usable_text_is_an_error(processor, kwargs):
    with pytest.raises(ValueError, match=r"^text: expected"):
        processor(**kwargs)
    with pytest.raises(ValueError, match=r"^conversation: expected at least one message"):
        processor.apply_chat_template([])


# explain


def test_explain_tells_what_each_token_stands_for(processor, media):
    conversations = [[user(text("A"), image(media / "wide.png"), video(media / "long.mp4"))], [user("Hi")]]
    inputs = chat_inputs(processor, conversations, fps=2)
    layout = processor.explain(inputs)
    (_, height, width), (pairs, frame_height, frame_width) = (
        inputs[key][0].tolist() for key in ("image_grid_thw", "video_grid_thw")
    )
    for row, ids in zip(layout.rows, inputs["input_ids"]):
        assert [segment.start for segment in row[1:]] == [segment.end for segment in row[:-1]]
        assert (row[0].start, row[-1].end) == (0, len(ids))
        for segment in row:
            if segment.kind == "text":
                assert segment.text == processor.tokenizer.decode(ids[segment.start : segment.end])
    image_segment, *video_segments = [segment for segment in layout.rows[0] if segment.grid]
    assert (image_segment.kind, image_segment.index, image_segment.grid) == ("image", 0, (1, height, width))
    assert (image_segment.patches, image_segment.tokens) == (height * width, height * width // 4)
    assert [(segment.kind, segment.index, segment.frame) for segment in video_segments] == [
        ("video", 0, pair) for pair in range(pairs)
    ]
    assert [segment.seconds for segment in video_segments] == list(range(pairs))
    assert {segment.tokens for segment in video_segments} == {frame_height * frame_width // 4}
    assert [segment.kind for segment in layout.rows[1]] == ["padding", "text"]
    assert layout.rows[1][0].tokens == int((inputs["attention_mask"][1] == 0).sum())
    table = str(layout)
    assert re.search(rf"images\[0\] +1 x {height} x {width} +{height * width}\n", table)
    assert re.search(rf"videos\[0\] pair 3 +{pairs} x .* 00:03", table)
    assert re.search(r"row 1: \d+ tokens \(\d+ text, \d+ padding\)", table)


def test_explain_takes_lists_and_text_alone(processor):
    layout = processor.explain(processor(text=["a", "a b c"]))
    assert [row[-1].text for row in layout.rows] == ["a", "a b c"]


def test_explain_refuses_inputs_that_do_not_fit(processor, media):
    inputs = chat_inputs(processor, [user(image(media / "wide.png"))])
    right = inputs["image_grid_thw"].tolist()
    for grid in ([[1, 2, 2]], [[1, 64, 64]], [*right, [1, 4, 4]], []):
        with pytest.raises(ValueError, match=r"^input_ids: expected"):
            processor.explain({**inputs, "image_grid_thw": torch.tensor(grid)})


# answers


def test_answers_are_read_from_text_ids_and_batches(processor):
    answer = "<think>R</think>C<|im_end|>"
    expected = {"role": "assistant", "content": "C", "reasoning_content": "R"}
    ids = processor.tokenizer(answer)["input_ids"]
    assert processor.parse_response(answer) == expected
    assert processor.parse_response(ids) == expected
    assert processor.parse_response(torch.tensor(ids)) == expected
    assert processor.parse_response(np.array(ids)) == expected
    assert processor.parse_response([answer, "D"]) == [expected, {"role": "assistant", "content": "D"}]
    padded = torch.tensor([ids, ids[:2] + [processor.tokenizer.pad_token_id] * (len(ids) - 2)])
    assert processor.parse_response(padded)[0] == expected
    assert processor.parse_response(padded)[1]["reasoning_content"] == processor.tokenizer.decode(ids[1])
    prompt = processor.apply_chat_template([user("Q")], tokenize=True, add_generation_prompt=True)
    assert processor.parse_response([answer, answer], prefix=prompt) == [expected] * 2
    begun = processor.apply_chat_template(
        [user("Q"), {"role": "assistant", "content": "<think>S</think>B"}], continue_final_message=True
    )
    assert processor.parse_response("C", prefix=begun)["content"] == "BC"
    with pytest.raises(ValueError, match=r"^prefix: expected 1 or 2, one per answer, got 3"):
        processor.parse_response(["a", "b"], prefix=["c"] * 3)


def test_a_stream_of_generated_text_is_read_as_the_whole(processor):
    answer = "<think>R</think>C <tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</tool_call>"
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}]
    parser = processor.response_stream_parser(tools)
    for token in processor.tokenizer(answer)["input_ids"]:
        parser.feed(processor.tokenizer.decode([token]))
    parser.close()
    assert parser.message == processor.parse_response(answer, tools=tools)
    assert parser.message["tool_calls"][0]["function"]["arguments"] == {"a": 1}


# pipelines


def test_the_pipeline_answers_about_an_image(released, media):
    answering = pipeline("image-text-to-text", model=str(released), device="cpu")
    assert type(answering.processor) is MiMoV2Processor
    messages = [user(image(media / "wide.png"), text("What is it?"))]
    (answer,) = answering(text=messages, max_new_tokens=3, generate_kwargs={"do_sample": False})
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert messages[0]["content"][0]["image"] == str(media / "wide.png")
    place = "<|vision_start|><|image_pad|><|vision_end|>?"
    (answer,) = answering(images=str(media / "wide.png"), text=place, max_new_tokens=3)
    assert isinstance(answer["generated_text"], str)


def test_auto_tokenizer_still_gives_the_tokenizer(released):
    assert AutoTokenizer.from_pretrained(released).chat_template
