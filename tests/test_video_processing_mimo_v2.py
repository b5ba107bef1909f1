"""MiMoV2VideoProcessor: sampling by a formula written here, real files decoded a second way, and what it refuses."""

import base64
import io
import json
import math
import socket
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media import (
    H264,
    clip,
    decode_all,
    frames_of_patches,
    image_file,
    normalized,
    picture,
    sound_file,
    video_file,
)
from PIL import Image
from test_image_processing_mimo_v2 import expected_grid, one_line_error

from modeling_mimo.processors import MiMoV2ImageProcessor, MiMoV2VideoProcessor


CONFIG = Path(__import__("modeling_mimo").__file__).parent / "data/MiMo-V2.5/config.json"
# frames of clips are as large as they stay
UNCHANGED = {"min_pixels": 1024}
B_FRAMES = {"bf": "3", "g": "12", "preset": "veryfast"} if H264 == "libx264" else {"bf": "2", "g": "12"}
# milliseconds between frames: a phone in a dark room, a screen recording
VARIABLE = [33, 34, 50, 33, 120, 66, 33]


@pytest.fixture(scope="module")
def processor():
    return MiMoV2VideoProcessor()


def milliseconds(count, steps=VARIABLE):
    return [sum(steps[i % len(steps)] for i in range(index)) for index in range(count)]


def frames_of(inputs, index=0):
    """[frames, 3, H, W] of one video of the call."""
    counts = inputs["video_grid_thw"].prod(dim=1).tolist()
    patches = inputs["pixel_values_videos"].split(counts)[index]
    return frames_of_patches(patches, inputs["video_grid_thw"][index])


