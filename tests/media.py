"""Real image and video files made here, and plain ways back: every frame decoded, patches put together by loops."""

import io
import math
from fractions import Fraction

import av
import numpy as np
import torch
from av.video.frame import PictureType
from PIL import Image


# FFmpeg can be built without x264
H264 = "libx264" if "libx264" in av.codecs_available else "mpeg4"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8 of soft colors, equal to none of its own rotations."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BILINEAR))


def image_file(array_or_image, format: str, **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def clip(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Frames of a camera that pans over a picture, none like another."""
    scene = picture(height + count, width + 2 * count, seed=count)
    return [np.ascontiguousarray(scene[i : i + height, 2 * i : 2 * i + width]) for i in range(count)]


def video_file(path, frames, codec=H264, rate=10, times=None, options=None, format=None) -> str:
    """Writes a video; `times`: milliseconds of each frame instead of a constant rate."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def sound_file(path, cover: bool = False) -> str:
    """An MP4 with a second of silence and no video but, maybe, a cover."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        picture_stream = container.add_stream("mjpeg", rate=1) if cover else None
        if cover:
            picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 32, 32, "yuvj420p"
            picture_stream.disposition = av.stream.Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(picture(32, 32), format="rgb24")
            container.mux(picture_stream.encode(image))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return str(path)


def decode_all(path) -> tuple[list[Fraction], list[np.ndarray], int]:
    """(presentation times from the first frame in seconds, frames, number of B-frames), without any shortcut."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        frames = list(container.decode(stream))
        times = [None if frame.pts is None else (frame.pts - frames[0].pts) * stream.time_base for frame in frames]
        between = sum(frame.pict_type == PictureType.B for frame in frames)
        return times, [frame.to_ndarray(format="rgb24") for frame in frames], between


def normalized(pixels) -> torch.Tensor:
    """[..., H, W, 3] of 0 to 255 -> [..., 3, H, W] as the tower takes them."""
    pixels = torch.as_tensor(np.asarray(pixels)).float().movedim(-1, -3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean * 255) / (std * 255)


def frames_of_patches(patches: torch.Tensor, grid, patch: int = 16, merge: int = 2, pair: int = 2) -> torch.Tensor:
    """[frames, 3, H, W] from patches in the tower's order, one patch after the other."""
    time, rows, columns = (int(side) for side in grid)
    frames = torch.full((time * pair, 3, rows * patch, columns * patch), math.nan)
    rest = iter(patches.view(-1, 3, pair, patch, patch))
    for t in range(time):
        for unit_row in range(rows // merge):
            for unit_column in range(columns // merge):
                for inner_row in range(merge):
                    for inner_column in range(merge):
                        y = (unit_row * merge + inner_row) * patch
                        x = (unit_column * merge + inner_column) * patch
                        content = next(rest).transpose(0, 1)
                        frames[t * pair : (t + 1) * pair, :, y : y + patch, x : x + patch] = content
    if next(rest, None) is not None:
        raise ValueError("patches: expected as many as in the grid, got more")
    return frames
