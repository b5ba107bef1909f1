"""Preprocessing of a 4K photo and of a 60 s 720p clip against decoding and one resize of the same pixels.

    python benchmarks/preprocess.py

The bound is what nobody can leave out: Pillow's decode of the photo, or PyAV's decode of the clip up to the wanted
frames, and one call of PyTorch's bilinear interpolation (uint8 to float32 included) per image or frame. Ours does that
and also normalizes and writes the patches. Photo and clip are made here, with detail and noise as cameras have them.
"""

import io
import sys

import av
import numpy as np
import torch
import torch.nn.functional as F
from common import Bar, finish, interleaved, parse, parser, progress
from PIL import Image

from modeling_mimo.processors import MiMoV2ImageProcessor, MiMoV2VideoProcessor
from modeling_mimo.processors.image_processing_mimo_v2 import allocate_patches, write_patches


PHOTO, CLIP, RATE = (2160, 3840), (720, 1280), 30


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours, edges and some noise, [height, width, 3] uint8."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return (pixels + random.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8)


def jpeg(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(height, width, 0)).save(file, "JPEG", quality=92)
    return file.getvalue()


def mp4(height: int, width: int, seconds: int) -> bytes:
    """A camera that pans over a larger picture; H.264 with B-frames, as phones and editors write it."""
    scene, file = picture(height + 8 * seconds, width + 8 * seconds, 1), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(seconds * RATE):
            progress(f"encoding {index}/{seconds * RATE}")
            offset = index * 8 // RATE
            pixels = np.ascontiguousarray(scene[offset : offset + height, offset : offset + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    progress("")
    return file.getvalue()


def decode_photo(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def decode_clip(data: bytes, indices: list[int]) -> list[torch.Tensor]:
    wanted, frames = set(indices), []
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if index == indices[-1]:
                return frames
    return frames


def resize(frames: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
    return [
        F.interpolate(frame.permute(2, 0, 1)[None].float(), size, mode="bilinear", align_corners=False)
        for frame in frames
    ]


def patch(frames: list[torch.Tensor], outs: list[torch.Tensor], settings: dict) -> None:
    """Normalizing and writing alone: these frames have their size already."""
    for frame, out in zip(frames, outs):
        write_patches(frame, out, settings)


def patches(frame: torch.Tensor, settings: dict) -> torch.Tensor:
    """The patches of one frame [3, height, width] by their definition, as `allocate_patches` has them of one frame."""
    mean, std = (255 * torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    size, merge = settings["patch_size"], settings["merge_size"]
    rows, columns = (side // (merge * size) for side in frame.shape[1:])
    cut = ((frame - mean) / std).reshape(3, rows, merge, size, columns, merge, size)
    return cut.permute(1, 4, 2, 5, 0, 3, 6)


def measure(whole, decode, grid: list[int], settings: dict, repeats: int) -> tuple[dict[str, float], float]:
    """Median seconds of all of ours and of each part alone, and how far its patches are from those of the parts."""
    frames = decode()
    size = (grid[1] * settings["patch_size"], grid[2] * settings["patch_size"])
    exact = [frame[0] for frame in resize(frames, size)]
    resized = [frame.round().to(torch.uint8) for frame in exact]
    flat, (view,) = allocate_patches([grid], settings)
    # a still image fills both frames of its pair
    steps = [slice(None)] if len(frames) == 1 else [slice(at % 2, at % 2 + 1) for at in range(len(frames))]
    outs = [view[at // 2, ..., step, :, :] for at, step in enumerate(steps)]
    for frame, out in zip(exact, outs):
        out[:] = patches(frame, settings)[:, :, :, :, :, None]
    output = whole()
    ours = output["pixel_values"] if "pixel_values" in output else output["pixel_values_videos"]
    apart = (ours - flat).abs().max().item()
    functions = {
        "ours": whole,
        "decode": decode,
        # the results go one by one: 60 frames as floats would be 0.6 GB
        "resize": lambda: [resize([frame], size) and None for frame in frames],
        "patch": lambda: patch(resized, outs, settings),
    }
    return interleaved(functions, repeats), apart


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parser("Preprocessing against decoding and one resize.", "preprocess.py --seconds 10")
    options.add_argument("--seconds", type=int, default=None, help="length of the clip (default: 60)")
    options = parse(options, arguments, repeats=7)
    seconds = options.seconds or (2 if options.quick else 60)
    photo_size, clip_size = (size if not options.quick else (size[0] // 8, size[1] // 8) for size in (PHOTO, CLIP))
    photo, clip = jpeg(*photo_size), mp4(*clip_size, seconds)
    images, videos = MiMoV2ImageProcessor(), MiMoV2VideoProcessor()
    inputs = videos(clip)
    indices = inputs["video_metadata"][0].frames_indices
    image_grid, video_grid = images(photo)["image_grid_thw"][0].tolist(), inputs["video_grid_thw"][0].tolist()
    tasks = {
        f"{photo_size[1]} x {photo_size[0]} JPEG, {len(photo) / 1e6:.1f} MB": (
            lambda: images(photo),
            lambda: [decode_photo(photo)],
            image_grid,
            images.settings(),
        ),
        f"{seconds} s of {clip_size[1]} x {clip_size[0]} H.264, {len(clip) / 1e6:.1f} MB, {len(indices)} frames": (
            lambda: videos(clip),
            lambda: decode_clip(clip, indices),
            video_grid,
            videos.settings(),
        ),
    }
    rows, bars = [], []
    for name, task in tasks.items():
        times, apart = measure(*task, options.repeats)
        bound = times["decode"] + times["resize"]
        shares = [f"{times[part] / times['ours']:.0%}" for part in ("decode", "resize", "patch")]
        rows.append([name, times["ours"], bound, times["ours"] / bound, *shares])
        ratio = None if options.quick else times["ours"] / bound
        bars.append(Bar(f"{name}: difference from decode, resize and patches", apart, 1e-3, at_least=False))
        bars.append(Bar(f"{name}: times as long as decode and resize", ratio, 1.4, at_least=False))
    setting = f"From bytes in memory to patches in float32; median of {options.repeats}."
    notes = [
        "Shares are the time of each part alone divided by ours. They may sum to more than 1: ours resizes by bands, "
        "without memory for whole pictures of floats, and decodes of the clip only what other frames refer to."
    ]
    headings = ["input", "ours, s", "decode + resize, s", "ratio", "decode", "resize", "patches"]
    return finish(options.json, setting, headings, rows, bars, notes)


if __name__ == "__main__":
    sys.exit(main())
