"""A name that nobody reads is an error that names it and the nearest known one, in parts of messages and in calls."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoProcessor, pipeline
from transformers.processing_utils import TextKwargs

from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.processors import MiMoV2FeatureExtractor, MiMoV2ImageProcessor, MiMoV2VideoProcessor
from modeling_mimo.unknown_names_mimo_v2 import unknown_name


pytestmark = pytest.mark.usefixtures("one_thread")

MEDIA = Path(__file__).parents[1] / "examples" / "media"
FILES = {
    "image": str(MEDIA / "chart.png"),
    "video": str(MEDIA / "clip.mp4"),
    "audio": str(MEDIA / "speech.wav"),
}
CACHE_MARKS = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
# kind of part -> its keys, each with a value that fits
SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
    "audio": ("audio", "audio_url", "input_audio", "url", "path", "base64"),
}
SETTINGS = {
    "image": {"min_pixels": 8192, "max_pixels": 16384, "detail": "auto"},
    "video": {
        "fps": 1,
        "num_frames": 4,
        "nframes": 4,
        "min_frames": 2,
        "max_frames": 4,
        "min_pixels": 8192,
        "max_pixels": 16384,
        "total_max_pixels": 65536,
        "start": 0,
        "end": 2,
        "video_start": 0,
        "video_end": 2,
    },
    "audio": {"start": 0, "end": 2, "sampling_rate": 24000},
}
NESTED = {
    ("image", "url"): ("detail",),
    ("image", "data"): ("detail",),
    ("video", "url"): (),
    ("video", "data"): (),
    ("audio", "url"): (),
    ("audio", "data"): ("format",),
    ("audio", "array"): ("sampling_rate", "path"),
    ("audio", "audio_codes"): (),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("names") / "omni", "tiny", vision=True, audio=True)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def misspelled(name, known):
    """`name` without one of its letters, once for each letter."""
    return sorted({name[:at] + name[at + 1 :] for at in range(len(name))} - {*known, ""})


def chat(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": "Q"}, *parts]}]


def refused(wrong, right, place, function, *args, **kwargs):
    """One line that says where, what, and what is meant."""
    expected = rf"^{re.escape(place)}`{wrong}`: expected [^\n]*, got an unknown name; did you mean `{right}`\?$"
    with pytest.raises(ValueError, match=expected):
        function(*args, **kwargs)


def refused_in_both_forms(processor, part, wrong, right, place):
    for tokenize in (True, False):
        refused(wrong, right, place, processor.apply_chat_template, chat(part), tokenize=tokenize)


def test_the_nearest_name_is_told_only_where_there_is_one():
    got = unknown_name("max_pixel", ["min_pixels", "max_pixels"], "a setting")
    assert got == "`max_pixel`: expected a setting, got an unknown name; did you mean `max_pixels`?"
    assert unknown_name("foo", ["max_pixels"], "a setting") == "`foo`: expected a setting, got an unknown name"


# parts of messages


def test_an_image_part_with_max_pixel_raises(processor):
    part = {"type": "image", "image": FILES["image"], "max_pixel": 9000}
    refused_in_both_forms(processor, part, "max_pixel", "max_pixels", "messages[0].content[1]: ")
    with pytest.raises(ValueError, match=r"^messages\[1\]\[0\]\.content\[1\]: `max_pixel`: "):
        processor.apply_chat_template([chat(), chat(part)], tokenize=True)


@pytest.mark.parametrize("kind", ["text", *SOURCES])
def test_every_key_of_a_part_misspelled_is_named_with_the_right_one(processor, kind):
    medium = {} if kind == "text" else {kind: FILES[kind]}
    whole = {"type": kind, **({"text": "x"} if kind == "text" else medium)}
    known = {"type", *whole, *SOURCES.get(kind, ()), *SETTINGS.get(kind, ()), *CACHE_MARKS}
    place = "messages[0].content[1]: "
    count = 0
    for right in known:
        for wrong in misspelled(right, known):
            part = {key: value for key, value in whole.items() if key != right} | {wrong: "x"}
            if "type" in part or set(part) & set(medium):
                refused_in_both_forms(processor, part, wrong, right, place)
                count += 1
    assert count > 30


@pytest.mark.parametrize(("kind", "source"), NESTED)
def test_every_key_of_a_mapping_in_a_part_misspelled_is_named_with_the_right_one(processor, kind, source):
    known = {key for (other, name), beside in NESTED.items() if other == kind for key in (name, *beside)}
    key = SOURCES[kind][1] if source == "url" else kind
    for right in (source, *NESTED[kind, source]):
        for wrong in misspelled(right, known):
            mapping = {name: "x" for name in (source, *NESTED[kind, source]) if name != right} | {wrong: "x"}
            place = f"messages[0].content[1].{key}: "
            refused_in_both_forms(processor, {"type": kind, key: mapping}, wrong, right, place)


def test_every_known_key_of_a_part_is_taken(processor):
    for kind, settings in SETTINGS.items():
        for key, value in (settings | CACHE_MARKS).items():
            part = {"type": kind, kind: FILES[kind], key: value, **({"max_pixels": 16384} if kind != "audio" else {})}
            processor.apply_chat_template(chat(part), tokenize=True)
            processor.apply_chat_template(chat({"type": "text", "text": "x"} | CACHE_MARKS), tokenize=True)
    for key in ("image", "url", "path"):
        processor.apply_chat_template(chat({"type": "image", key: FILES["image"], "max_pixels": 16384}), tokenize=True)


def inputs_of(processor, part, **kwargs):
    return processor.apply_chat_template(chat(part), tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_names_of_qwen_mean_what_they_mean_there(processor):
    video = {"type": "video", "video": FILES["video"], "max_pixels": 16384}
    qwens = inputs_of(processor, {**video, "nframes": 4, "video_start": 1, "video_end": 4})
    assert_equal(qwens, inputs_of(processor, {**video, "num_frames": 4, "start": 1, "end": 4}))
    assert qwens["video_grid_thw"].tolist() != inputs_of(processor, video)["video_grid_thw"].tolist()
    for twice in ({"nframes": 4, "num_frames": 4}, {"start": 0, "video_start": 0}, {"end": 2, "video_end": 3}):
        with pytest.raises(ValueError, match=rf"^messages\[0\]\.content\[1\]\.{list(twice)[1]}: expected .* once"):
            inputs_of(processor, {**video, **twice})
    for size in ("resized_height", "resized_width"):
        with pytest.raises(ValueError, match=rf"^messages\[0\]\.content\[1\]: `{size}`: expected `max_pixels` and"):
            inputs_of(processor, {"type": "image", "image": FILES["image"], size: 64})


def test_detail_is_a_bound_only_where_it_is_low(processor):
    def pixels(part, **kwargs):
        return int(inputs_of(processor, part, **kwargs)["image_grid_thw"].prod()) * 16 * 16

    def part(**beside):
        return {"type": "image_url", "image_url": {"url": FILES["image"], **beside}}

    whole = pixels(part())
    assert whole > 512 * 512
    for detail in ("auto", "high", "original"):
        assert pixels(part(detail=detail)) == pixels({**part(), "detail": detail}) == whole
    low = pixels(part(detail="low"))
    assert low == pixels({**part(), "detail": "low"}) == pixels({**part(), "max_pixels": 512 * 512}) <= 512 * 512
    # never more than the call allows, and the image's own bound is the nearer one
    small = pixels(part(), max_pixels=16384)
    assert pixels(part(detail="low"), max_pixels=16384) == pixels({**part(detail="low"), "max_pixels": 16384}) == small
    with pytest.raises(ValueError, match=r"image_url\.detail: expected one of auto, low, high, original, got 'fine'"):
        pixels(part(detail="fine"))
    with pytest.raises(ValueError, match=r"image_url\.detail: expected detail once, got it twice"):
        pixels({**part(detail="low"), "detail": "high"})


def test_codes_have_nothing_beside_them_that_would_not_be_followed(processor):
    (codes,) = processor.get_audio_codes(FILES["audio"], end=1)
    part = {"type": "audio", "audio": {"audio_codes": codes}}
    assert inputs_of(processor, part)["audio_codes"].shape == codes.shape
    for beside in SETTINGS["audio"]:
        with pytest.raises(ValueError, match=rf"^audio\[0\]: expected nothing beside `audio_codes`.* got {beside}$"):
            inputs_of(processor, {**part, beside: 1})


# arguments of calls

IMAGES, VIDEOS = MiMoV2ImageProcessor.valid_kwargs.__annotations__, MiMoV2VideoProcessor.valid_kwargs.__annotations__
NESTED_ARGUMENTS = {
    "images_kwargs": {*IMAGES, "timeout"},
    "videos_kwargs": {*VIDEOS, "timeout"},
    "audio_kwargs": {"sampling_rate", "timeout"},
    "text_kwargs": set(TextKwargs.__annotations__),
}


def flat_arguments(function):
    parameters = inspect.signature(function).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    return {*named, *NESTED_ARGUMENTS, *(name for names in NESTED_ARGUMENTS.values() for name in names)}


def test_every_argument_of_the_processors_call_misspelled_is_named_with_the_right_one(processor):
    known = flat_arguments(processor.__call__)
    for right in known:
        for wrong in misspelled(right, known):
            refused(wrong, right, "", processor, text="a", **{wrong: 1})


def test_every_argument_of_the_chat_misspelled_is_named_with_the_right_one(processor):
    known = {*flat_arguments(processor.apply_chat_template), "use_audio_in_video", "add_generation_prompt"}
    known |= {"continue_final_message", "enable_thinking", "keep_all_reasoning", "system_message"}
    for right in known:
        for wrong in misspelled(right, known)[:4]:
            for tokenize in (True, False):
                for kwargs in ({wrong: 1}, {"processor_kwargs": {wrong: 1}}):
                    refused(wrong, right, "", processor.apply_chat_template, chat(), tokenize=tokenize, **kwargs)


@pytest.mark.parametrize("holder", NESTED_ARGUMENTS)
def test_every_nested_argument_misspelled_is_named_with_the_right_one(processor, holder):
    """Also where there is no medium that it would be for."""
    known = NESTED_ARGUMENTS[holder]
    for right in known:
        for wrong in misspelled(right, known):
            kwargs = {holder: {wrong: 1}}
            refused(wrong, right, f"{holder}: ", processor, text="a", **kwargs)
            refused(wrong, right, f"{holder}: ", processor.apply_chat_template, chat(), processor_kwargs=kwargs)
    with pytest.raises(ValueError, match=rf"^{holder}: expected a mapping of arguments, got int$"):
        processor(text="a", **{holder: 1})


@pytest.mark.parametrize("part", ["image_processor", "video_processor", "feature_extractor", "get_audio_codes"])
def test_every_argument_of_a_parts_own_call_misspelled_is_named_with_the_right_one(processor, part):
    arguments = {
        "image_processor": {"images", "return_tensors", "timeout", *IMAGES},
        "video_processor": {
            "videos",
            "start",
            "end",
            "return_tensors",
            "timeout",
            "return_soundtracks",
            *VIDEOS,
        },
        "feature_extractor": {"audio", "sampling_rate", "start", "end", "return_tensors", "timeout"},
        "get_audio_codes": {"audio", "sampling_rate", "start", "end", "timeout"},
    }
    known = arguments[part]
    file = FILES[{"image_processor": "image", "video_processor": "video"}.get(part, "audio")]
    for right in known:
        for wrong in misspelled(right, known):
            refused(wrong, right, "", getattr(processor, part), file, **{wrong: 1})


def test_every_argument_of_loading_misspelled_is_named_with_the_right_one(folder):
    loading = {
        "cache_dir",
        "force_download",
        "local_files_only",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
    }
    settings = {*IMAGES, *VIDEOS, "sampling_rate", "hop_length", "segment_size", "video_audio_interleave_length"}
    for right in loading | settings | {"padding_side", "model_max_length", "chat_template"}:
        for wrong in misspelled(right, ())[:2]:
            refused(wrong, right, "", AutoProcessor.from_pretrained, folder, **{wrong: 1})
    parts = {MiMoV2ImageProcessor: IMAGES, MiMoV2VideoProcessor: VIDEOS, AutoFeatureExtractor: {"hop_length", "fmax"}}
    for part, names in parts.items():
        for right in names:
            wrong = misspelled(right, names)[0]
            refused(wrong, right, "", part.from_pretrained, folder, **{wrong: 1})


def test_what_loading_takes_arrives_where_it_belongs(folder, tmp_path):
    arguments = {"revision": "main", "token": None, "trust_remote_code": True, "local_files_only": True}
    arguments |= {"use_fast": True, "cache_dir": str(tmp_path), "truncation_side": "left"}
    changed = AutoProcessor.from_pretrained(
        folder, **arguments, max_pixels=20_000, num_frames=4, segment_size=50, video_audio_interleave_length=1
    )
    assert changed.image_processor.max_pixels == changed.video_processor.max_pixels == 20_000
    assert changed.video_processor.num_frames == 4
    assert changed.feature_extractor.segment_size == 50
    assert changed.video_audio_interleave_length == 1
    assert changed.tokenizer.truncation_side == "left"
    # and nowhere else
    assert not {"max_pixels", "num_frames", "segment_size"} & changed.tokenizer.init_kwargs.keys()
    extractor, unused = MiMoV2FeatureExtractor.from_pretrained(folder, foo=1, return_unused_kwargs=True)
    assert isinstance(extractor, MiMoV2FeatureExtractor)
    assert unused["foo"] == 1


def test_a_pipeline_hands_its_processor_what_is_for_the_model(folder):
    made = pipeline("any-to-any", model=str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    assert made.model.config._attn_implementation == "eager"
    assert type(made.processor).__name__ == "MiMoV2Processor"
