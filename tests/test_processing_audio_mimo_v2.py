"""Sound through the processor: codes of files, their places in a prompt, videos with sound, and what is refused."""

import base64
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from media import H264, clip
from transformers import AutoFeatureExtractor, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.processors import (
    MiMoAudioTokenizer,
    MiMoV2FeatureExtractor,
    MiMoV2Processor,
    audio_codes_mimo_v2,
)


pytestmark = pytest.mark.usefixtures("one_thread")

MEDIA = Path(__file__).parents[1] / "examples" / "media"
AUDIO = "<|mimo_audio_start|><|audio_pad|><|mimo_audio_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
# tokens of sound per second
RATE = 6.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hearing") / "omni"
    return write_random_checkpoint(path, "tiny", dtype="bf16", vision=True, audio=True)


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two WAV files: 3 s of a tone at 24 kHz, and 1.5 s of stereo noise at 44.1 kHz."""
    root = tmp_path_factory.mktemp("sounds")
    time = np.arange(3 * 24000) / 24000
    soundfile.write(root / "tone.wav", 0.3 * np.sin(2 * np.pi * 440 * time), 24000)
    soundfile.write(root / "noise.wav", 0.1 * np.random.default_rng(0).standard_normal((66150, 2)), 44100)
    return root


def video_with_sound(path, seconds, sound, offset=0.0, rate=10):
    """`seconds` of pictures, `sound` seconds of a rising tone that begins at `offset`; none with `sound` 0."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream(H264, rate=rate)
        pictures.height, pictures.width, pictures.pix_fmt = 64, 96, "yuv420p"
        audio = None
        if sound:
            audio = container.add_stream("aac", rate=24000)
            audio.layout = "mono"
        for pixels in clip(round(seconds * rate)):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(pictures.encode())
        if sound:
            time = np.arange(round(sound * 24000)) / 24000
            samples = (0.3 * np.sin(2 * np.pi * (200 + 100 * time) * time)).astype(np.float32)[None]
            for first in range(0, samples.shape[1], 1024):
                block = np.ascontiguousarray(samples[:, first : first + 1024])
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.rate, frame.pts, frame.time_base = 24000, first + round(offset * 24000), Fraction(1, 24000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return str(path)


def codes_of(folder, samples):
    """Codes of samples at 24 kHz: extractor and tokenizer used by hand."""
    features = MiMoV2FeatureExtractor.from_pretrained(folder)(samples, sampling_rate=24000)
    tokenizer = MiMoAudioTokenizer.from_pretrained(folder, subfolder="audio_tokenizer")
    return tokenizer.encode(features["input_features"], features["feature_lengths"]).audio_codes


def soundtrack(path):
    """[n] at 24 kHz of a file's sound from second 0 to its end, silent where it has none."""
    samples, end = np.zeros(20 * 24000, dtype=np.float32), 0
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            place = round(float(frame.pts * frame.time_base) * 24000)
            block = frame.to_ndarray()[0]
            end = place + len(block)
            samples[max(place, 0) : end] = block[max(-place, 0) :]
    return samples[:end]


def test_codes_are_those_of_extractor_and_tokenizer(folder, processor, sounds):
    samples, _ = soundfile.read(sounds / "tone.wav", dtype="float32")
    inputs = processor(text=f"a {AUDIO} b", audio=sounds / "tone.wav", return_tensors="pt")
    assert torch.equal(inputs["audio_codes"], codes_of(folder, samples))
    frames = 1 + len(samples) // 240
    assert inputs["audio_code_lengths"].tolist() == [-(-frames // 4)]
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == -(-frames // 16)


@pytest.mark.parametrize("frames", [*range(3, 60, 3), 199, 200, 5999, 6000, 6001, 12001])
def test_a_token_is_sixteen_frames(processor, frames):
    samples = np.random.default_rng(frames).uniform(-0.5, 0.5, (frames - 1) * 240 + 100).astype(np.float32)
    # the shortest sound that can be reflected has three frames
    inputs = processor(
        text=AUDIO, audio=(np.pad(samples, (0, max(0, 481 - len(samples)))), 24000), return_tensors="pt"
    )
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == -(-frames // 16)


def test_a_sound_of_several_segments(folder, sounds):
    processor = MiMoV2Processor.from_pretrained(folder, segment_size=100)
    samples, _ = soundfile.read(sounds / "tone.wav", dtype="float32")
    features = processor.feature_extractor(samples, sampling_rate=24000)
    assert features["feature_lengths"].tolist() == [100, 100, 100, 1]
    parts = [
        processor.audio_tokenizer.encode(part[None, :length]).audio_codes
        for part, length in zip(features["input_features"], features["feature_lengths"])
    ]
    (codes,) = processor.get_audio_codes(sounds / "tone.wav")
    assert torch.equal(codes, torch.cat(parts))


def test_everything_keeps_its_order_whatever_is_batched(processor, sounds):
    tone, noise = sounds / "tone.wav", sounds / "noise.wav"
    apart = {path: processor.get_audio_codes(path)[0] for path in (tone, noise)}
    inputs = processor(
        text=[f"{AUDIO} {AUDIO}", "no sound", f"x {AUDIO}"], audio=[[noise, tone], [noise]], return_tensors="pt"
    )
    assert torch.equal(inputs["audio_codes"], torch.cat([apart[noise], apart[tone], apart[noise]]))
    assert inputs["audio_code_lengths"].tolist() == [len(apart[noise]), len(apart[tone]), len(apart[noise])]


def test_messages_take_sound_in_all_spellings(processor, sounds):
    path = sounds / "tone.wav"
    data = path.read_bytes()
    encoded = base64.b64encode(data).decode()
    samples, rate = soundfile.read(path, dtype="float32")
    parts = [
        {"type": "audio", "audio": str(path)},
        {"type": "audio", "path": str(path)},
        {"type": "audio", "url": path.as_uri()},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded}"}},
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"audio": data},
        {"type": "audio", "audio": {"array": samples, "sampling_rate": rate}},
        {"type": "audio", "audio": (samples, rate)},
        {"type": "audio", "audio": {"audio_codes": processor.get_audio_codes(path)[0]}},
    ]
    expected = processor.get_audio_codes(path)[0]
    for part in parts:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        # 16-bit samples as floats are the same numbers
        assert torch.equal(inputs["audio_codes"], expected), part.keys()


def test_a_part_may_say_the_rate_of_its_array(processor, sounds):
    samples, _ = soundfile.read(sounds / "tone.wav", dtype="float32")
    messages = [{"role": "user", "content": [{"type": "audio", "audio": samples, "sampling_rate": 16000}]}]
    # that of the part goes before that of the call
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"sampling_rate": 8000}
    )
    assert torch.equal(inputs["audio_codes"], processor.get_audio_codes((samples, 16000))[0])


def test_a_part_of_a_sound(processor, sounds):
    samples, _ = soundfile.read(sounds / "tone.wav", dtype="float32")
    part = {"type": "audio", "audio": str(sounds / "tone.wav"), "start": 1, "end": 2.5}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    (expected,) = processor.get_audio_codes((samples[24000:60000], 24000))
    assert torch.equal(inputs["audio_codes"], expected)
    (again,) = processor.get_audio_codes(sounds / "tone.wav", start=1, end=2.5)
    assert torch.equal(again, expected)


# seconds of pictures, of sound, and when the sound begins
TRACKS = {
    "equal": (4, 4, 0.0),
    "shorter": (6, 2.5, 0.0),
    "longer": (3, 6, 0.0),
    "late": (4, 4, 1.3),
    "brief": (4, 0.3, 0.0),
}


def expected_video(processor, inputs, end, tokens, interleave=0.0):
    """The text that stands for a video at 10 pictures per second, from its grid alone."""
    ((pairs, height, width),) = inputs["video_grid_thw"].tolist()
    indices = np.linspace(0, end * 10 - 1, 2 * pairs, dtype=np.int64)
    seconds = indices[::2] / 10
    until = indices[-1] / 10 + (indices[1] - indices[0]) / 10
    bounds = [min(int(second * RATE), tokens) for second in [*seconds, until]]
    frames = "<|vision_start|>" + "<|video_pad|>" * (height * width // 4) + "<|vision_end|>"
    groups = {}
    for place, second in enumerate(seconds):
        key = place if interleave == 0 else 0 if interleave == -1 else int(second / interleave)
        groups.setdefault(key, []).append(place)
    text = "<|mimo_video_start|>"
    for places in groups.values():
        sound = sum(bounds[place + 1] - bounds[place] for place in places)
        text += f"00:{int(seconds[places[0]]):02d}" + frames * len(places)
        if sound:
            text += "<|mimo_audio_start|>" + "<|audio_pad|>" * sound + "<|mimo_audio_end|>"
    return text + "<|mimo_video_end|>", bounds[-1]


@pytest.mark.parametrize("track", TRACKS)
@pytest.mark.parametrize("interleave", [0.0, -1.0, 2.0])
def test_frames_and_sound_are_interleaved(folder, tmp_path, track, interleave):
    processor = MiMoV2Processor.from_pretrained(folder, video_audio_interleave_length=interleave)
    seconds, sound, offset = TRACKS[track]
    path = video_with_sound(tmp_path / "video.mp4", seconds, sound, offset)
    inputs = processor(text=f"<{VIDEO}>", videos=path, return_tensors="pt")
    codes = codes_of(folder, soundtrack(path))
    text, tokens = expected_video(processor, inputs, seconds, -(-len(codes) // 4), interleave)
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == f"<{text}>"
    found = inputs["audio_codes"]
    assert inputs["audio_code_lengths"].tolist() == [len(found)]
    # what lies behind the last frame is not heard, and was not encoded: the spectrum ends sooner
    assert len(found) == min(4 * tokens, len(codes))
    assert torch.equal(found[:-2], codes[: len(found) - 2])
    assert "audio[0]" in str(processor.explain(inputs))


def test_a_part_of_a_video_has_its_part_of_the_sound(processor, tmp_path):
    path = video_with_sound(tmp_path / "video.mp4", 8, 8)
    message = {"role": "user", "content": [{"type": "video", "video": path, "start": 3, "end": 6}]}
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
    # from the first token that begins before the first frame to the last one before the end
    first, last = int(3 * RATE), int(6 * RATE)
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == last - first
    (expected,) = processor.get_audio_codes((soundtrack(path), 24000), start=first / RATE, end=6)
    assert torch.equal(inputs["audio_codes"], expected[: 4 * (last - first)])


def test_sounds_and_videos_with_sound_keep_the_order_of_the_prompt(processor, sounds, tmp_path):
    loud, silent = (video_with_sound(tmp_path / f"{n}.mp4", 3, n) for n in (3, 0))
    content = [
        {"type": "video", "video": loud},
        {"type": "audio", "audio": str(sounds / "noise.wav")},
        {"type": "video", "video": silent},
        {"type": "audio", "audio": str(sounds / "tone.wav")},
        {"type": "video", "video": loud},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    alone = processor(text=VIDEO, videos=loud, return_tensors="pt")["audio_codes"]
    noise, tone = processor.get_audio_codes([sounds / "noise.wav", sounds / "tone.wav"])
    assert torch.equal(inputs["audio_codes"], torch.cat([alone, noise, tone, alone]))
    assert inputs["audio_code_lengths"].tolist() == [len(part) for part in (alone, noise, tone, alone)]
    # each stretch of sound is told to be of the right one
    layout = [s.index for s in processor.explain(inputs).rows[0] if s.kind == "audio"]
    assert layout == sorted(layout)
    assert set(layout) == {0, 1, 2, 3}


def test_sound_of_videos_is_a_choice(processor, tmp_path):
    path, silent = (video_with_sound(tmp_path / f"{n}.mp4", 3, n) for n in (3, 0))
    default, used, unused = (
        processor(text=VIDEO, videos=path, use_audio_in_video=choice, return_tensors="pt")
        for choice in (None, True, False)
    )
    assert torch.equal(default["input_ids"], used["input_ids"])
    assert "audio_codes" in used
    assert "audio_codes" not in unused
    # without its sound it is the same as a silent file of the same pictures
    assert torch.equal(unused["input_ids"], processor(text=VIDEO, videos=silent, return_tensors="pt")["input_ids"])
    message = [{"role": "user", "content": [{"type": "video", "video": path}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert "audio_codes" not in processor.apply_chat_template(message, use_audio_in_video=False, **options)
    assert "audio_codes" in processor.apply_chat_template(message, load_audio_from_video=True, **options)
    # frames have no sound, even if it is asked for
    assert "audio_codes" not in processor(text=VIDEO, videos=[clip(4)], use_audio_in_video=True, return_tensors="pt")


def test_a_silent_track_is_heard_as_silence(processor, tmp_path):
    path = str(tmp_path / "silence.mp4")
    with av.open(path, "w") as container:
        pictures, audio = container.add_stream(H264, rate=10), container.add_stream("aac", rate=24000)
        pictures.height, pictures.width, pictures.pix_fmt, audio.layout = 64, 96, "yuv420p", "mono"
        for pixels in clip(30):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(pictures.encode())
        for first in range(0, 72000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 24000, first
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    inputs = processor(text=VIDEO, videos=path, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == int(3 * RATE) + 1


def test_the_tokenizer_is_loaded_by_the_first_sound_only(folder, sounds, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    silent = video_with_sound(tmp_path / "silent.mp4", 2, 0)
    processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=True)
    processor(text=f"<|image_pad|>{VIDEO}", images=MEDIA / "chart.png", videos=silent)
    processor(text=VIDEO, videos=video_with_sound(tmp_path / "loud.mp4", 2, 2), use_audio_in_video=False)
    assert processor.audio_codec_source.loaded is None
    processor(text=AUDIO, audio=sounds / "tone.wav")
    assert processor.audio_tokenizer is processor.audio_codec_source.loaded
    assert processor.audio_tokenizer.to(torch.float32).dtype == torch.float32


def test_a_repository_of_the_hub_is_read_like_a_folder(folder, sounds, processor, tmp_path):
    # what a download leaves in the cache
    commit = "0" * 40
    repository = tmp_path / "models--someone--omni"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    tokenizer = MiMoAudioTokenizer.from_pretrained("someone/omni", subfolder="audio_tokenizer", **where)
    assert tokenizer.config.hidden_size == processor.audio_tokenizer.config.hidden_size
    hub = AutoProcessor.from_pretrained("someone/omni", **where)
    assert hub.audio_codec_source.loaded is None
    (expected,) = processor.get_audio_codes(sounds / "tone.wav")
    assert torch.equal(hub.get_audio_codes(sounds / "tone.wav")[0], expected)


def test_long_sounds_show_their_progress(processor, sounds, monkeypatch, capfd):
    processor.get_audio_codes(sounds / "tone.wav")
    assert "hearing" not in capfd.readouterr().err
    monkeypatch.setattr(audio_codes_mimo_v2, "LONG_AUDIO", 2)
    # other tests turn bars off
    logging.enable_progress_bar()
    processor.get_audio_codes(sounds / "tone.wav")
    assert "3/3" in capfd.readouterr().err
    logging.disable_progress_bar()
    processor.get_audio_codes(sounds / "tone.wav")
    logging.enable_progress_bar()
    assert "hearing" not in capfd.readouterr().err


def test_a_saved_processor_finds_the_tokenizer_again(folder, processor, sounds, tmp_path):
    (expected,) = processor.get_audio_codes(sounds / "tone.wav")
    processor.save_pretrained(tmp_path)
    assert "audio_tokenizer" not in [path.name for path in tmp_path.iterdir()]
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_audio_codes(sounds / "tone.wav")[0], expected)
    # a folder of its own goes before the one it was saved with
    processor.audio_tokenizer.save_pretrained(tmp_path / "audio_tokenizer")
    own = AutoProcessor.from_pretrained(tmp_path)
    assert own.audio_codec_source.path == str(tmp_path)
    assert torch.equal(own.get_audio_codes(sounds / "tone.wav")[0], expected)
    given = MiMoV2Processor.from_pretrained(folder, audio_tokenizer=own.audio_tokenizer)
    assert given.audio_tokenizer is own.audio_tokenizer


def test_a_processor_of_a_relative_path_is_saved_for_any_working_directory(folder, sounds, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    processor = AutoProcessor.from_pretrained(folder.name)
    expected = processor.get_audio_codes(sounds / "tone.wav")
    processor.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(AutoProcessor.from_pretrained(".").get_audio_codes(sounds / "tone.wav")[0], expected[0])


def test_settings_come_from_the_released_config(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert isinstance(extractor, MiMoV2FeatureExtractor)
    config = json.loads((folder / "config.json").read_text())["processor_config"]
    assert (extractor.sampling_rate, extractor.feature_size) == (config["audio_sampling_rate"], config["audio_n_mels"])
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.video_audio_interleave_length == config["video_audio_interleave_length"]


def test_a_conversation_with_everything_equals_one_with_precomputed_features(folder, processor, sounds, tmp_path):
    """Text, image, video with sound and audio in one prompt, through processor and model."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    content = [
        {"type": "audio", "audio": str(sounds / "tone.wav")},
        {"type": "text", "text": "then"},
        {"type": "image", "image": str(MEDIA / "chart.png"), "max_pixels": 65536},
        {"type": "video", "video": video_with_sound(tmp_path / "video.mp4", 3, 3)},
        {"type": "text", "text": "Which of them is loud?"},
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "The last."},
        {"role": "user", "content": [{"type": "audio", "audio": str(sounds / "noise.wav")}]},
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        features = {
            "image": model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
            "video": model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]),
            "audio": model.get_audio_features(inputs["audio_codes"], inputs["audio_code_lengths"]),
        }
        texts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        again = model(**texts, mm_encoder_outputs=features).logits
        # put in by hand, place by place
        embeddings = model.model.embed_tokens(inputs["input_ids"])
        ids = {"image": processor.image_token_id, "video": processor.video_token_id, "audio": processor.audio_token_id}
        for kind, token in ids.items():
            rows = iter(torch.cat(features[kind].pooler_output))
            for place in (inputs["input_ids"][0] == token).nonzero()[:, 0]:
                embeddings[0, place] = next(rows)
            assert next(rows, None) is None
        by_hand = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_hand, logits, atol=1e-5, rtol=0)
    # every sound matters
    other = dict(inputs)
    other["audio_codes"] = inputs["audio_codes"].flip(0)
    with torch.no_grad():
        assert (model(**other).logits - logits).abs().max() > 1e-3
    # the prompt ends with text, so that greedy answers agree as well
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 5


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.wav").write_bytes(b"")
    (root / "text.wav").write_text("this is no sound, although its name says so " * 5)
    soundfile.write(root / "short.wav", np.zeros(1), 24000)
    soundfile.write(root / "nan.wav", np.full(24000, np.nan, np.float32), 24000, "FLOAT")
    shutil.copy(MEDIA / "clip.mp4", root / "silent.mp4")
    return root


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ("{bad}/missing.wav", r"audio\[1\]: expected a file, URL or base64, got no such file"),
        ("{bad}/empty.wav", r"audio\[1\]: expected a file with data, got an empty one"),
        ("{bad}/text.wav", r"audio\[1\]: expected"),
        ("{bad}/short.wav", r"audio\[1\]: expected more than 20 ms of sound, got"),
        ("{bad}/nan.wav", r"audio\[1\]: expected numbers as samples, got NaN"),
        ("{bad}/silent.mp4", r"audio\[1\]: expected a file with sound, got"),
        (np.zeros((0,), np.float32), r"audio\[1\]: expected samples, got \[0\]"),
        (np.zeros((20, 24000), np.float32), r"audio\[1\]: expected .* 1 to 8 channels, got \[20, 24000\]"),
        (np.full(24000, 3000.0, np.float32), r"audio\[1\]: expected floats of about -1 to 1, got 3000"),
        ({"audio_codes": torch.zeros(0, 20).long()}, r"audio\[1\]: expected integer codes \[frames, levels\]"),
        ({"audio_codes": torch.zeros(4, 20)}, r"audio\[1\]: expected integer codes .* got torch.float32"),
    ],
)
def test_bad_sound_is_named_in_one_line(processor, sounds, bad, audio, message):
    item = audio.format(bad=bad) if isinstance(audio, str) else audio
    with pytest.raises((ValueError, OSError), match=message) as error:
        processor(text=AUDIO * 2, audio=[sounds / "tone.wav", item], sampling_rate=24000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "audio\\[0\\]: expected 0 <= start < end, got -1"),
        ({"start": 2, "end": 1}, "audio\\[0\\]: expected 0 <= start < end, got 2 and 1"),
        ({"start": 30}, "audio\\[0\\]: expected"),
        ({"end": "soon"}, "audio\\[0\\]: expected start and end in seconds"),
    ],
)
def test_impossible_times_are_named(processor, sounds, options, message):
    with pytest.raises(ValueError, match=message):
        processor.get_audio_codes(sounds / "tone.wav", **options)


def test_more_or_fewer_sounds_than_placeholders(processor, sounds):
    with pytest.raises(ValueError, match=r"audio: expected 2, one per placeholder in the text, got 1"):
        processor(text=AUDIO * 2, audio=[sounds / "tone.wav"])
    with pytest.raises(ValueError, match=r"audio\[1\]: expected a placeholder in the text, got 1 for 2 audio"):
        processor(text=AUDIO, audio=[sounds / "tone.wav"] * 2)


def test_a_folder_without_tokenizer_says_so(folder, sounds, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "audio_tokenizer")
    processor = AutoProcessor.from_pretrained(copy)
    video = video_with_sound(tmp_path / "video.mp4", 2, 2)
    for call in (
        lambda: processor(text=AUDIO, audio=sounds / "tone.wav"),
        lambda: processor(text=VIDEO, videos=video),
    ):
        with pytest.raises(OSError, match=r"expected the released folder 'audio_tokenizer' with config\.json and"):
            call()
    # the rest works
    assert len(processor(text=VIDEO, videos=video, use_audio_in_video=False)["input_ids"])


def test_a_checkpoint_that_does_not_hear_says_so(sounds, tmp_path):
    deaf = write_random_checkpoint(tmp_path / "deaf", "tiny", dtype="bf16", vision=True)
    processor = AutoProcessor.from_pretrained(deaf)
    assert processor.audio_tokenizer is None
    video = video_with_sound(tmp_path / "video.mp4", 2, 2)
    assert "audio_codes" not in processor(text=VIDEO, videos=video)
    with pytest.raises(ValueError, match=r"audio\[0\]: expected a checkpoint that hears"):
        processor(text=AUDIO, audio=sounds / "tone.wav")
    with pytest.raises(ValueError, match="use_audio_in_video: expected a checkpoint that hears"):
        processor(text=VIDEO, videos=video, use_audio_in_video=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"video_audio_interleave_length": -2}, ValueError, "video_audio_interleave_length: expected seconds or -1"),
        ({"use_per_grid_t_timestamps": True}, NotImplementedError, "use_per_grid_t_timestamps: expected False"),
        ({"audio_tokenizer": "a path"}, TypeError, "audio_tokenizer: expected a MiMoAudioTokenizer, got a str"),
    ],
)
def test_settings_that_cannot_be(folder, settings, error, message):
    with pytest.raises(error, match=message):
        MiMoV2Processor.from_pretrained(folder, **settings)
