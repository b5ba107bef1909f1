"""MiMoV2FeatureExtractor: spectrograms by their definition, real files decoded a second way, and what it refuses."""

import base64
import gc
import http.server
import io
import itertools
import json
import math
import threading
import tracemalloc
import weakref
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from audio_media import av_file, decode_frames, decode_wave, heard, mel_by_definition, sound, sound_file
from media import image_file, picture
from test_image_processing_mimo_v2 import one_line_error

from modeling_mimo.processors import audio_files_mimo_v2 as audio_files
from modeling_mimo.processors import feature_extraction_mimo_v2
from modeling_mimo.processors.audio_files_mimo_v2 import (
    Audio,
    flatten_audio,
    open_audio,
    open_soundtrack,
    resampled,
)
from modeling_mimo.processors.feature_extraction_mimo_v2 import MiMoV2FeatureExtractor


CONFIG = Path(__import__("modeling_mimo").__file__).parent / "data/MiMo-V2.5/config.json"
RATE = 24000
RATES = (8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000)
# samples per channel of a block, 2.7 s
LARGEST_BLOCK = 2**16


@pytest.fixture(scope="module")
def extractor():
    return MiMoV2FeatureExtractor()


@pytest.fixture
def warnings_of(monkeypatch):
    """What the modules warn of."""
    messages = []
    for module in (audio_files, feature_extraction_mimo_v2):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    monkeypatch.setattr(feature_extraction_mimo_v2.logger, "warning_once", messages.append)
    return messages


def features_of(extractor, audio, sampling_rate=RATE, **kwargs):
    """[frames, 128] of one audio, its segments put together."""
    inputs = extractor(audio, sampling_rate, **kwargs)
    assert inputs["segments_per_audio"].tolist() == [len(inputs["feature_lengths"])]
    parts = zip(inputs["input_features"], inputs["feature_lengths"].tolist())
    return torch.cat([segment[:length] for segment, length in parts])


def assert_mel(got, samples, tolerance=1e-4, **kwargs):
    expected = mel_by_definition(samples, **kwargs)
    assert got.shape == expected.shape
    assert np.abs(got.numpy() - expected).max() <= tolerance


def assert_hears(extractor, audio, samples, rate, **kwargs):
    """The spectrogram is that of `samples` [n, channels] at `rate`, resampled at once."""
    assert_mel(features_of(extractor, audio, **kwargs), heard(samples, rate))


def all_samples(audio):
    """[n, channels] of an opened audio, whose blocks can be read twice."""
    blocks = list(audio.blocks())
    assert all(block.dtype == np.float32 and block.flags.c_contiguous for block in blocks)
    assert sum(map(len, audio.blocks())) == sum(map(len, blocks))
    return np.concatenate(blocks)


# the spectrogram


