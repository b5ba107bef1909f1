"""MiMoV2ImageProcessor: sizes and patches against formulas written here, real files, and what it refuses."""

import base64
import http.server
import io
import json
import math
import socket
import threading
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from media import frames_of_patches, image_file, normalized, picture
from PIL import Image

from modeling_mimo.processors import MiMoV2ImageProcessor, MiMoV2VideoProcessor


CONFIG = Path(__import__("modeling_mimo").__file__).parent / "data/MiMo-V2.5/config.json"
# height, width of images that no resize changes
EXACT = (96, 128)


@pytest.fixture(scope="module")
def processor():
    return MiMoV2ImageProcessor()


def pixels_of(processor, image, **kwargs):
    """[3, H, W] of 0 to 255: what the tower sees of an image that no resize changes."""
    inputs = processor(image, **kwargs)
    first, second = frames_of_patches(inputs["pixel_values"], inputs["image_grid_thw"][0])
    assert torch.equal(first, second)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (processor.image_mean, processor.image_std))
    return (first * std + mean).permute(1, 2, 0)


def assert_shows(processor, image, expected, tolerance=1e-3, **kwargs):
    got = pixels_of(processor, image, **kwargs)
    assert got.shape == torch.as_tensor(np.asarray(expected)).shape
    assert (got - torch.as_tensor(np.asarray(expected)).float()).abs().max() <= tolerance


# sizes


