"""Draws the media of this folder: `python examples/media/make_media.py [FOLDER]`."""

import sys
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont


PAPER, INK = (250, 248, 242), (40, 44, 52)
COLOURS = [(214, 93, 66), (240, 180, 60), (90, 150, 110), (70, 110, 170), (130, 90, 150), (110, 110, 110)]
HARVEST = {"apples": 34, "pears": 21, "plums": 12, "quinces": 7, "cherries": 28}
SECONDS, FPS = 6, 12


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


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    draw_chart().save(folder / "chart.png", optimize=True)
    write_clip(folder / "clip.mp4")


if __name__ == "__main__":
    main()