TIME = np.arange(RATE // 2) / RATE
SOUNDS = {
    "noise": sound(0.5, RATE)[:, 0],
    "tone": 0.5 * np.sin(2 * np.pi * 440 * TIME),
    "loud tone": np.round(32767 * np.sin(2 * np.pi * 3000 * TIME)) / 32768,
    "sweep": 0.3 * np.sin(2 * np.pi * 12000 * TIME**2),
    "click": np.eye(1, 4000, 1777)[0],
    "silence": np.zeros(5000),
    "speech-like": sound(0.5, RATE, seed=3)[:, 0] * np.repeat([0, 1, 0.001, 0], RATE // 8),
}


@pytest.mark.parametrize("name", SOUNDS)
def test_mel_is_that_of_the_definition(extractor, name):
    samples = SOUNDS[name].astype(np.float32)
    assert_mel(features_of(extractor, samples), samples)


def test_mel_of_other_settings():
    extractor = MiMoV2FeatureExtractor(
        sampling_rate=16000, feature_size=40, n_fft=512, hop_length=200, win_length=512, fmin=60.0, fmax=7000.0
    )
    samples = sound(0.3, 16000)[:, 0]
    got = features_of(extractor, samples, 16000)
    assert_mel(got, np.float32(samples), rate=16000, bins=40, size=512, hop=200, lowest=60.0, highest=7000.0)


@pytest.mark.parametrize("hop", [60, 500, 959, 960])
def test_the_end_is_reflected_whatever_the_hop(hop):
    extractor = MiMoV2FeatureExtractor(hop_length=hop)
    for last in (1, 40, 479, 480, 481, 700):
        samples = np.concatenate(list(Stream([961, 960, last]).blocks()))[:, 0]
        assert_mel(torch.cat(list(extractor.segments(Stream([961, 960, last])))), samples, hop=hop)


def test_silence_is_the_floor(extractor):
    assert torch.equal(features_of(extractor, np.zeros(2400)), torch.full((11, 128), math.log(1e-7)))


def test_known_sizes(extractor):
    """A minute and a frame: two segments, the second of which is one frame, padded with zeros."""
    inputs = extractor([sound(60, RATE)[:, 0], sound(1.0, RATE)[:, 0]], RATE)
    assert inputs["input_features"].shape == (3, 6000, 128)
    assert inputs["input_features"].dtype == torch.float32
    assert inputs["feature_lengths"].tolist() == [6000, 1, 101]
    assert inputs["segments_per_audio"].tolist() == [2, 1]
    assert inputs["feature_lengths"].dtype == inputs["segments_per_audio"].dtype == torch.long
    assert not inputs["input_features"][1, 1:].any()
    assert not inputs["input_features"][2, 101:].any()
    assert list(inputs) == extractor.model_input_names
    arrays = extractor(sound(1.0, RATE)[:, 0], RATE, return_tensors="np")
    assert np.array_equal(arrays["input_features"], inputs["input_features"][2:, :101].numpy())
    assert isinstance(arrays["feature_lengths"], np.ndarray)


class Stream(Audio):
    """Noise that nobody holds as a whole; `lengths`: samples of its blocks."""

    name = "audio[0]"
    duration = None

    def __init__(self, lengths, rate=RATE, channels=1):
        self.lengths, self.rate, self.channels = lengths, rate, channels
        self.read, self.given = 0, []

    def blocks(self):
        random = np.random.default_rng(0)
        for length in self.lengths:
            block = random.uniform(-0.5, 0.5, (length, self.channels)).astype(np.float32)
            self.given.append(weakref.ref(block))
            self.read += length
            yield block
            del block


LENGTHS = [481, 482, 600, 719, 720, 721, 959, 960, 961, 1200, 1440, 2399, 2400]
# around the borders of segments of 20 frames, which have 1 + n // 240 frames in all
LENGTHS += [240 * frames + offset for frames in (19, 20, 21, 39, 40, 41, 60) for offset in (-1, 0, 1)]


@pytest.mark.parametrize("step", [1000, 241, 10**6])
def test_segments_put_together_are_the_whole(step):
    """At every length, whatever the blocks are, the borders of segments leave no trace."""
    extractor = MiMoV2FeatureExtractor(segment_size=20)
    whole = MiMoV2FeatureExtractor(segment_size=10**6)
    for length in LENGTHS:
        blocks = [min(step, length - at) for at in range(0, length, step)]
        samples = np.concatenate(list(Stream(blocks).blocks()))
        segments = list(extractor.segments(Stream(blocks)))
        assert [len(segment) for segment in segments[:-1]] == [20] * ((length // 240) // 20)
        assert 1 <= len(segments[-1]) <= 20
        got = torch.cat(segments)
        assert len(got) == 1 + length // 240
        assert torch.allclose(got, features_of(whole, samples[:, 0]), rtol=0, atol=1e-5)
        if length < 3000:
            assert_mel(got, samples[:, 0])


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("length", [240 * 5999, 240 * 6000, 24000 * 61])
def test_borders_of_released_segments(extractor, length, offset):
    samples = sound(1, length + offset)[:, 0]
    segments = list(extractor.segments(open_audio(samples, "audio[0]", RATE)))
    total = 1 + (length + offset) // 240
    assert [len(segment) for segment in segments] == ([6000, total - 6000] if total > 6000 else [total])
    # the middle of frame 5990 is sample 240 x 5990; of the part, what lies off its own reflected ends
    first = 5980
    part = mel_by_definition(np.float32(samples[240 * first :]))
    assert np.abs(torch.cat(segments)[first + 2 :].numpy() - part[2:]).max() <= 1e-4


def test_stretches_around_the_segment_border_have_no_seam():
    samples = sound(3, RATE)[:, 0]
    one = torch.cat(list(MiMoV2FeatureExtractor(segment_size=7).segments(open_audio(samples, "audio[0]", RATE))))
    assert_mel(one, np.float32(samples))


# resampling


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_a_stream_is_resampled_as_the_whole_is(rate, channels):
    lengths = [7, 1, 480, 65536, 333, 10000]
    for blocks in (lengths, [481], [sum(lengths)]):
        samples = np.concatenate(list(Stream(blocks, rate, channels).blocks()))
        got = np.concatenate(list(resampled(Stream(blocks, rate, channels), RATE)))
        expected = heard(samples, rate)
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-6


def test_channels_are_averaged_with_equal_weights():
    """And loud ones that cancel each other are silence."""
    left = sound(0.5, 48000)[:, 0]
    silent = list(resampled(open_audio(np.stack([left, -left]), "audio[0]", 48000), RATE))
    assert np.abs(np.concatenate(silent)).max() < 1e-6
    third = list(resampled(open_audio(np.stack([left, left, -left]), "audio[0]", 48000), RATE))
    assert np.abs(np.concatenate(third) - heard(left[:, None], 48000) / 3).max() < 1e-6


def test_start_and_end_cut_before_resampling(extractor):
    samples = sound(2, 44100, 2)
    for start, end in ((0.5, None), (None, 0.25), (0.1234, 1.5), (1.9, 100.0), (0, 2)):
        first, last = round((start or 0) * 44100), len(samples) if end is None else round(end * 44100)
        part = np.float32(samples[first:last])
        assert_hears(extractor, (samples, 44100), part, 44100, start=start, end=end)


def test_a_window_far_into_a_stream():
    """Windows begin and end inside, at and across blocks."""
    blocks = [1000, 1, 999, 3000]
    samples = np.concatenate(list(Stream(blocks).blocks()))[:, 0]
    for first, last in ((0, 1000), (1000, 1001), (999, 2001), (1500, 1600), (1001, 2000), (4999, 5000), (10, 10**6)):
        parts = list(resampled(Stream(blocks), RATE, first / RATE, last / RATE))
        assert np.array_equal(np.concatenate(parts), samples[first:last])
    stream = Stream(itertools.repeat(1000))
    assert sum(map(len, resampled(stream, RATE, 0.1, 0.2))) == 2400
    assert stream.read == 5000
    assert list(resampled(Stream(blocks), RATE, 1.0)) == []


# long audio


def held_bytes():
    """Of all tensors there are."""
    storages = (item.untyped_storage() for item in gc.get_objects() if type(item) is torch.Tensor)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_does_not_grow_with_the_audio(extractor):
    """Half an hour would be 350 MB of samples; its segments come while it is read."""
    stream = Stream([48000] * 60 * 30, rate=48000, channels=2)
    gc.collect()
    tracemalloc.start()
    segments = extractor.segments(stream)
    most, peaks, alive = [], [], []
    for minute, segment in enumerate(itertools.islice(segments, 6)):
        assert len(segment) == 6000
        # a second for the block, and what is held for the end
        assert stream.read <= 48000 * (60 * (minute + 1) + 2)
        alive.append(sum(block() is not None for block in stream.given))
        del segment
        most.append(tracemalloc.get_traced_memory()[1])
        peaks.append(held_bytes())
        # the list of all objects alone is 10 MB behind many other tests
        tracemalloc.reset_peak()
    tracemalloc.stop()
    segments.close()
    assert max(alive) <= 3
    assert max(peaks) <= peaks[0] + 1e6
    # blocks of a second, as floats and as they are checked
    assert max(most) < 10e6


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "m4a", "array"])
def test_files_are_read_in_blocks(tmp_path, format):
    samples = sound(20, 16000)
    if format == "array":
        item = (samples, 16000)
    elif format == "m4a":
        item = av_file(tmp_path / "a.m4a", samples, 16000)
    else:
        item = sound_file(samples, 16000, format)
    lengths = [len(block) for block in open_audio(item, "audio[0]", RATE).blocks()]
    assert sum(lengths) == pytest.approx(320000, abs=2048)
    assert max(lengths) <= LARGEST_BLOCK + 2048
    assert len(lengths) < 10


# real files


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
def test_wav_of_integers(extractor, subtype, rate, channels):
    file = sound_file(sound(0.1, rate, channels), rate, "WAV", subtype)
    samples, found = decode_wave(file)
    assert found == rate
    audio = open_audio(file, "audio[0]", RATE)
    assert (audio.rate, audio.channels, audio.duration) == (rate, channels, len(samples) / rate)
    assert np.array_equal(all_samples(audio), np.float32(samples))
    if rate in (22050, 48000):
        assert_hears(extractor, file, samples, rate)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [11025, 44100, 96000])
@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        ("WAV", "FLOAT"),
        ("WAV", "DOUBLE"),
        ("FLAC", "PCM_16"),
        ("FLAC", "PCM_24"),
        ("AIFF", "PCM_16"),
        ("W64", "FLOAT"),
    ],
)
def test_other_lossless_files(extractor, format, subtype, rate, channels):
    written = sound(0.25, rate, channels)
    file = sound_file(written, rate, format, subtype)
    audio = open_audio(file, "audio[0]", RATE)
    assert (audio.rate, audio.channels, audio.duration) == (rate, channels, len(written) / rate)
    assert np.abs(all_samples(audio) - written).max() <= (1e-6 if "PCM" not in subtype else 2**-15)
    samples, _ = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
    assert np.array_equal(all_samples(audio), samples)
    assert_hears(extractor, file, samples, rate)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("format", "subtype", "rate"),
    [
        ("MP3", None, 16000),
        ("MP3", None, 44100),
        ("MP3", None, 48000),
        ("OGG", "VORBIS", 22050),
        ("OGG", "VORBIS", 48000),
        ("OGG", "OPUS", 48000),
    ],
)
def test_compressed_files(extractor, format, subtype, rate, channels):
    written = sound(1.0, rate, channels)
    file = sound_file(written, rate, format, subtype)
    samples, found = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
    audio = open_audio(file, "audio[0]", RATE)
    assert (audio.rate, audio.channels) == (found, channels)
    # the decoder of MP3 rounds differently when it is read in blocks
    assert np.abs(all_samples(audio) - samples).max() <= 1e-6
    # neither what the encoder put in front, nor a shift
    assert len(samples) == len(written)
    assert np.corrcoef(samples[:, 0], written[:, 0])[0, 1] > 0.8
    assert_hears(extractor, file, all_samples(audio), rate)