def expected_grid(height, width, least=8192, most=8388608, side=32):
    """Patches in height and width, in whole numbers and fractions: no float, no square root that rounds."""
    if min(height, width) < side:
        scale = Fraction(side, min(height, width))
        height, width = round(height * scale), round(width * scale)
    rows, columns = round(Fraction(height, side)), round(Fraction(width, side))
    if rows * columns * side**2 > most:
        # the largest k with 32 k <= height sqrt(most / (height width))
        rows = max(1, math.isqrt(height * most // (width * side**2)))
        columns = max(1, math.isqrt(width * most // (height * side**2)))
    elif rows * columns * side**2 < least:
        # the smallest k with 32 k >= height sqrt(least / (height width))
        rows = next(k for k in range(1, 10**4) if k**2 * side**2 * width >= height * least)
        columns = next(k for k in range(1, 10**4) if k**2 * side**2 * height >= width * least)
    return 2 * rows, 2 * columns


SIZES = [
    (1, 1),
    (1, 200),
    (7, 9),
    (16, 3000),
    (17, 40),
    (20, 70),
    (31, 31),
    (31, 97),
    (32, 32),
    (32, 48),
    (33, 6600),
    (48, 48),
    (80, 112),
    (90, 91),
    (91, 90),
    (96, 128),
    (100, 130),
    (101, 53),
    (127, 129),
    (240, 320),
    (333, 201),
    (480, 640),
    (719, 1281),
    (720, 1280),
    (1080, 1920),
    (1125, 2436),
    (1201, 799),
    (2160, 3840),
    (2161, 3839),
    (2448, 3264),
    (3000, 4000),
    (4000, 3000),
    (4320, 7680),
    (6000, 9000),
    (12000, 80),
    (30000, 151),
]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_grid_of_a_size(processor, height, width):
    rows, columns = expected_grid(height, width)
    assert processor.get_number_of_image_patches(height, width) == rows * columns
    if height * width < 10**6:
        grid = processor(np.zeros((height, width), dtype=np.uint8))["image_grid_thw"]
        assert grid.tolist() == [[1, rows, columns]]


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    # 2160 / 32 = 67.5 rounds up to the even 68, 720 / 32 = 22.5 down to 22
    [(2160, 3840, 68 * 120), (720, 1280, 22 * 40), (1080, 1920, 34 * 60), (1, 1, 3 * 3), (16, 3000, 188)],
)
def test_tokens_of_known_sizes(processor, height, width, tokens):
    assert processor.get_number_of_image_patches(height, width) == 4 * tokens


@pytest.mark.parametrize(("least", "most"), [(8192, 20_000), (100_000, 200_000), (1024, 1024)])
def test_pixel_bounds_of_a_call(processor, least, most):
    image = np.zeros((300, 211), dtype=np.uint8)
    rows, columns = expected_grid(300, 211, least, most)
    inputs = processor(image, min_pixels=least, max_pixels=most)
    assert inputs["image_grid_thw"].tolist() == [[1, rows, columns]]
    assert inputs["pixel_values"].shape == (rows * columns, 1536)
    options = {"min_pixels": least, "max_pixels": most}
    assert processor.get_number_of_image_patches(300, 211, options) == rows * columns
    assert processor.max_pixels == 8388608


# patches


@pytest.mark.parametrize("size", [(64, 160), (320, 32)])
def test_patches_are_in_the_towers_order(processor, size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    inputs = processor(image, min_pixels=1024)
    assert inputs["image_grid_thw"].tolist() == [[1, size[0] // 16, size[1] // 16]]
    frames = frames_of_patches(inputs["pixel_values"], inputs["image_grid_thw"][0])
    assert torch.allclose(frames, normalized(image)[None].expand(2, -1, -1, -1), atol=1e-5)


@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("size", [(201, 333), (96, 140), (110, 128), (9, 700), (720, 1000), (1537, 64)])
def test_resize_is_interpolate_without_antialias(processor, size, kind):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    inputs = processor(image.astype(np.float32) if kind == "float" else image)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    plain = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    plain = F.interpolate(plain, (rows * 16, columns * 16), mode="bilinear", align_corners=False, antialias=False)
    expected = normalized(plain[0].permute(1, 2, 0))
    frames = frames_of_patches(inputs["pixel_values"], inputs["image_grid_thw"][0])
    assert (frames - expected).abs().max() <= 1e-4


def test_bands_make_no_difference(processor, monkeypatch):
    image = np.random.default_rng(2).integers(0, 256, (700, 333, 3), dtype=np.uint8)
    expected = processor(image)["pixel_values"]
    module = __import__(MiMoV2ImageProcessor.__module__, fromlist=["BAND_PIXELS"])
    for pixels in (1, 50_000, 10**9):
        monkeypatch.setattr(module, "BAND_PIXELS", pixels)
        assert torch.equal(processor(image)["pixel_values"], expected)


def test_a_batch_is_its_images(processor):
    images = [picture(height, width, seed=height) for height, width in ((96, 130), (33, 40), (64, 300))]
    alone = [processor(image) for image in images]
    for batch in (images, tuple(images), [images[:1], images[1:]], [[images[0], images[1]], images[2]]):
        inputs = processor(batch)
        assert torch.equal(inputs["pixel_values"], torch.cat([each["pixel_values"] for each in alone]))
        assert torch.equal(inputs["image_grid_thw"], torch.cat([each["image_grid_thw"] for each in alone]))


def test_types_of_the_outputs(processor):
    inputs = processor(picture(64, 64))
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["image_grid_thw"].dtype == torch.long
    assert list(inputs) == processor.model_input_names
    arrays = processor(picture(64, 64), return_tensors="np")
    assert np.array_equal(arrays["pixel_values"], inputs["pixel_values"].numpy())


# where images come from


SHOWN_TO_STORED = {
    # EXIF: which side of the picture the first stored row and the first stored column are
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: shown[:, ::-1].transpose(1, 0, 2),
    7: lambda shown: shown[::-1, ::-1].transpose(1, 0, 2),
    8: lambda shown: shown[::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", SHOWN_TO_STORED)
def test_exif_orientation_is_applied(processor, orientation):
    shown = picture(*EXACT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(SHOWN_TO_STORED[orientation](shown))
    file = image_file(stored, "JPEG", quality=100, subsampling=0, exif=exif)
    # JPEG loses a little; a wrong turn is off by more than 100
    assert_shows(processor, file, shown, tolerance=8)
    assert_shows(processor, Image.open(io.BytesIO(file)), shown, tolerance=8)


def with_alpha():
    color = picture(*EXACT)
    alpha = np.tile(np.linspace(0, 255, EXACT[1]).astype(np.uint8), (EXACT[0], 1))
    weight = alpha[..., None] / 255
    return np.dstack([color, alpha]), color * weight + 255 * (1 - weight)


def test_transparency_is_laid_on_white(processor):
    image, expected = with_alpha()
    assert_shows(processor, image_file(image, "PNG"), expected, tolerance=1)
    assert_shows(processor, image_file(image, "WEBP", lossless=True, exact=True), expected, tolerance=1)
    assert_shows(processor, Image.fromarray(image), expected, tolerance=1)
    assert_shows(processor, image, expected, tolerance=0.51)
    assert_shows(processor, torch.from_numpy(image).permute(2, 0, 1) / 255, expected, tolerance=1e-3)
    gray = Image.fromarray(np.dstack([image[..., 0], image[..., 3]]), "LA")
    assert_shows(processor, gray, expected[..., [0, 0, 0]], tolerance=1)


def test_palettes_are_looked_up(processor):
    indexed = Image.fromarray(picture(*EXACT)).quantize(16)
    assert indexed.mode == "P"
    colors = np.array(indexed.getpalette()[:48]).reshape(16, 3)
    shown = colors[np.array(indexed)]
    assert_shows(processor, image_file(indexed, "PNG"), shown)
    assert_shows(processor, image_file(indexed, "GIF"), shown)
    # color 3 is transparent
    shown[np.array(indexed) == 3] = 255
    assert_shows(processor, image_file(indexed, "PNG", transparency=3), shown)


def test_gray_images_have_three_equal_channels(processor):
    gray = picture(*EXACT)[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=2)
    assert_shows(processor, image_file(gray, "PNG"), expected)
    for array in (gray, gray[..., None], gray[None], torch.from_numpy(gray)):
        assert_shows(processor, array, expected)
    bits = gray > 100
    expected = np.repeat(bits[..., None], 3, axis=2) * 255
    assert_shows(processor, image_file(Image.fromarray(bits), "PNG"), expected)
    assert_shows(processor, bits, expected)


def test_16_bits_are_scaled_and_not_clipped(processor):
    deep = np.linspace(0, 65535, EXACT[0] * EXACT[1]).astype(np.uint16).reshape(EXACT)
    expected = np.repeat((deep / 257).round()[..., None], 3, axis=2)
    for image in (image_file(deep, "PNG"), image_file(deep, "TIFF"), deep, deep[..., None], torch.from_numpy(deep)):
        assert_shows(processor, image, expected)
    assert_shows(processor, Image.fromarray(deep.astype(np.int32)), expected)
    # a mode of 32 bits may hold 8 of them
    shallow = picture(*EXACT)[..., 0]
    assert_shows(processor, Image.fromarray(shallow.astype(np.int32)), np.repeat(shallow[..., None], 3, axis=2))


def test_cmyk_is_converted(processor):
    inverted = 255 - picture(*EXACT)
    cmyk = Image.fromarray(np.dstack([inverted, np.zeros(EXACT, dtype=np.uint8)]), "CMYK")
    assert_shows(processor, cmyk, picture(*EXACT), tolerance=2)
    assert_shows(processor, image_file(cmyk, "JPEG", quality=100, subsampling=0), picture(*EXACT), tolerance=8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(processor, format):
    first, *others = (Image.fromarray(picture(*EXACT, seed=seed)).quantize(32).convert("RGB") for seed in range(3))
    options = {"lossless": True} if format == "WEBP" else {}
    file = image_file(first, format, save_all=True, append_images=others, duration=100, **options)
    assert Image.open(io.BytesIO(file)).n_frames == 3
    assert_shows(processor, file, np.array(first))


def test_floats_are_0_to_1_or_0_to_255(processor):
    image = picture(*EXACT)
    assert_shows(processor, image.astype(np.float64), image)
    assert_shows(processor, image / 255, image)
    assert_shows(processor, torch.from_numpy(image).permute(2, 0, 1).half() / 255, image, tolerance=0.1)
    assert_shows(processor, image.astype(np.int64), image)
    # views with strides of their own and foreign byte order
    assert_shows(processor, image[::-1, ::-1], image[::-1, ::-1].copy())
    assert_shows(processor, image.astype(">f4"), image)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A web server of a folder with cat.png: its address."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "cat.png").write_bytes(image_file(picture(*EXACT), "PNG"))
    (folder / "page.html").write_text("<p>no cat</p>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_all_ways_to_name_a_file_are_equal(processor, server, tmp_path, monkeypatch):
    file = image_file(picture(*EXACT), "PNG")
    path = tmp_path / "a cat.png"
    path.write_bytes(file)
    text = base64.b64encode(file).decode()
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [
        path,
        str(path),
        "~/a cat.png",
        path.as_uri(),
        f"{server}/cat.png",
        file,
        bytearray(file),
        text,
        # mail and some servers break base64 into lines
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        f"data:image/png;base64,{text}",
        io.BytesIO(file),
        Image.open(path),
    ]
    with path.open("rb") as opened:
        got = processor([*ways, opened])["pixel_values"]
    expected = processor(picture(*EXACT))["pixel_values"]
    assert torch.equal(got, expected.repeat(len(ways) + 1, 1))


def test_an_opened_image_of_the_user_stays_as_it_is(processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(image_file(picture(*EXACT), "JPEG", exif=exif)))
    before = image.size
    first = processor(image)["pixel_values"]
    assert image.size == before
    assert image.getexif()[0x0112] == 6
    assert torch.equal(processor(image)["pixel_values"], first)


# settings


def test_settings_of_a_release_are_those_of_its_config(tmp_path, processor):
    config = json.loads(CONFIG.read_text())
    config["processor_config"] |= {"image_max_pixels": 123456, "video_max_pixels": 1, "merge_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    without_stub = MiMoV2ImageProcessor.from_pretrained(tmp_path)
    stub = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stub))
    loaded = MiMoV2ImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == without_stub.to_dict()
    assert (loaded.min_pixels, loaded.max_pixels, loaded.merge_size, loaded.patch_size) == (8192, 123456, 4, 16)
    assert MiMoV2ImageProcessor.from_processor_config(config["processor_config"]).to_dict() == loaded.to_dict()
    released = json.loads(CONFIG.read_text())["processor_config"]
    assert MiMoV2ImageProcessor.from_processor_config(released).to_dict() == processor.to_dict()
    assert MiMoV2ImageProcessor.from_pretrained(tmp_path, max_pixels=9000).max_pixels == 9000


def test_what_is_saved_loads_back_equal(tmp_path):
    saved = MiMoV2ImageProcessor(min_pixels=2048, max_pixels=99999, image_mean=[0.1, 0.2, 0.3])
    saved.save_pretrained(tmp_path)
    loaded = MiMoV2ImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert vars(loaded) == vars(saved)
    image = picture(100, 200)
    assert torch.equal(loaded(image)["pixel_values"], saved(image)["pixel_values"])
    # what is saved comes before the config of the release that it was saved into
    (tmp_path / "config.json").write_text(CONFIG.read_text())
    assert MiMoV2ImageProcessor.from_pretrained(tmp_path).max_pixels == 99999


@pytest.mark.parametrize("cls", [MiMoV2ImageProcessor, MiMoV2VideoProcessor])
def test_a_checkpoint_for_text_has_no_settings(cls, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mimo_v2"}))
    with pytest.raises(
        ValueError, match=r"expected `processor_config` in config.json, got a checkpoint for text only"
    ):
        cls.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="missing"):
        cls.from_pretrained(tmp_path / "missing")


# what it refuses


def one_line_error(call, start, kind=ValueError):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(start)
    assert "\n" not in message
    assert ": expected " in message
    assert ", got " in message
    return message


JPEG = image_file(picture(200, 300), "JPEG")
BAD_IMAGES = {
    "text": (b"<p>no cat</p>" * 9, "an image file, got 117 bytes"),
    "empty bytes": (b"", "the bytes of a file, got none"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "a whole image"),
    "truncated PNG": (image_file(picture(200, 300), "PNG")[:1000], "a whole image"),
    "strip": (np.zeros((1, 5000, 3), dtype=np.uint8), "aspect ratio of at most 200, got 1 x 5000"),
    "strip file": (
        image_file(np.zeros((5000, 1), dtype=np.uint8), "PNG"),
        "aspect ratio of at most 200, got 5000 x 1",
    ),
    "complex": (np.zeros((40, 40), dtype=np.complex64), "numbers, got complex64"),
    "complex tensor": (torch.zeros(40, 40, dtype=torch.complex64), "numbers, got torch.complex64"),
    "strings": (np.full((40, 40), "a"), "numbers, got <U1"),
    "two channels": (np.zeros((40, 40, 2), dtype=np.uint8), r"with 1, 3 or 4 channels, got [40, 40, 2]"),
    "one dimension": (np.zeros(40, dtype=np.uint8), "got [40]"),
    "no pixels": (np.zeros((0, 40, 3), dtype=np.uint8), "got [0, 40, 3]"),
    "NaN": (np.full((40, 40, 3), np.nan), "0 to 255 or 0 to 1, got nan"),
    "normalized": (np.linspace(-1, 1, 4800).reshape(40, 40, 3), "got -1 to 1"),
    "above 255": (np.full((40, 40, 3), 256.0), "got 256 to 256"),
    "negative": (np.full((40, 40, 3), -1), "got -1 to -1"),
    "number": (5, "a path, URL, bytes, base64, file object, picture or array, got int"),
    "text file": (io.StringIO("cat"), "a file object in binary mode, got str"),
    "bad data URI": ("data:image/png;base64,####", "an existing file, a URL or base64"),
    "base64 of something else": (base64.b64encode(b"no image" * 20).decode(), "an image file, got 160 bytes"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named_by_its_index(processor, name):
    image, part = BAD_IMAGES[name]
    good = picture(40, 40)
    message = one_line_error(lambda: processor([good, [good, image]]), "images[2]: ", (ValueError, OSError))
    assert part in message
    assert len(message) < 200


def test_files_that_are_none_are_named(processor, tmp_path):
    (tmp_path / "empty.png").touch()
    for path, part in {"missing.png": "no such file", ".": "a folder", "empty.png": "an empty one"}.items():
        message = one_line_error(
            lambda path=path: processor([picture(40, 40), tmp_path / path]), "images[1]: ", (ValueError, OSError)
        )
        assert part in message
        one_line_error(lambda path=path: processor(str(tmp_path / path)), "images[0]: ", (ValueError, OSError))
    # longer than any path, and no base64
    message = one_line_error(lambda: processor("a photo of a cat, " * 1000), "images[0]: ", OSError)
    assert len(message) < 200


def test_a_server_that_fails_is_named(processor, server):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/cat.png", f"{server}/dog.png", "http://[bad/cat.png"):
        message = one_line_error(lambda url=url: processor(url), "images[0]: ", OSError)
        assert url in message
    one_line_error(lambda: processor(f"{server}/page.html"), "images[0]: expected an image file")


def test_a_server_that_never_answers_is_given_up(processor):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cat.png"
        message = one_line_error(lambda: processor(url, timeout=0.2), "images[0]: ", OSError)
    assert "timed out" in message


def test_a_decompression_bomb_is_refused(processor, monkeypatch, recwarn):
    bomb = image_file(Image.new("1", (400, 400)), "PNG")
    # Pillow raises above twice the limit, and only warns above it
    for limit in (100_000, 50_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        message = one_line_error(lambda: processor(bomb), "images[0]: ")
        assert f"at most {limit} pixels" in message
    assert not recwarn.list


def test_settings_that_cannot_be_are_refused(processor):
    image = picture(40, 40)
    for kwargs, name in (
        ({"min_pixels": 9000, "max_pixels": 8999}, "min_pixels"),
        ({"max_pixels": 100}, "min_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 1e5}, "max_pixels"),
        ({"patch_size": "16"}, "patch_size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"max_pixel": 9000}, "`max_pixel`"),
        ({"size": None}, "`size`"),
    ):
        one_line_error(lambda kwargs=kwargs: processor(image, **kwargs), f"{name}: ")
        one_line_error(lambda kwargs=kwargs: MiMoV2ImageProcessor(**kwargs), f"{name}: ")
    for nothing in ([], [[]], None):
        one_line_error(lambda nothing=nothing: processor(nothing), "images: ")
