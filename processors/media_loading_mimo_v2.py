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
"""Images from wherever users keep them -> RGB tensors; files, URLs and bytes of images, videos and audio."""

import base64
import http.client
import io
import os
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from .media_opening_mimo_v2 import IMAGE_FORMATS, open_picture, source_name, whole_picture


# seconds without an answer after which a server counts as unreachable
TIMEOUT = 60.0

# no image, video or audio in base64 is shorter; a shorter text is a path
SHORTEST_BASE64 = 64

ARRAYS = (np.ndarray, torch.Tensor)
# of arrays: gray, RGB, RGBA
CHANNELS = (1, 3, 4)

# modes of Pillow for one gray value of more than 8 bits per pixel
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def is_frame(item: Any) -> bool:
    """A single picture that is in memory already."""
    return isinstance(item, Image.Image) or (isinstance(item, ARRAYS) and item.ndim in (2, 3))


def is_pair(item: Any) -> bool:
    """A pair `(frames, timestamps)`."""
    if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], (list, tuple, *ARRAYS)):
        return False
    times = item[1]
    if isinstance(times, ARRAYS):
        return times.ndim == 1
    return isinstance(times, (list, tuple)) and all(isinstance(time, (int, float, np.number)) for time in times)


def flatten_images(images: Any) -> list[Any]:
    """One image, a list of them, or lists in a list -> one flat list. An array of four dimensions is a list."""
    if images is None:
        return []
    if isinstance(images, ARRAYS) and images.ndim == 4:
        return list(images)
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for group in images for image in flatten_images(group)]


def flatten_videos(videos: Any) -> list[Any]:
    """One video, a list of them, or lists in a list -> one flat list.

    A list of frames is one video, and so is a pair `(frames, timestamps)`. An array of five dimensions is a list.
    """
    if videos is None:
        return []
    if isinstance(videos, ARRAYS) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, (list, tuple)) or is_pair(videos):
        return [videos]
    if videos and all(is_frame(item) for item in videos):
        return [videos]
    return [video for group in videos for video in flatten_videos(group)]


def open_source(item: Any, name: str, timeout: float = TIMEOUT, loaded: str = "picture or array") -> str | io.BytesIO:
    """Path of a file, or bytes in memory, of what `item` names: a path, a URL, `bytes`, base64 or a file object.

    Args:
        loaded: what else the caller takes, for the error.

    Raises:
        ValueError: nothing of that kind.
        OSError: a missing or unreadable file, an unreachable or refusing server.
    """
    if isinstance(item, (bytes, bytearray, memoryview)):
        return io.BytesIO(_not_empty(bytes(item), name))
    if hasattr(item, "read"):
        return io.BytesIO(_not_empty(item.read(), name))
    if isinstance(item, os.PathLike):
        return _checked_file(os.fspath(item), name)
    if not isinstance(item, str):
        raise ValueError(
            f"{name}: expected a path, URL, bytes, base64, file object, {loaded}, got {type(item).__name__}"
        )
    if item.startswith(("http://", "https://")):
        return _download(item, name, timeout)
    if item.startswith("file://"):
        return _checked_file(urllib.request.url2pathname(item.removeprefix("file://").removeprefix("localhost")), name)
    if item.startswith("data:"):
        return io.BytesIO(_not_empty(_decoded(item.partition(",")[2], item, name), name))
    if len(item) >= SHORTEST_BASE64 and not os.path.exists(item) and not item.startswith(("./", "../", "~")):
        return io.BytesIO(_decoded(item, item, name))
    return _checked_file(item, name)


def _not_empty(data: bytes, name: str) -> bytes:
    if not isinstance(data, bytes):
        raise ValueError(f"{name}: expected a file object in binary mode, got {type(data).__name__}")
    if not data:
        raise ValueError(f"{name}: expected the bytes of a file, got none")
    return data


def _checked_file(path: str, name: str) -> str:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        got = "a folder" if os.path.isdir(path) else "no such file"
        raise FileNotFoundError(f"{name}: expected a file, URL or base64, got {got}: {path!r}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{name}: expected a file with data, got an empty one: {path!r}")
    return path