@pytest.mark.parametrize("codec", ["libmp3lame", "aac", "libopus", "flac", "ac3", "pcm_s16le", "pcm_f64le"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_files_of_ffmpeg(extractor, tmp_path, codec, channels):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    if codec == "libmp3lame" and channels > 2:
        pytest.skip("MP3 has two channels at most")
    path = av_file(tmp_path / "a.mkv", sound(1.0, 48000, channels), 48000, codec)
    samples, rate, _ = decode_frames(path)
    audio = open_audio(path, "audio[0]", RATE)
    assert (audio.rate, audio.channels) == (rate, channels)
    assert audio.duration == pytest.approx(1.0, abs=0.03)
    assert np.array_equal(all_samples(audio), np.float32(samples))
    assert_hears(extractor, path, np.float32(samples), rate)


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.mov", "a.ts", "a.aac", "a.webm"])
@pytest.mark.parametrize("pictures", [0, 10])
def test_sound_of_containers(extractor, tmp_path, name, pictures):
    if pictures and name in ("a.m4a", "a.aac", "a.webm"):
        pytest.skip("for sound alone, or no pictures of this codec")
    codec, rate = ("libopus", 48000) if name == "a.webm" else ("aac", 44100)
    path = av_file(tmp_path / name, sound(1.0, rate, 2), rate, codec, pictures=pictures)
    samples, found, _ = decode_frames(path)
    audio = open_audio(path, "audio[0]", RATE)
    assert (audio.rate, audio.channels) == (found, 2)
    assert np.array_equal(all_samples(audio), np.float32(samples))
    assert len(samples) / rate == pytest.approx(1.0, abs=0.06)
    assert_hears(extractor, path, np.float32(samples), rate)
    assert_hears(extractor, Path(path).read_bytes(), np.float32(samples), rate)


def test_uncompressed_sound_of_a_film_is_whole_or_cut_off(tmp_path):
    """Its header counts samples, of which a packet has many."""
    path = av_file(tmp_path / "a.mov", sound(1.0, 48000, 2), 48000, "pcm_s16le", pictures=10)
    # the index in front, so that a file that is cut off still has one
    whole = str(tmp_path / "whole.mov")
    with av.open(path) as source, av.open(whole, "w", options={"movflags": "faststart"}) as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    expected, _, _ = decode_frames(whole)
    assert len(expected) == 48000
    assert np.array_equal(all_samples(open_soundtrack(whole, "videos[0]")), np.float32(expected))
    data = Path(whole).read_bytes()
    cut = tmp_path / "cut.mov"
    cut.write_bytes(data[: -len(data) // 4])
    assert "cut off" in one_line_error(lambda: open_soundtrack(str(cut), "videos[0]"), "videos[0]: ")


def test_an_mp3_that_does_not_say_its_length_is_read_to_its_end():
    """libsndfile guesses it from the first frames, here those of a pause."""
    samples = sound(12, 48000, 2) * np.where(np.arange(12 * 48000) < 4 * 48000, 1e-3, 1)[:, None]
    file = io.BytesIO()
    soundfile.write(file, samples, 48000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = file.getvalue()
    header = data.index(b"Xing")
    bare = data[data.index(data[:3], header) :]
    expected, _, _ = decode_frames(io.BytesIO(bare))
    assert len(soundfile.read(io.BytesIO(bare))[0]) < len(expected)
    assert np.array_equal(all_samples(open_audio(bare, "audio[0]", RATE)), expected)
    # a tag with a cover in front of the header
    cover = image_file(picture(200, 300), "PNG")
    size = bytes(len(cover) >> shift & 127 for shift in (21, 14, 7, 0))
    tagged = b"ID3\x04\x00\x00" + size + cover + data
    assert all_samples(open_audio(tagged, "audio[0]", RATE)).shape == samples.shape
    cut = open_audio(tagged[: len(tagged) // 2], "audio[0]", RATE)
    assert "cut off" in one_line_error(lambda: all_samples(cut), "audio[0]: ")


def test_a_flac_stream_of_unknown_length_is_read_to_its_end():
    samples = sound(1.0, 44100)
    data = bytearray(sound_file(samples, 44100, "FLAC", "PCM_16"))
    # 36 bits in the first header, 4 of them with others
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    audio = open_audio(bytes(data), "audio[0]", RATE)
    assert len(all_samples(audio)) == 44100
    assert audio.duration is None or audio.duration == 1.0


def test_a_wav_from_a_pipe_is_read_to_its_end():
    data = bytearray(sound_file(sound(1.0, 44100), 44100, "WAV", "PCM_16"))
    place = data.index(b"data")
    for length in (0xFFFFFFFF, 0x7FFFF000):
        data[place + 4 : place + 8] = data[4:8] = length.to_bytes(4, "little")
        assert len(all_samples(open_audio(bytes(data), "audio[0]", RATE))) == 44100


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A web server of a folder with a.wav: its address."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "a.wav").write_bytes(WAV)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


WAV = sound_file(sound(0.1, 16000, 2), 16000, "WAV", "PCM_16")


def test_all_ways_to_name_a_file_are_equal(extractor, server, tmp_path, monkeypatch):
    path = tmp_path / "a sound.wav"
    path.write_bytes(WAV)
    text = base64.b64encode(WAV).decode()
    expected = features_of(extractor, WAV)
    assert_mel(expected, heard(decode_wave(WAV)[0], 16000))
    monkeypatch.chdir(tmp_path)
    ways = [path, str(path), "a sound.wav", path.as_uri(), bytearray(WAV), memoryview(WAV), io.BytesIO(WAV), text]
    ways += [f"data:audio/wav;base64,{text}", f"{server}/a.wav"]
    for way in ways:
        assert torch.equal(features_of(extractor, way), expected)
    with path.open("rb") as file:
        assert torch.equal(features_of(extractor, file), expected)
    message = one_line_error(lambda: extractor([WAV, f"{server}/b.wav"]), "audio[1]: ", OSError)
    assert "404" in message


# arrays


def test_all_kinds_of_arrays_are_equal(extractor):
    whole = np.round(sound(0.1, 16000, 2) * 32767).astype(np.int16)
    floats = np.float32(whole) / 32768
    expected = features_of(extractor, (floats, 16000))
    assert_mel(expected, heard(floats, 16000))
    ways = [whole, whole.T, floats.T, np.float64(floats), whole.astype(">i2"), whole[::-1][::-1]]
    ways += [whole.astype(np.int32) * 65536, torch.from_numpy(whole), torch.from_numpy(floats).T]
    ways += [torch.from_numpy(floats).double().requires_grad_(), torch.from_numpy(floats)[None], whole[None]]
    for way in ways:
        assert torch.allclose(features_of(extractor, way, 16000), expected, rtol=0, atol=1e-5)
    for pair in ((whole, 16000), (floats.T.tolist(), 16000.0), {"array": floats, "sampling_rate": 16000}):
        # a rate of its own goes first
        assert torch.allclose(features_of(extractor, pair, 48000), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.uint32, np.int32, np.float16, torch.bfloat16])
def test_number_types_have_a_full_scale(dtype):
    wave = sound(0.1, RATE)[:, 0]
    if dtype is torch.bfloat16:
        array = torch.from_numpy(wave).to(dtype)
    elif dtype is np.float16:
        array = wave.astype(dtype)
    else:
        bits = np.iinfo(dtype).bits
        middle = 2 ** (bits - 1) if np.dtype(dtype).kind == "u" else 0
        array = (np.round(wave * 2 ** (bits - 1)) + middle).astype(dtype)
    got = all_samples(open_audio(array, "audio[0]", RATE))[:, 0]
    step = {np.uint8: 2**-7, np.int8: 2**-7, torch.bfloat16: 2**-9}.get(dtype, 2**-11)
    assert np.abs(got - wave).max() <= step


def test_nested_lists_are_flattened():
    a, b = np.zeros(3), torch.zeros(2, 9)
    assert flatten_audio(None) == flatten_audio([]) == flatten_audio([[], ()]) == []
    assert flatten_audio("a.wav") == ["a.wav"]
    assert flatten_audio(["a.wav", ["b.wav", ("c.wav",)]]) == ["a.wav", "b.wav", "c.wav"]
    assert [id(item) for item in flatten_audio([a, [b]])] == [id(a), id(b)]
    pair, mapping = (a, 16000), {"array": a, "sampling_rate": 8000}
    assert [id(item) for item in flatten_audio([pair, mapping])] == [id(pair), id(mapping)]
    assert flatten_audio(pair) == [pair]
    assert flatten_audio(([0.5, 0.25], 16000)) == [([0.5, 0.25], 16000)]
    (numbers,) = flatten_audio([0.5, -0.25, 0])
    assert numbers.tolist() == [0.5, -0.25, 0]
    assert [item.tolist() for item in flatten_audio([[0.5], [0.25, 1.0]])] == [[0.5], [0.25, 1.0]]
    assert [item.shape for item in flatten_audio(np.zeros((2, 1, 50)))] == [(1, 50)] * 2


def test_arrays_without_a_rate_give_a_warning(extractor, warnings_of):
    samples = sound(0.1, RATE)[:, 0]
    for quiet in (WAV, (samples, 24000), {"array": samples, "sampling_rate": 24000}):
        extractor(quiet)
    extractor(samples, 24000)
    assert warnings_of == []
    assert torch.equal(extractor(samples)["input_features"], extractor(samples, RATE)["input_features"])
    assert len(warnings_of) == 1
    assert "24000 Hz" in warnings_of[0]


# the sound of videos


def loud(samples, rate):
    """Seconds of the first and the last sample that is no silence."""
    places = np.flatnonzero(np.abs(samples).max(axis=1) > 0.05)
    return places[0] / rate, (places[-1] + 1) / rate


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts"])
@pytest.mark.parametrize(("sound_at", "pictures_at"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (1.2, 0.3), (0.2, 2.0)])
def test_sound_is_aligned_with_the_first_picture(tmp_path, name, sound_at, pictures_at):
    path = av_file(
        tmp_path / name, sound(1.5, 48000, 2), 48000, starts=sound_at, pictures=30, pictures_start=pictures_at
    )
    with av.open(path) as container:
        stream = container.streams.video[0]
        first = next(container.decode(stream))
        origin = float(first.pts * stream.time_base)
    track = open_soundtrack(path, "videos[0]", origin)
    samples, begin = all_samples(track) if sound_at + 1.5 > pictures_at else None, sound_at - pictures_at
    expected, rate, at = decode_frames(path)
    # plain: as many zeros, or samples dropped, as the clocks are apart
    apart = round((at - origin) * rate)
    plain = np.concatenate([np.zeros((max(0, apart), 2)), expected[max(0, -apart) :]])
    if samples is None:
        assert list(track.blocks()) == []
        assert track.duration == pytest.approx(0, abs=0.05)
        return
    assert len(samples) == len(plain)
    assert np.abs(samples - plain).max() <= 1e-6
    start, end = loud(samples, rate)
    # 25 ms: a frame of AAC that the encoder puts in front
    assert start == pytest.approx(max(0, begin), abs=0.025)
    assert end == pytest.approx(begin + 1.5, abs=0.025)
    assert track.duration == pytest.approx(begin + 1.5, abs=0.05)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_pauses_without_packets_are_silence(tmp_path, name):
    samples = sound(2.0, 48000)
    path = av_file(tmp_path / name, samples, 48000, pictures=30, pauses={0.5: 0.25, 1.5: 3.0})
    audio = open_audio(path, "audio[0]", RATE)
    got = all_samples(audio)[:, 0]
    quiet = np.abs(got) < 1e-3
    # of stretches of at least 50 ms
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet, [0]])))
    pauses = [(a / 48000, (b - a) / 48000) for a, b in edges.reshape(-1, 2) if b - a > 2400]
    assert len(pauses) == 2
    # pauses begin and end with a frame, and that of an encoder overlaps its neighbour
    for (at, length), (expected_at, expected) in zip(pauses, [(0.5, 0.25), (1.75, 3.0)]):
        assert at == pytest.approx(expected_at, abs=0.05)
        assert length == pytest.approx(expected, abs=0.05)
    assert len(got) / 48000 == pytest.approx(5.25, abs=0.06)


def test_rounded_timestamps_are_no_pauses(tmp_path):
    """Matroska rounds them to milliseconds: sound stays as it was."""
    path = av_file(tmp_path / "a.mkv", sound(3.0, 44100), 44100, "flac", pictures=30)
    expected, _, _ = decode_frames(path)
    assert np.array_equal(all_samples(open_soundtrack(path, "videos[0]")), np.float32(expected))


def test_a_video_without_sound_has_no_soundtrack(tmp_path, extractor):
    path = av_file(tmp_path / "a.mp4", pictures=10)
    assert open_soundtrack(path, "videos[0]") is None
    message = one_line_error(lambda: extractor([WAV, path]), "audio[1]: ")
    assert "with sound" in message


def test_a_track_without_packets_is_no_soundtrack(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        container.add_stream("aac", rate=44100).layout = "mono"
        for _ in range(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), dtype=np.uint8))))
        container.mux(video.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1
    assert open_soundtrack(str(path), "videos[0]") is None


# settings


def test_settings_of_a_release_are_those_of_its_config(tmp_path, extractor):
    config = json.loads(CONFIG.read_text())
    assert MiMoV2FeatureExtractor.from_processor_config(config["processor_config"]).to_dict() == extractor.to_dict()
    config["processor_config"] |= {"audio_sampling_rate": 16000, "audio_n_mels": 80, "audio_segment_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stub = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stub))
    loaded = MiMoV2FeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.sampling_rate, loaded.feature_size, loaded.segment_size) == (16000, 80, 50)
    assert (loaded.n_fft, loaded.hop_length, loaded.win_length) == (960, 240, 960)
    assert loaded(sound(1.0, 16000)[:, 0], 16000)["input_features"].shape == (2, 50, 80)


def test_what_is_saved_loads_back_equal(tmp_path):
    saved = MiMoV2FeatureExtractor(feature_size=32, segment_size=30, fmin=20, fmax=8000.0)
    saved.save_pretrained(tmp_path)
    loaded = MiMoV2FeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert torch.equal(features_of(loaded, WAV), features_of(saved, WAV))
    assert MiMoV2FeatureExtractor.from_pretrained(tmp_path, segment_size=7).segment_size == 7


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"feature_size": -1}, "feature_size"),
        ({"n_fft": 960.5}, "n_fft"),
        ({"hop_length": True}, "hop_length"),
        ({"hop_length": 961}, "hop_length"),
        ({"win_length": 1000}, "win_length"),
        ({"segment_size": 0}, "segment_size"),
        ({"segment_size": None}, "segment_size"),
        ({"fmin": -1}, "fmin, fmax"),
        ({"fmin": math.nan}, "fmin, fmax"),
        ({"fmax": 12001}, "fmin, fmax"),
        ({"fmin": 500, "fmax": 500}, "fmin, fmax"),
        ({"fmax": "high"}, "fmin, fmax"),
        ({"n_mels": 80}, "`n_mels`"),
    ],
)
def test_settings_that_cannot_be_are_refused(kwargs, name):
    one_line_error(lambda: MiMoV2FeatureExtractor(**kwargs), f"{name}: ")


