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
"""Images to patches: sizes within a pixel budget, a bilinear resize, and the patch order of the vision tower."""

import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageInput
from transformers.utils import auto_docstring

from modeling_mimo.unknown_names_mimo_v2 import unknown_name

from .loading_arguments_mimo_v2 import check_loading_arguments
from .media_loading_mimo_v2 import TIMEOUT, flatten_images, load_image


MAX_ASPECT_RATIO = 200
# of a patch
CHANNELS = 3
# resized at a time: 1.5 MB of floats, which a core's cache holds and the allocator reuses
BAND_PIXELS = 2**17
# settings that may be None
OPTIONAL = ("num_frames", "min_frames")
KIND_NAMES = {numbers.Real: "a number", numbers.Integral: "an integer"}
# what Transformers writes into and passes with settings that is no setting
SERVICE_KEYS = ("image_processor_type", "video_processor_type", "processor_class", "auto_map")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of `factor` that about keep the aspect ratio and lie within the pixel budget.

    Rounding is Python's (half to even), as in Qwen2-VL. If a side is below `factor`, both are first scaled up until it
    is not, as SGLang does; vLLM widens the short side alone.

    Raises:
        ValueError: an aspect ratio above 200.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width} pixels")
    short = min(height, width)
    if short < factor:
        height, width = round(height * factor / short), round(width * factor / short)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = (height * width / max_pixels) ** 0.5
        rows = max(factor, int(height / shrink / factor) * factor)
        columns = max(factor, int(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = (min_pixels / (height * width)) ** 0.5
        rows, columns = (-int(-side * grow // factor) * factor for side in (height, width))
    return rows, columns


def allocate_patches(
    grids: Sequence[Sequence[int]], settings: dict[str, Any]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Memory for the patches of all grids (time, height, width).

    Returns:
        [patches, 3 * T * P * P] float32 without values, and per grid the part of it as
        [time, height / merge, width / merge, merge, merge, 3, T, P, P]: read flat, that is the tower's order.
    """
    patch, time, merge = (settings[name] for name in ("patch_size", "temporal_patch_size", "merge_size"))
    counts = [steps * rows * columns for steps, rows, columns in grids]
    flat = torch.empty(sum(counts), CHANNELS * time * patch**2)
    views = [
        part.view(steps, rows // merge, columns // merge, merge, merge, CHANNELS, time, patch, patch)
        for part, (steps, rows, columns) in zip(flat.split(counts), grids)
    ]
    return flat, views


def write_patches(frame: torch.Tensor, out: torch.Tensor, settings: dict[str, Any]) -> None:
    """Resizes and normalizes one frame and cuts it into patches.

    Equal to (x - 255 mean) / (255 std) of F.interpolate(x, size, mode="bilinear"), without antialias, of the frame as
    floats. It goes by bands, because getting memory for a 4K photo as floats takes longer than resizing it, and with
    NumPy, because threads of PyTorch would wait for one another after each operation on a band.

    Args:
        frame: [3, H, W] of 0 to 255.
        out: [rows, columns, merge, merge, 3, T, P, P] to write to; each of the T frames becomes this one.
    """
    rows, columns, merge, _, _, _, patch, _ = out.shape
    unit = merge * patch
    height, width = rows * unit, columns * unit
    # bands are rows of numbers, Pillow and FFmpeg give pixels of three
    frame, out = frame.contiguous().numpy(), out.numpy()
    mean, std = (np.float32(settings[name]).reshape(CHANNELS, 1, 1) * 255 for name in ("image_mean", "image_std"))
    above, below, lower = _neighbors(frame.shape[1], height)
    left, right, righter = _neighbors(frame.shape[2], width)
    step = max(1, BAND_PIXELS // (unit * width))

    def write_band(first: int) -> None:
        band = slice(first * unit, (first + step) * unit)
        if frame.shape[1] == height:
            pixels = frame[:, band].astype(np.float32)
        else:
            pixels = _mixed(frame[:, above[band]], frame[:, below[band]], lower[band, None])
        if frame.shape[2] != width:
            pixels = _mixed(pixels.take(left, axis=2), pixels.take(right, axis=2), righter)
        pixels -= mean
        pixels /= std
        patches = pixels.reshape(CHANNELS, -1, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        out[first : first + step] = patches[:, :, :, :, :, None]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # a list, so that errors come out
        list(pool.map(write_band, range(0, rows, step)))


def _neighbors(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row (or column) after a bilinear resize, the two before it that it lies between, and the weight of the
    second one.

    Positions are rounded to float32 once, as F.interpolate's fused multiply-add does: 2160 rows away from 0, a second
    rounding would move a row by a ten-thousandth and a pixel by 0.03 of 255.
    """
    scale = np.float64(np.float32(before / after))
    position = np.maximum((np.arange(after) + 0.5) * scale - 0.5, 0).astype(np.float32)
    first = np.minimum(position.astype(np.int64), before - 1)
    return first, np.minimum(first + 1, before - 1), position - first.astype(np.float32)


def _mixed(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """first + weight (second - first) as floats."""
    first, second = first.astype(np.float32, copy=False), second.astype(np.float32, copy=False)
    second -= first
    second *= weight
    second += first
    return second


def check_settings(settings: dict[str, Any], known: Iterable[str], arguments: Iterable[str]) -> None:
    """ValueError: an unknown name, a number that is not above 0, or bounds that contradict each other.

    arguments: names of further arguments of the call, one of which an unknown name may be meant to be.
    """
    for name, value in settings.items():
        if name not in known:
            raise ValueError(unknown_name(name, {*known, *arguments}, "a setting or an argument of the call"))
        if name in ("image_mean", "image_std"):
            if len(value) != CHANNELS:
                raise ValueError(f"{name}: expected {CHANNELS} numbers, got {value}")
        elif not (name in OPTIONAL and value is None):
            kind = numbers.Real if name == "fps" else numbers.Integral
            if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{name}: expected {KIND_NAMES[kind]} above 0, got {value!r}")
    if settings["min_pixels"] > settings["max_pixels"]:
        raise ValueError(
            f"min_pixels: expected at most max_pixels, {settings['max_pixels']}, got {settings['min_pixels']}"
        )


def released_settings(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict]:
    """`processor_config` of the config.json of a release, and the arguments that were not for finding it.

    ValueError: a checkpoint for text only, which has none.
    """
    config, unused = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
    if config.get("processor_config") is None:
        raise ValueError(f"{name_or_path}: expected `processor_config` in config.json, got a checkpoint for text only")
    return config["processor_config"], unused


class MiMoV2ImageProcessorKwargs(TypedDict, total=False):
    """min_pixels, max_pixels: bounds of height x width after resizing. image_mean, image_std: per channel, of 0 to 1.
    patch_size, temporal_patch_size, merge_size: pixels and frames of a patch, patches per side of a merge unit.
    """

    min_pixels: int | None
    max_pixels: int | None
    patch_size: int | None
    temporal_patch_size: int | None
    merge_size: int | None
    image_mean: list[float] | None
    image_std: list[float] | None


class ReleasedSettings:
    """What image and video processors share: settings by the names of `valid_kwargs`, those of a release, and those of
    one call."""

    # setting -> its name in `processor_config`
    released_names: dict[str, str]
    # arguments of a call that are no settings
    call_arguments: tuple[str, ...] = ()

    @classmethod
    def from_processor_config(cls, processor_config: dict[str, Any]) -> "ReleasedSettings":
        """From the `processor_config` of a released config.json."""
        settings = {own: processor_config.get(name) for own, name in cls.released_names.items()}
        return cls(**{name: value for name, value in settings.items() if value is not None})

    @classmethod
    def saved_or_released(cls, read: Callable, name_or_path: str | os.PathLike, kwargs: dict) -> tuple[dict, dict]:
        """Settings that `read`, Transformers' own reader, finds if our class saved them, else those of a release; and
        the arguments that were not for finding them. ValueError: an argument that nobody reads."""
        check_loading_arguments(kwargs, cls.setting_names())
        try:
            settings, unused = read(name_or_path, **kwargs)
            kinds = ("image_processor_type", "video_processor_type", "feature_extractor_type")
            if cls.__name__ in (settings.get(kind) for kind in kinds):
                return settings, unused
        except OSError:
            # no file of a processor; if there is no config.json either, the next line says so
            pass
        processor_config, unused = released_settings(name_or_path, kwargs)
        return cls.from_processor_config(processor_config).to_dict(), unused

    @classmethod
    def setting_names(cls) -> Iterable[str]:
        return cls.valid_kwargs.__annotations__

    def settings(self, **changes) -> dict[str, Any]:
        """This processor's settings with `changes`, of which None changes nothing. ValueError: not possible ones."""
        known = self.setting_names()
        values = {name: vars(self)[name] for name in known}
        values |= {name: value for name, value in changes.items() if value is not None or name not in known}
        check_settings(values, known, self.call_arguments)
        return values


@auto_docstring(
    custom_intro="""
    Images to `pixel_values` and `image_grid_thw`.

    `from_pretrained` of a release takes the settings from `processor_config` in its config.json: its
    preprocessor_config.json names another class, and pixel bounds that the models are not served with.
    """
)
class MiMoV2ImageProcessor(ReleasedSettings, BaseImageProcessor):
    valid_kwargs = MiMoV2ImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]
    call_arguments = ("images", "return_tensors", "timeout")

    released_names = {
        "min_pixels": "image_min_pixels",
        "max_pixels": "image_max_pixels",
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "merge_size",
    }

    def __init__(
        self,
        min_pixels: int = 8192,
        max_pixels: int = 8388608,
        patch_size: int = 16,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        **kwargs,
    ):
        r"""
        min_pixels (`int`, *optional*, defaults to 8192):
            Least height x width after resizing.
        max_pixels (`int`, *optional*, defaults to 8388608):
            Largest height x width after resizing.
        patch_size (`int`, *optional*, defaults to 16):
            Pixels per side of a patch.
        temporal_patch_size (`int`, *optional*, defaults to 2):
            Frames of a patch.
        merge_size (`int`, *optional*, defaults to 2):
            Patches per side of what becomes one token.
        """
        super().__init__()
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.patch_size, self.temporal_patch_size, self.merge_size = patch_size, temporal_patch_size, merge_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.settings(**{name: value for name, value in kwargs.items() if name not in SERVICE_KEYS})

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """What `save_pretrained` wrote, else the settings of a release."""
        return cls.saved_or_released(super().get_image_processor_dict, pretrained_model_name_or_path, kwargs)

    @auto_docstring
    def preprocess(
        self, images: ImageInput, return_tensors: str | None = None, timeout: float = TIMEOUT, **kwargs
    ) -> BatchFeature:
        r"""
        images (`ImageInput`):
            One image or a (nested) list: paths, URLs, bytes, base64 texts, file objects, Pillow images, numpy arrays
            or tensors. See `load_image` for what becomes of modes and number types.
        return_tensors (`str`, *optional*):
            `"pt"` as well as None: tensors of PyTorch; `"np"`: arrays.
        timeout (`float`, *optional*, defaults to 60.0):
            Seconds without an answer after which a server counts as unreachable.
        kwargs (`dict`, *optional*):
            Settings of this call by the names of MiMoV2ImageProcessorKwargs.

        Returns:
            `BatchFeature`: `pixel_values` [patches, 3 * temporal_patch_size * patch_size**2] float32, and
            `image_grid_thw` [images, 3], patches in time (1: a still image is its own next frame), height and width.

        Raises:
            ValueError, OSError: An image that cannot be used, by its index among all images of the call.
        """
        settings = self.settings(**kwargs)
        frames, grids = [], []
        for index, image in enumerate(flatten_images(images)):
            name = f"images[{index}]"
            frames.append(load_image(image, name, timeout))
            grids.append([1, *grid_of(frames[-1].shape[1:], settings, name)])
        if not grids:
            raise ValueError("images: expected at least one image, got none")
        flat, views = allocate_patches(grids, settings)
        for frame, view in zip(frames, views):
            write_patches(frame, view[0], settings)
        return BatchFeature({"pixel_values": flat, "image_grid_thw": torch.tensor(grids)}, tensor_type=return_tensors)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of this size; every `merge_size**2` of them become one token."""
        settings = self.settings(**(images_kwargs or {}))
        rows, columns = grid_of((height, width), settings, "image")
        return rows * columns


def grid_of(size: Sequence[int], settings: dict[str, Any], name: str) -> tuple[int, int]:
    """Patches in height and width of a frame of this size. ValueError: an aspect ratio above 200."""
    factor = settings["patch_size"] * settings["merge_size"]
    try:
        height, width = smart_resize(*size, factor, settings["min_pixels"], settings["max_pixels"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return height // settings["patch_size"], width // settings["patch_size"]


__all__ = ["MiMoV2ImageProcessor"]