def _web() -> urllib.request.OpenerDirector:
    """Opens http(s) alone: what urllib opens by itself follows redirects to ftp as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


_WEB = _web()


def _download(url: str, name: str, timeout: float) -> io.BytesIO:
    try:
        # some servers refuse Python's own name
        request = urllib.request.Request(url, headers={"User-Agent": "modeling-mimo"})
        with _WEB.open(request, timeout=timeout) as response:
            data = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise OSError(f"{name}: expected an answer from {url}, got {reason}") from None
    return io.BytesIO(_not_empty(data, name))


def _decoded(text: str, item: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        shown = item if len(item) <= 255 else f"{item[:60]}... ({len(item)} characters)"
        raise FileNotFoundError(f"{name}: expected an existing file, a URL or base64, got {shown!r}") from None


def load_image(item: Any, name: str, timeout: float = TIMEOUT) -> torch.Tensor:
    """Any image -> [3, H, W] uint8, or float32 of 0 to 255 where `item` was a float array.

    EXIF orientation is applied, the first frame of an animation taken, 16-bit gray scaled to 8 bit, and transparency
    laid on white: that is how pages and viewers show it, and how SGLang serves files.

    Args:
        item: a Pillow image, an array (see `array_to_rgb`), or what `open_source` takes.
        name: what errors call the image, e.g. `images[2]`.
        timeout: seconds without an answer after which a server counts as unreachable.

    Raises:
        ValueError: not an image, a broken or an unreasonably large one.
        OSError: as `open_source`.
    """
    if isinstance(item, ARRAYS):
        return array_to_rgb(item, name)
    if isinstance(item, Image.Image):
        return pil_to_rgb(item, name)
    source = open_source(item, name, timeout)
    picture = open_picture(source, name)
    if picture is None:
        where = f"{source_name(source)} of something else"
        raise ValueError(f"{name}: expected an image file, got {where}; opened are {', '.join(IMAGE_FORMATS)}")
    with picture:
        return pil_to_rgb(picture, name)


def pil_to_rgb(picture: Image.Image, name: str) -> torch.Tensor:
    """[3, H, W] of the current frame of a Pillow image; see `load_image`."""
    with whole_picture(name):
        if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            return array_to_rgb(np.array(picture), name)
        if picture.mode in DEEP_MODES:
            values = np.array(picture)
            # mode "I" may hold 8 or 16 bits
            if picture.mode != "I" or values.max(initial=0) > 255:
                values = values / 257
            picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    if not pixels.size:
        raise ValueError(f"{name}: expected an image with pixels, got {picture.width} x {picture.height}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def array_to_rgb(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """[H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4 -> [3, H, W]; see `load_image`.

    uint16 is 0 to 65535, other integers are 0 to 255, bools are black and white; floats are 0 to 1 if none is larger,
    else 0 to 255.
    """
    shape = list(array.shape)
    array = array.detach().cpu() if isinstance(array, torch.Tensor) else _tensor(array, name)
    if array.ndim == 2:
        array = array[None]
    # [1, W, 3] is a row of colors rather than a gray picture three pixels wide
    elif array.ndim == 3 and array.shape[2] in CHANNELS and array.shape[0] not in (3, 4):
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in CHANNELS or array.numel() == 0:
        raise ValueError(f"{name}: expected [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got {shape}")
    pixels = _to_255(array, name)
    if len(pixels) == 4:
        alpha = pixels[3:] / 255
        blended = pixels[:3] * alpha + 255 * (1 - alpha)
        return blended if pixels.is_floating_point() else blended.round().to(torch.uint8)
    return pixels.expand(3, -1, -1)


def _tensor(array: np.ndarray, name: str) -> torch.Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name}: expected an array of numbers, got {array.dtype}")
    # a tensor has neither negative strides nor foreign byte order
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _to_255(array: torch.Tensor, name: str) -> torch.Tensor:
    if array.is_complex():
        raise ValueError(f"{name}: expected an array of numbers, got {array.dtype}")
    if array.dtype == torch.uint8:
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    if array.dtype == torch.uint16:
        return (array.float() / 257).round().to(torch.uint8)
    values = array.float()
    low, high = values.aminmax()
    # NaN fails every comparison
    if not (low >= 0 and high <= 255):
        raise ValueError(f"{name}: expected numbers of 0 to 255 or 0 to 1, got {low.item():g} to {high.item():g}")
    if not array.is_floating_point():
        return values.to(torch.uint8)
    return values * 255 if high <= 1 else values
