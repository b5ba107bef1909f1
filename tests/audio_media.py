"""Real audio files made here, and plain ways back: whole files decoded at once, mel spectrograms by definition."""

import io
import math
import wave
from fractions import Fraction

import av
import numpy as np
import soundfile
import soxr


# of the pictures in videos
FPS = 10
# channels -> their name in FFmpeg
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def sound(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """[n, channels] float64 within -1 to 1: noise, so that every mel bin has something, and a tone per channel."""
    count = round(seconds * rate)
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, (count, channels))
    pitches = 220 * (1 + np.arange(channels))
    return noise + 0.3 * np.sin(2 * np.pi * pitches * np.arange(count)[:, None] / rate)


def sound_file(samples: np.ndarray, rate: int, format: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def av_file(
    path, samples=None, rate=44100, codec="aac", starts=0.0, pictures=0, pictures_start=0.0, pauses=None
) -> str:
    """Writes what FFmpeg can: sound, or pictures, or both, each beginning at its own second.

    pauses: seconds of the sound -> seconds of nothing behind them.
    """
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=FPS) if pictures else None
        audio = None
        if samples is not None:
            audio = container.add_stream(codec, rate=rate, layout=LAYOUTS[samples.shape[1]])
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
            for index in range(pictures):
                pixels = np.full((64, 64, 3), index % 256, dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index + round(pictures_start * FPS), Fraction(1, FPS)
                container.mux(video.encode(frame))
            container.mux(video.encode())
        if audio is not None:
            for at in range(0, len(samples), 1024):
                planes = np.ascontiguousarray(samples[at : at + 1024].T, dtype=np.float32)
                frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=audio.layout.name)
                late = starts + sum(length for after, length in (pauses or {}).items() if at >= after * rate)
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), at + round(late * rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return str(path)


def decode_wave(data: bytes) -> tuple[np.ndarray, int]:
    """([n, channels], rate) of integers in a WAV file, by the standard library."""
    with wave.open(io.BytesIO(data)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = file.readframes(file.getnframes())
    if width == 1:
        values = np.frombuffer(raw, np.uint8) - 128.0
    else:
        values = [int.from_bytes(raw[at : at + width], "little", signed=True) for at in range(0, len(raw), width)]
    return np.array(values, dtype=np.float64).reshape(-1, channels) / 2 ** (8 * width - 1), rate


def decode_frames(path) -> tuple[np.ndarray, int, float]:
    """([n, channels], rate, second of the first sample) of a file's sound, frame by frame and without any pause."""
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as container:
        frames = list(container.decode(audio=0))
    planes = [frame.to_ndarray() for frame in frames]
    if not frames[0].format.is_planar:
        planes = [plane.reshape(-1, frames[0].layout.nb_channels).T for plane in planes]
    samples = np.concatenate(planes, axis=1).T
    if samples.dtype.kind == "i":
        samples = samples / 2 ** (8 * samples.dtype.itemsize - 1)
    return samples, frames[0].sample_rate, float(frames[0].pts * frames[0].time_base)


def heard(samples: np.ndarray, rate: float, target: int = 24000) -> np.ndarray:
    """[n] at the rate of the model: every channel on its own and at once, then their average."""
    samples = np.asarray(samples, dtype=np.float32)
    channels = [soxr.resample(np.ascontiguousarray(channel), rate, target, quality="HQ") for channel in samples.T]
    return np.mean(channels, axis=0)


def triangles(bins: int, size: int, rate: int, lowest: float, highest: float) -> np.ndarray:
    """[size // 2 + 1, bins]: triangles over Hz whose corners are evenly spaced on the HTK mel scale."""

    def mel(hertz):
        return 2595 * math.log10(1 + hertz / 700)

    def hertz(mels):
        return 700 * (10 ** (mels / 2595) - 1)

    step = (mel(highest) - mel(lowest)) / (bins + 1)
    corners = [hertz(mel(lowest) + step * index) for index in range(bins + 2)]
    filters = np.zeros((size // 2 + 1, bins))
    for line in range(size // 2 + 1):
        frequency = line * rate / size
        for index in range(bins):
            left, middle, right = corners[index : index + 3]
            if left < frequency <= middle:
                filters[line, index] = (frequency - left) / (middle - left)
            elif middle < frequency < right:
                filters[line, index] = (right - frequency) / (right - middle)
    return filters


def mel_by_definition(samples: np.ndarray, rate=24000, bins=128, size=960, hop=240, lowest=0.0, highest=12000.0):
    """[1 + n // hop, bins] float64: log of the mel-weighted magnitudes of a Fourier transform written as a sum."""
    samples = np.asarray(samples, dtype=np.float64)
    places = np.arange(size)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * places / size)
    # whole turns taken off, for the sake of precision
    turns = np.outer(places, np.arange(size // 2 + 1)) % size / size
    cosines, sines = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    filters = triangles(bins, size, rate, lowest, highest)
    rows = []
    for middle in range(0, len(samples) + 1, hop):
        at = np.abs(middle - size // 2 + places)
        # a mirror at the first sample and one at the last
        at = np.where(at >= len(samples), 2 * (len(samples) - 1) - at, at)
        frame = samples[at] * window
        rows.append(np.hypot(frame @ cosines, frame @ sines) @ filters)
    return np.log(np.maximum(rows, 1e-7))
