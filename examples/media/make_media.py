"""Makes the media of this folder again: `python examples/media/make_media.py [FOLDER]`.

The speech needs the program `espeak-ng` (`apt install espeak-ng`, `brew install espeak-ng`) and is left out without.
"""

import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from PIL import Image, ImageDraw, ImageFont


PAPER, INK = (250, 248, 242), (40, 44, 52)
COLOURS = [(214, 93, 66), (240, 180, 60), (90, 150, 110), (70, 110, 170), (130, 90, 150), (110, 110, 110)]
HARVEST = {"apples": 34, "pears": 21, "plums": 12, "quinces": 7, "cherries": 28}
SECONDS, FPS = 6, 12
SPEECH = "The meeting starts at nine. Please bring the blue folder."
# hertz, one for each second of the clip with sound
NOTES = (220, 330, 440, 660)


def draw_chart() -> Image.Image:
    """A bar chart with title, axis and labels, 640 x 448."""
    image = Image.new("RGB", (640, 448), PAPER)
    draw = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(24), ImageFont.load_default(16)
    draw.text((320, 34), "Harvest in kilograms", INK, font=large, anchor="mm")
    base, scale = 384, 8
    for value in range(0, 40, 10):
        draw.line((64, base - scale * value, 608, base - scale * value), (205, 203, 198))
        draw.text((52, base - scale * value), str(value), INK, font=small, anchor="rm")
    for index, (name, value) in enumerate(HARVEST.items()):
        left = 88 + 104 * index
        draw.rectangle((left, base - scale * value, left + 64, base), COLOURS[index])
        draw.text((left + 32, base - scale * value - 12), str(value), INK, font=small, anchor="mm")
        draw.text((left + 32, base + 20), name, INK, font=small, anchor="mm")
    return image


def draw_frame(index: int) -> Image.Image:
    """Frame `index` of the clip, 320 x 192: a ball that moves to the right and bounces; each second has its number and
    its colour."""
    image = Image.new("RGB", (320, 192), PAPER)
    draw = ImageDraw.Draw(image)
    second, part = divmod(index, FPS)
    draw.line((0, 168, 320, 168), INK, width=3)
    phase = 2 * part / FPS - 1
    x, y = 20 + 280 * index / (SECONDS * FPS), 60 + 90 * phase**2
    draw.ellipse((x - 16, y - 16, x + 16, y + 16), COLOURS[second])
    draw.text((296, 28), str(second), INK, font=ImageFont.load_default(32), anchor="mm")
    return image


def write_clip(path: Path) -> None:
    """H.264 with B-frames and without sound."""
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "26", "bf": "2", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for index in range(SECONDS * FPS):
            file.mux(stream.encode(av.VideoFrame.from_image(draw_frame(index))))
        file.mux(stream.encode())


def draw_note(index: int) -> Image.Image:
    """Frame `index` of the clip with sound, 160 x 96: a bar per second that has passed, as high as its note."""
    image = Image.new("RGB", (160, 96), PAPER)
    draw = ImageDraw.Draw(image)
    for second in range(index // FPS + 1):
        left, height = 12 + 36 * second, NOTES[second] // 10
        draw.rectangle((left, 88 - height, left + 28, 88), COLOURS[second])
        draw.text((left + 14, 80), str(NOTES[second]), PAPER, font=ImageFont.load_default(12), anchor="mm")
    return image


def write_clip_with_sound(path: Path, rate: int = 24000) -> None:
    """H.264, and AAC of a tone that rises with every second."""
    hertz = np.repeat(np.array(NOTES, dtype=np.float64), rate)
    tone = (0.4 * np.sin(2 * np.pi * np.cumsum(hertz) / rate)).astype(np.float32)
    with av.open(path, "w") as file:
        picture = file.add_stream("libx264", rate=FPS, options={"crf": "26", "bf": "2", "threads": "1"})
        picture.width, picture.height, picture.pix_fmt = 160, 96, "yuv420p"
        picture.time_base = Fraction(1, FPS)
        sound = file.add_stream("aac", rate=rate, layout="mono", bit_rate=32000)
        for index in range(len(NOTES) * FPS):
            file.mux(picture.encode(av.VideoFrame.from_image(draw_note(index))))
            start = index * rate // FPS
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + rate // FPS], format="fltp", layout="mono")
            frame.rate, frame.pts = rate, start
            file.mux(sound.encode(frame))
        file.mux(picture.encode())
        file.mux(sound.encode())


def write_sweep(path: Path, rate: int = 44100, seconds: int = 3) -> None:
    """Stereo: left a tone from 100 Hz up to 8 kHz, right one at half the loudness from 8 kHz down to 100 Hz."""
    hertz = np.geomspace(100, 8000, seconds * rate)
    left, right = (np.sin(2 * np.pi * np.cumsum(part) / rate) for part in (hertz, hertz[::-1]))
    soundfile.write(path, np.stack([0.5 * left, 0.25 * right], axis=1), rate)


def write_speech(path: Path) -> None:
    """SPEECH by espeak-ng, as 16-bit mono at 16 kHz."""
    subprocess.run(["espeak-ng", "-v", "en-gb", "-s", "150", "-w", path, SPEECH], check=True)
    samples, rate = soundfile.read(path)
    soundfile.write(path, soxr.resample(samples, rate, 16000), 16000, subtype="PCM_16")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    draw_chart().save(folder / "chart.png", optimize=True)
    write_clip(folder / "clip.mp4")
    write_clip_with_sound(folder / "clip_with_sound.mp4")
    write_sweep(folder / "sweep.ogg")
    if shutil.which("espeak-ng"):
        write_speech(folder / "speech.wav")
    else:
        print("speech.wav is left out: espeak-ng is not installed (apt install espeak-ng, brew install espeak-ng)")


if __name__ == "__main__":
    main()