# what it refuses


GOOD = sound(0.1, RATE)[:, 0]
FLAC = sound_file(sound(2, 16000), 16000, "FLAC")
CUT = {
    "WAV": (sound_file(sound(2, 16000), 16000, "WAV", "PCM_16"), "cut off"),
    "AIFF": (sound_file(sound(2, 16000), 16000, "AIFF", "PCM_16"), "cut off"),
    "AU": (sound_file(sound(2, 16000), 16000, "AU", "PCM_16"), "cut off"),
    "W64": (sound_file(sound(2, 16000), 16000, "W64", "PCM_16"), "cut off"),
    "RF64": (sound_file(sound(2, 16000), 16000, "RF64", "PCM_16"), "cut off"),
    "MP3": (sound_file(sound(2, 16000), 16000, "MP3"), "the file is cut off"),
    "FLAC": (FLAC, "a whole audio file"),
}


@pytest.mark.parametrize("format", CUT)
def test_a_file_that_is_cut_off_is_refused(extractor, format):
    file, part = CUT[format]
    assert len(features_of(extractor, file)) == 201
    message = one_line_error(lambda: extractor([GOOD, file[: len(file) * 6 // 10]], RATE), "audio[1]: ")
    assert part in message


def test_an_mp4_that_is_cut_off_is_refused(extractor, tmp_path):
    path = tmp_path / "a.m4a"
    data = Path(av_file(path, sound(2, 16000), 16000)).read_bytes()
    assert "a whole audio or video file" in one_line_error(lambda: extractor(data[:-3000]), "audio[0]: ")
    # with the index in front, a cut loses packets only
    with (
        av.open(str(path)) as source,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as fast,
    ):
        stream = fast.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                fast.mux(packet)
    data = (tmp_path / "b.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data)) as container:
        places = [packet.pos for packet in container.demux(audio=0) if packet.size]
    features_of(extractor, data)
    for cut in (places[20], places[20] + 9):
        assert "cut off" in one_line_error(lambda cut=cut: extractor(data[:cut]), "audio[0]: ")


BAD_AUDIO = {
    "empty array": (np.zeros(0), "samples, got [0]"),
    "no samples in channels": (np.zeros((2, 0)), "samples, got [2, 0]"),
    "no channels": (np.zeros((0, 500)), "got [0, 500]"),
    "one sample": (np.ones(1), "more than 20 ms of sound, got 0.0417 ms"),
    "20 ms": (np.ones(480) / 2, "more than 20 ms of sound, got 20 ms"),
    "one sample at 8 kHz": ((np.ones(1), 8000), "more than 20 ms of sound"),
    "NaN": (np.array([0.0, np.nan] * 999), "floats of about -1 to 1, got nan to nan"),
    "infinity": (np.array([0.0, np.inf] * 999), "floats of about -1 to 1, got 0 to inf"),
    "floats of 16 bits": (GOOD * 32768, "floats of about -1 to 1, got -"),
    "64 bits": (np.zeros(999, dtype=np.int64), "floats or integers of 8, 16 or 32 bits, got int64"),
    "whole numbers": ([0, 1, 2] * 500, "floats or integers of 8, 16 or 32 bits, got int64"),
    "bools": (np.zeros(999, dtype=bool), "floats or integers of 8, 16 or 32 bits, got bool"),
    "complex": (np.zeros(999, dtype=np.complex64), "got complex64"),
    "nine channels": (np.zeros((9, 999)), "with 1 to 8 channels, got [9, 999]"),
    "no dimension": (torch.tensor(3.0), "[n], [channels, n] or [n, channels]"),
    "four dimensions": (np.zeros((1, 1, 1, 9)), "[n], [channels, n] or [n, channels]"),
    "unequal channels": (([[0.0, 0.5], [0.5]], 16000), "as many samples in every channel"),
    "rate of 0": ((GOOD, 0), "a sampling rate in Hz above 0, got 0"),
    "negative rate": ((GOOD, -16000), "a sampling rate in Hz above 0, got -16000"),
    "rate that is no number": ({"array": GOOD, "sampling_rate": None}, "a sampling rate in Hz above 0, got None"),
    "rate of NaN": ((GOOD, math.nan), "a sampling rate in Hz above 0, got nan"),
    "mapping": ({"array": GOOD}, "`array` and `sampling_rate`, got array"),
    "object": (object(), "a path, URL, bytes, base64, file object, array or pair (samples, rate), got object"),
    "no bytes": (b"", "the bytes of a file, got none"),
    "text": (b"no sound at all" * 20, "a whole audio or video file, got 300 bytes"),
    "picture": (image_file(picture(64, 64), "PNG"), "a container that is opened"),
    "header only": (WAV[:44], "cut off"),
    "WAV of NaN": (sound_file(np.full(999, np.nan), RATE, "WAV", "FLOAT"), "numbers as samples, got NaN"),
    "WAV without samples": (sound_file(np.zeros((0, 1)), RATE, "WAV", "PCM_16"), "more than 20 ms of sound, got 0 ms"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_audio_is_named_by_its_index(extractor, name):
    item, part = BAD_AUDIO[name]
    message = one_line_error(lambda: extractor([[GOOD], [item]], RATE), "audio[1]: ")
    assert part in message
    assert len(message) < 300


def test_bad_paths_are_named_by_their_index(extractor, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.txt").write_text("no sound at all\n" * 99)
    (tmp_path / "a.raw").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "a.jpg").write_bytes(image_file(picture(64, 64), "JPEG"))
    for name, part in (
        ("missing.wav", "no such file"),
        (".", "a folder"),
        ("empty.wav", "an empty one"),
        ("text.txt", "text.txt"),
        ("a.raw", "a.raw"),
        ("a.jpg", "a.jpg"),
    ):
        message = one_line_error(
            lambda name=name: extractor([GOOD, tmp_path / name], RATE), "audio[1]: ", (ValueError, OSError)
        )
        assert part in message


@pytest.mark.parametrize(
    ("start", "end", "part"),
    [
        (-1, None, "0 <= start < end, got -1"),
        (0.05, 0.05, "0 <= start < end, got 0.05 and 0.05 s"),
        (0.05, 0.01, "0 <= start < end"),
        (math.nan, None, "0 <= start < end"),
        (None, math.nan, "0 <= start < end"),
        (None, 0, "0 <= start < end"),
        (math.inf, None, "0 <= start < end"),
        ("1", None, "start and end in seconds, got '1'"),
        (0.2, None, "more than 20 ms of sound, got 0 ms"),
        (0.09, None, "more than 20 ms of sound, got 10 ms"),
        (0.01, 0.02, "more than 20 ms of sound, got 10 ms"),
    ],
)
def test_times_that_cannot_be_are_refused(extractor, start, end, part):
    assert part in one_line_error(lambda: extractor(GOOD, RATE, start=start, end=end), "audio[0]: ")


def test_nothing_is_refused(extractor):
    for nothing in (None, [], [[]], ()):
        one_line_error(lambda nothing=nothing: extractor(nothing), "audio: ")


def test_clipped_audio_gives_a_warning(extractor, warnings_of):
    clipped = np.clip(sound(1.0, 16000, 2) * 3, -1, 1)
    share = np.mean(np.abs(clipped) == 1)
    assert share > 0.02
    for item in ((clipped, 16000), sound_file(clipped, 16000, "WAV", "PCM_16")):
        extractor([WAV, item])
        assert warnings_of == [f"audio[1]: clipped, {share:.0%} of the samples are at full scale"]
        warnings_of.clear()
    # once in a while is no distortion
    few = np.where(np.arange(16000) % 125 == 0, 1.0, 0.1)
    extractor((few, 16000))
    assert warnings_of == []
    # of the part that is taken
    half = np.concatenate([clipped[:, 0], few])
    extractor((half, 16000), start=1.0)
    assert warnings_of == []
    extractor((half[::-1], 16000), start=1.0)
    share = np.mean(np.abs(clipped[:, 0]) == 1)
    assert warnings_of == [f"audio[0]: clipped, {share:.0%} of the samples are at full scale"]


def test_resampled_is_a_copy_of_soxr_at_odd_rates(extractor):
    samples = np.float32(sound(0.2, 37800)[:, 0])
    assert_mel(features_of(extractor, (samples, 37800.0)), soxr.resample(samples, 37800, RATE, quality="HQ"))