def spread(count, total):
    """`count` whole numbers from 0 to total - 1, as evenly as rounding down lets them be."""
    return [index * (total - 1) // max(1, count - 1) for index in range(count)]


def assert_agrees(inputs, path, taken, index=0, tolerance=1e-6):
    """Frames and times are those that a plain decode of the whole file gives."""
    times, frames, _ = decode_all(path)
    padded = taken + taken[-1:] * (len(taken) % 2)
    assert inputs["video_metadata"][index]["frames_indices"] == padded
    assert inputs["video_metadata"][index]["total_num_frames"] == len(frames)
    assert torch.allclose(frames_of(inputs, index), normalized([frames[at] for at in padded]), atol=1e-5)
    expected = [float(times[at]) for at in padded[::2]]
    assert inputs["video_timestamps"][index] == pytest.approx(expected, abs=tolerance)


# which frames, how large


def expected_count(total, rate, fps=1, least=8, most=3600):
    """Even, at most as many as there are; a single frame is a pair of its own."""
    wanted = min(max(Fraction(total) / Fraction(rate) * Fraction(fps), least), most)
    return max(2 * math.floor(min(wanted, total) / 2), min(total, 2))


VIDEOS = [
    # frames, frames per second, height, width, arguments
    (240, 2, 90, 160, {}),
    (241, 2, 33, 70, {}),
    (100, 25, 64, 96, {}),
    (101, 10, 128, 128, {"fps": 2}),
    (75, 25, 200, 120, {"fps": 4.5}),
    (7, 30, 64, 64, {}),
    (1, 30, 96, 128, {}),
    (2, 1, 48, 300, {}),
    (3, 24, 64, 64, {"min_frames": 1}),
    (60, 30, 240, 320, {"fps": 30, "total_max_pixels": 300_000}),
    (400, 4, 64, 64, {"max_frames": 31}),
    (50, 10, 100, 140, {"num_frames": 9}),
    (50, 10, 100, 140, {"num_frames": 500, "max_pixels": 10_000}),
]


@pytest.mark.parametrize(("total", "rate", "height", "width", "kwargs"), VIDEOS)
def test_grid_of_a_video(processor, tmp_path, total, rate, height, width, kwargs):
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    path = video_file(tmp_path / "a.mp4", [frame] * total, "mpeg4", rate)
    inputs = processor(path, **kwargs)
    if "num_frames" in kwargs:
        count = min(kwargs["num_frames"], total) // 2 * 2
    else:
        limits = {"least": kwargs.get("min_frames", 8), "most": kwargs.get("max_frames", 3600)}
        count = expected_count(total, rate, kwargs.get("fps", 1), **limits)
    pairs = math.ceil(count / 2)
    budget = kwargs.get("total_max_pixels", 268435456) // pairs
    most = max(8192, min(budget, kwargs.get("max_pixels", 8388608)))
    assert inputs["video_grid_thw"].tolist() == [[pairs, *expected_grid(height, width, most=most)]]
    assert len(inputs["pixel_values_videos"]) == inputs["video_grid_thw"].prod()
    taken = spread(count, total)
    assert inputs["video_metadata"][0]["frames_indices"] == taken + taken[-1:] * (count % 2)
    # a constant rate: index / rate, without an error of rounding
    assert inputs["video_timestamps"] == [[index / rate for index in taken[::2]]]
    assert inputs["video_metadata"][0]["fps"] == rate


@pytest.mark.parametrize(
    ("total", "rate", "size", "grid", "tokens"),
    # one minute at 30 frames per second has 60 frames; 8 is the least of a short video
    [(1800, 30, (64, 96), [30, 6, 8], 360), (90, 30, (96, 128), [4, 6, 8], 48), (150, 10, (64, 64), [7, 6, 6], 63)],
)
def test_tokens_of_known_videos(processor, tmp_path, total, rate, size, grid, tokens):
    path = video_file(tmp_path / "a.mp4", [np.zeros((*size, 3), dtype=np.uint8)] * total, "mpeg4", rate)
    inputs = processor(path)
    assert inputs["video_grid_thw"].tolist() == [grid]
    assert len(inputs["pixel_values_videos"]) == 4 * tokens


def test_an_hour_has_3600_frames_within_the_pixel_budget(processor, monkeypatch):
    module = __import__(MiMoV2VideoProcessor.__module__, fromlist=["sample_indices"])
    settings = processor.settings()
    indices = module.sample_indices(2 * 3600 * 30, 30.0, settings)
    assert len(indices) == 3600
    assert indices[0] == 0
    assert indices[-1] == 2 * 3600 * 30 - 1
    # 268435456 x 2 / 3600
    assert processor._max_pixels(3600, settings) == 149130
    assert processor._max_pixels(60, settings) == 8388608
    assert processor._max_pixels(10**6, settings) == 8192


def test_frames_are_resized_as_images_are(processor):
    frames = [picture(75, 133, seed=seed) for seed in range(4)]
    inputs = processor([frames])
    images = MiMoV2ImageProcessor()(frames)
    for index, frame in enumerate(frames_of(inputs)):
        patches = images["pixel_values"].chunk(4)[index]
        assert torch.equal(frame, frames_of_patches(patches, images["image_grid_thw"][index])[0])


# real files


CONTAINERS = {
    "a.mp4": (H264, B_FRAMES),
    "a.mov": (H264, B_FRAMES),
    "a.mkv": (H264, B_FRAMES),
    "a.ts": (H264, B_FRAMES),
    "a.flv": ("flv", {}),
    "a.avi": ("mpeg4", {"g": "5"}),
    "a.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
}


def written(tmp_path, name, count, **kwargs):
    codec, options = CONTAINERS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    return video_file(tmp_path / name, clip(count), codec, options=options, **kwargs)


@pytest.mark.parametrize("name", CONTAINERS)
def test_constant_rate(processor, tmp_path, name):
    path = written(tmp_path, name, 40, rate=8)
    inputs = processor(path, fps=2, **UNCHANGED)
    assert_agrees(inputs, path, spread(10, 40), tolerance=1.1e-3)
    if name != "a.ts":
        # what the release does, whatever the units of the container
        assert inputs["video_timestamps"] == [[index / 8 for index in spread(10, 40)[::2]]]


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "a.avi"])
def test_variable_rate(processor, tmp_path, name):
    path = written(tmp_path, name, 50, times=milliseconds(50), rate=30)
    times, _, between = decode_all(path)
    assert times == [Fraction(time, 1000) for time in milliseconds(50)]
    if CONTAINERS[name][1] is B_FRAMES:
        assert between > 10
    inputs = processor(path, num_frames=13, **UNCHANGED)
    assert_agrees(inputs, path, spread(12, 50))
    count = expected_count(50, Fraction(49) / times[-1], fps=5)
    assert_agrees(processor(path, fps=5, **UNCHANGED), path, spread(count, 50))


@pytest.mark.parametrize("name", ["b.avi", "a.h264"])
def test_files_without_times(processor, tmp_path, name):
    """AVI and raw streams: their frames are counted in the order in which they come out of the decoder."""
    if H264 == "mpeg4":
        pytest.skip("this FFmpeg cannot write H.264")
    path = video_file(tmp_path / name, clip(40), options=B_FRAMES, rate=25)
    _, frames, between = decode_all(path)
    assert between > 10
    inputs = processor(path, num_frames=12, **UNCHANGED)
    taken = spread(12, 40)
    assert torch.allclose(frames_of(inputs), normalized([frames[at] for at in taken]), atol=1e-5)
    assert inputs["video_timestamps"] == [[at / 25 for at in taken[::2]]]


def test_all_frames_one_by_one(processor, tmp_path):
    path = written(tmp_path, "a.mp4", 37, times=milliseconds(37), rate=30)
    assert_agrees(processor(path, num_frames=37, **UNCHANGED), path, spread(36, 37))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.webm"])
def test_few_frames_of_a_long_file(processor, tmp_path, name):
    """Far apart, so that what lies between is skipped where the container has an index."""
    path = written(tmp_path, name, 400, times=milliseconds(400), rate=30)
    assert_agrees(processor(path, num_frames=4, **UNCHANGED), path, spread(4, 400))
    last = milliseconds(400)[-1] / 1000
    inputs = processor(path, num_frames=2, start=last - 0.05, **UNCHANGED)
    assert_agrees(inputs, path, [398, 399])


def test_start_offset_counts_from_the_first_frame(processor, tmp_path):
    times = [5_000 + time for time in milliseconds(20)]
    path = video_file(tmp_path / "a.mkv", clip(20), times=times, options=B_FRAMES)
    with av.open(path) as container:
        assert container.streams.video[0].start_time == 5000
    inputs = processor(path, num_frames=6, **UNCHANGED)
    assert_agrees(inputs, path, spread(6, 20))
    assert inputs["video_timestamps"][0][0] == 0


# a, b, c, d of (x, y) -> (a x + c y, b x + d y), the matrix in a track's header, and how the stored picture is shown
MATRICES = {
    "upright": ((1, 0, 0, 1), lambda stored: stored),
    "clockwise": ((0, 1, -1, 0), lambda stored: stored[::-1].transpose(1, 0, 2)),
    "half turn": ((-1, 0, 0, -1), lambda stored: stored[::-1, ::-1]),
    "counterclockwise": ((0, -1, 1, 0), lambda stored: stored[:, ::-1].transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", MATRICES)
def test_phone_videos_are_shown_upright(processor, tmp_path, turn):
    path = Path(video_file(tmp_path / "a.mov", clip(10), options=B_FRAMES))
    _, stored, _ = decode_all(path)
    (a, b, c, d), show = MATRICES[turn]
    data = bytearray(path.read_bytes())
    # the matrix follows 40 bytes of version, times, duration, layer and volume
    at = data.index(b"tkhd") + 4 + 40
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(data)
    inputs = processor(path, num_frames=4, **UNCHANGED)
    expected = [show(stored[index]).copy() for index in spread(4, 10)]
    assert torch.allclose(frames_of(inputs), normalized(expected), atol=1e-5)
    metadata = inputs["video_metadata"][0]
    assert (metadata["height"], metadata["width"]) == expected[0].shape[:2]


def test_frames_that_an_edit_list_hides_are_hidden(processor, tmp_path):
    path = Path(video_file(tmp_path / "a.mp4", clip(30), options=B_FRAMES))
    data = bytearray(path.read_bytes())
    # one edit: duration, then where the track starts, in units of 1 / 10240 s at 10 frames per second
    at = data.index(b"elst") + 4 + 8 + 4
    start = int.from_bytes(data[at : at + 4], "big") + 5 * 1024
    data[at : at + 4] = start.to_bytes(4, "big")
    path.write_bytes(data)
    times, frames, _ = decode_all(path)
    assert len(frames) == 25
    assert times[0] == 0
    assert_agrees(processor(path, num_frames=6, **UNCHANGED), path, spread(6, 25))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_are_videos(processor, tmp_path, format):
    frames = [Image.fromarray(frame).quantize(64).convert("RGB") for frame in clip(9)]
    durations = [100, 250, 40, 1000, 100, 100, 300, 70, 500]
    path = tmp_path / f"a.{format.lower()}"
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(path, format, save_all=True, append_images=frames[1:], duration=durations, **options)
    inputs = processor(path, num_frames=9, **UNCHANGED)
    taken = spread(8, 9)
    assert torch.allclose(frames_of(inputs), normalized([np.array(frames[index]) for index in taken]), atol=1e-5)
    assert inputs["video_timestamps"] == [[sum(durations[:index]) / 1000 for index in taken[::2]]]
    # a pair would be the first second, so all 2.46 s have 8 frames
    assert inputs["video_timestamps"] == processor(path.read_bytes())["video_timestamps"]
    one = image_file(frames[0], format)
    assert processor(one)["video_grid_thw"].tolist() == [[1, *expected_grid(64, 96)]]


def test_all_ways_to_name_a_file_are_equal(processor, tmp_path):
    path = Path(video_file(tmp_path / "a clip.mp4", clip(20), options=B_FRAMES))
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    ways = [path, str(path), path.as_uri(), data, text, f"data:video/mp4;base64,{text}", io.BytesIO(data)]
    with path.open("rb") as opened:
        inputs = processor([*ways, opened])
    expected = processor(path)
    count = len(ways) + 1
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"].repeat(count, 1))
    assert inputs["video_timestamps"] == expected["video_timestamps"] * count


def test_a_batch_is_its_videos(processor, tmp_path):
    first = video_file(tmp_path / "a.mp4", clip(30), options=B_FRAMES)
    second = [picture(40, 130, seed=seed) for seed in range(3)]
    third = (np.stack(clip(4)), [0.0, 1.5, 61.0, 90.0])
    alone = [processor(each) for each in (first, [second], third)]
    for batch in ([first, second, third], [[first, second], [third]], [[first], [second, third]]):
        inputs = processor(batch)
        for key in ("pixel_values_videos", "video_grid_thw"):
            assert torch.equal(inputs[key], torch.cat([each[key] for each in alone]))
        assert inputs["video_timestamps"] == [each["video_timestamps"][0] for each in alone]
        assert [each["frames_indices"] for each in inputs["video_metadata"]] == [
            each["video_metadata"][0]["frames_indices"] for each in alone
        ]


# frames in memory


def test_frames_without_times_are_taken_at_fps(processor):
    frames = clip(5)
    expected = normalized([*frames, frames[-1]])
    forms = [
        frames,
        [Image.fromarray(frame) for frame in frames],
        [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames],
        np.stack(frames),
        np.stack(frames).transpose(0, 3, 1, 2),
        torch.from_numpy(np.stack(frames)) / 255,
    ]
    for form in forms:
        inputs = processor(form, **UNCHANGED)
        assert torch.allclose(frames_of(inputs), expected, atol=1e-4)
        assert inputs["video_timestamps"] == [[0, 2, 4]]
        assert inputs["video_metadata"][0]["frames_indices"] == [0, 1, 2, 3, 4, 4]
    inputs = processor(frames, fps=4, **UNCHANGED)
    assert torch.allclose(frames_of(inputs), expected, atol=1e-5)
    assert inputs["video_timestamps"] == [[0, 0.5, 1]]
    assert processor(np.stack([np.stack(frames)] * 2))["video_grid_thw"].tolist() == [[3, 6, 8]] * 2


def test_frames_with_times_keep_them(processor, tmp_path):
    frames, times = clip(6), [3.0, 3.5, 60.25, 61.0, 125.0, 126.0]
    for seconds in (times, np.array(times), torch.tensor(times)):
        inputs = processor((frames, seconds), **UNCHANGED)
        assert torch.allclose(frames_of(inputs), normalized(frames), atol=1e-5)
        assert inputs["video_timestamps"] == [[3.0, 60.25, 125.0]]
    (tmp_path / "0.png").write_bytes(image_file(frames[0], "PNG"))
    inputs = processor(([tmp_path / "0.png", Image.fromarray(frames[1])], [1, 2]), **UNCHANGED)
    assert torch.allclose(frames_of(inputs), normalized(frames[:2]), atol=1e-5)


def test_frames_in_memory_are_sampled_only_when_asked(processor):
    frames = clip(20)
    times = [index / 5 for index in range(20)]
    assert processor((frames, times), fps=1)["video_metadata"][0]["frames_indices"] == spread(8, 20)
    for item in (frames, (frames, times)):
        inputs = processor([item], num_frames=6, **UNCHANGED)
        assert torch.allclose(frames_of(inputs), normalized([frames[at] for at in spread(6, 20)]), atol=1e-5)
        assert processor([item], max_frames=7)["video_metadata"][0]["frames_indices"] == spread(6, 20)
        assert processor([item])["video_metadata"][0]["frames_indices"] == list(range(20))


def test_one_frame_is_a_pair(processor):
    inputs = processor(clip(1), **UNCHANGED)
    assert inputs["video_grid_thw"].tolist() == [[1, 4, 6]]
    assert inputs["video_timestamps"] == [[0]]
    assert torch.allclose(frames_of(inputs), normalized(clip(1) * 2), atol=1e-5)


# parts of a video


@pytest.mark.parametrize(
    ("start", "end", "taken"),
    [
        (1.0, 2.0, [10, 11, 12, 14, 15, 17, 18, 20]),
        (None, 0.5, [0, 1, 2, 3, 4, 5]),
        (4.5, None, [45, 46, 47, 49]),
        # between two frames: the one that is shown
        (0.95, 0.96, [9]),
        (4.95, 5, [49]),
        (0, 5, spread(8, 50)),
    ],
)
def test_start_and_end_are_seconds(processor, tmp_path, start, end, taken):
    path = video_file(tmp_path / "a.mp4", clip(50), options=B_FRAMES)
    inputs = processor(path, start=start, end=end, **UNCHANGED)
    assert_agrees(inputs, path, taken)
    inputs = processor(path, start=start, end=end, num_frames=2, **UNCHANGED)
    assert_agrees(inputs, path, [taken[0], taken[-1]][: len(taken)])


def test_an_end_rounded_up_to_a_second_is_the_end(processor, tmp_path):
    path = video_file(tmp_path / "a.mp4", clip(47), options=B_FRAMES)
    assert processor(path, end=5)["video_metadata"] == processor(path)["video_metadata"]


# settings


def test_settings_of_a_release_are_those_of_its_config(tmp_path, processor):
    config = json.loads(CONFIG.read_text())
    released = MiMoV2VideoProcessor.from_processor_config(config["processor_config"])
    assert released.to_dict() == processor.to_dict()
    changes = {"fps": 2.0, "max_frames": 64, "min_frames": 4, "video_max_pixels": 50_000, "image_max_pixels": 9000}
    config["processor_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    stub = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stub))
    loaded = MiMoV2VideoProcessor.from_pretrained(tmp_path)
    assert (loaded.fps, loaded.max_frames, loaded.min_frames, loaded.max_pixels) == (2.0, 64, 4, 50_000)
    assert (loaded.min_pixels, loaded.total_max_pixels) == (8192, 268435456)
    assert processor.min_frames is None


def test_what_is_saved_loads_back_equal(tmp_path):
    saved = MiMoV2VideoProcessor(num_frames=6, min_frames=4, max_pixels=20_000)
    saved.save_pretrained(tmp_path)
    MiMoV2ImageProcessor(max_pixels=9000).save_pretrained(tmp_path)
    loaded = MiMoV2VideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert vars(loaded) == vars(saved)
    assert loaded(clip(10))["video_grid_thw"].tolist() == saved(clip(10))["video_grid_thw"].tolist()
    assert MiMoV2ImageProcessor.from_pretrained(tmp_path).max_pixels == 9000


def test_types_of_the_outputs(processor):
    inputs = processor(clip(4))
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert inputs["video_grid_thw"].dtype == torch.long
    assert list(inputs)[:2] == processor.model_input_names
    assert all(type(time) is float for time in inputs["video_timestamps"][0])
    arrays = processor(clip(4), return_tensors="np")
    assert np.array_equal(arrays["pixel_values_videos"], inputs["pixel_values_videos"].numpy())
    assert arrays["video_timestamps"] == inputs["video_timestamps"]


# what it refuses


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> a file that is no whole video."""
    folder = tmp_path_factory.mktemp("bad")
    whole = Path(video_file(folder / "whole.mp4", clip(40), options=B_FRAMES)).read_bytes()
    # with the index in front, a cut loses frames only
    front = {**B_FRAMES, "movflags": "faststart"}
    with av.open(str(folder / "front.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(H264, rate=10, options=front)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for pixels in clip(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    fast = (folder / "front.mp4").read_bytes()
    with av.open(io.BytesIO(fast)) as container:
        boundary = [packet.pos for packet in container.demux(video=0)][30]
    first, *others = map(Image.fromarray, clip(9))
    pictures = image_file(first, "GIF", save_all=True, append_images=others)
    contents = {
        "text.mp4": b"no video at all" * 20,
        "empty.mp4": b"",
        "truncated.mp4": whole[: len(whole) * 2 // 3],
        "cut.mp4": fast[: len(fast) * 4 // 5],
        "boundary.mp4": fast[:boundary],
        "cut.gif": pictures[: len(pictures) // 2],
    }
    assert fast.index(b"moov") < fast.index(b"mdat")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sound_file(folder / "sound.mp4")
    sound_file(folder / "cover.mp4", cover=True)
    with av.open(str(folder / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return folder


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("text.mp4", "a whole video file"),
        ("empty.mp4", "an empty one"),
        ("truncated.mp4", "a whole video file"),
        ("cut.mp4", "cut off"),
        ("boundary.mp4", "expected 40 frames, got 30: the file is cut off"),
        ("cut.gif", "a whole image"),
        ("sound.mp4", "a video, got a file of audio"),
        ("cover.mp4", "a video, got a file of audio"),
        ("none.avi", "a video with frames"),
        ("missing.mp4", "no such file"),
        (".", "a folder"),
    ],
)
def test_a_bad_file_is_named_by_its_index(processor, files, name, part):
    good = str(files / "whole.mp4")
    message = one_line_error(lambda: processor([[good], [files / name]]), "videos[1]: ", (ValueError, OSError))
    assert part in message
    assert len(message) < 300
    if (files / name).is_file():
        one_line_error(lambda: processor((files / name).read_bytes()), "videos[0]: ")


def test_a_server_that_fails_is_named(processor):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/cat.mp4"
    message = one_line_error(lambda: processor([FRAMES, url]), "videos[1]: ", OSError)
    assert url in message


def test_a_file_whose_frame_cannot_be_decoded_is_refused(processor, tmp_path):
    path = Path(video_file(tmp_path / "a.mkv", clip(40), options={"g": "1", "preset": "veryfast"}))
    with av.open(str(path)) as container:
        (damaged,) = [packet.pos for packet in container.demux(video=0) if packet.pts == 2000]
    data = bytearray(path.read_bytes())
    data[damaged + 16 : damaged + 400] = bytes(384)
    path.write_bytes(data)
    message = one_line_error(lambda: processor(path, start=2, end=2.1, num_frames=2), "videos[0]: ")
    assert "a whole video file" in message


FRAMES = clip(4)
BAD_FRAMES = {
    "no frames": (np.zeros((0, 64, 64, 3), dtype=np.uint8), "at least one frame, got none"),
    "no pairs": (([], []), "at least one frame, got none"),
    "three dimensions": (
        np.zeros((9, 64, 64), dtype=np.uint8),
        "frames [T, H, W, C] or [T, C, H, W], got [9, 64, 64]",
    ),
    "channels": (np.zeros((4, 64, 64, 2), dtype=np.uint8), "with 1, 3 or 4 channels"),
    "dtype": (np.zeros((4, 64, 64, 3), dtype=np.complex64), "numbers, got complex64"),
    "NaN": (np.stack([*FRAMES[:3], np.full((64, 96, 3), np.nan)]), "got nan to nan"),
    "strip": (np.zeros((4, 1, 5000, 3), dtype=np.uint8), "aspect ratio of at most 200, got 1 x 5000"),
    "sizes": ([*FRAMES[:3], picture(64, 64)], "64 x 96 pixels as in the first frame, got 64 x 64"),
    "too few times": ((FRAMES, [0, 1, 2]), "4 timestamps, one per frame, got 3"),
    "falling times": ((FRAMES, [0, 1, 3, 2]), "rising timestamps, got 2 after 3"),
    "equal times": ((FRAMES, [0, 1, 1, 2]), "rising timestamps, got 1 after 1"),
    "negative times": ((FRAMES, [-1, 1, 2, 3]), "timestamps in seconds from 0 on, got -1 to 3"),
    "times that are none": ((FRAMES, [0, 1, math.nan, 3]), "timestamps in seconds from 0 on"),
    "number": (5, "a path, URL, bytes, base64, file object, picture or array, got int"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_are_named_by_their_index(processor, name):
    video, part = BAD_FRAMES[name]
    message = one_line_error(lambda: processor([FRAMES, video]), "videos[1]")
    assert part in message


def test_settings_that_cannot_be_are_refused(processor, tmp_path):
    path = video_file(tmp_path / "a.mp4", clip(20), "mpeg4")
    for kwargs, name in (
        ({"fps": 1, "num_frames": 4}, "fps, num_frames"),
        ({"fps": 0}, "fps"),
        ({"fps": -1.5}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"fps": True}, "fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 2.5}, "num_frames"),
        ({"min_pixels": 9000, "max_pixels": 8999}, "min_pixels"),
        ({"max_frame": 8}, "`max_frame`"),
        ({"start": 1, "end": 1}, "videos[0]"),
        ({"start": 1.5, "end": 1}, "videos[0]"),
        ({"start": -1}, "videos[0]"),
        ({"start": 2}, "videos[0]"),
        ({"start": math.nan}, "videos[0]"),
        ({"start": "1"}, "videos[0]"),
        ({"end": 2.01}, "videos[0]"),
        ({"end": 0}, "videos[0]"),
    ):
        one_line_error(lambda kwargs=kwargs: processor(path, **kwargs), f"{name}: ")
    for nothing in ([], [[]], None):
        one_line_error(lambda nothing=nothing: processor(nothing), "videos: ")
    one_line_error(lambda: MiMoV2VideoProcessor(max_frames=None), "max_frames: ")
    one_line_error(lambda: MiMoV2VideoProcessor(frames=3), "`frames`: ")


def test_num_frames_of_the_settings_gives_way_to_fps_of_the_call():
    processor = MiMoV2VideoProcessor(num_frames=4)
    item = (clip(20), [index / 2 for index in range(20)])
    assert processor(item, fps=1)["video_grid_thw"].tolist()[0][0] == 5
