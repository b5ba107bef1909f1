"""Pictures and clips of MiMo-Micro's tasks: coloured shapes on a board of three by three cells."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw


COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
# place of a cell, row by row
PLACES = tuple("centre" if (r, c) == ("middle", "centre") else f"{r} {c}" for r in ROWS for c in COLUMNS)
# row and column steps of each motion
MOTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

# pixels of a cell, which is one token of the vision tower, and of a board
CELL, BOARD = 32, 96
# frames of a clip as the model sees it; the processor takes them in pairs
FRAMES = 8

# drawn this much larger and scaled down: soft edges
_SCALE = 4


@dataclass
class Thing:
    """A shape on the board: centre in pixels, radius in pixels, turn in degrees."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def title(self) -> str:
        """The name with its article, at the beginning of a sentence."""
        return f"An {self.name}" if self.colour == "orange" else f"A {self.name}"

    @property
    def place(self) -> str:
        return PLACES[int(self.y // CELL) * 3 + int(self.x // CELL)]


def thing(random: np.random.Generator, cell: int, shape: str | None = None, colour: str | None = None) -> Thing:
    """A random shape somewhere in a cell, 0 to 8 row by row; `colour` may also be one of no table, as (r, g, b)."""
    row, column = divmod(cell, 3)
    return Thing(
        shape or str(random.choice(SHAPES)),
        colour or str(random.choice(list(COLOURS))),
        (column + 0.5) * CELL + random.uniform(-3, 3),
        (row + 0.5) * CELL + random.uniform(-3, 3),
        random.uniform(10, 13.5),
        random.uniform(-12, 12),
    )


def background(random: np.random.Generator) -> np.ndarray:
    """[96, 96, 3] float32, dark, faintly coloured and noisy."""
    tint = random.uniform(10, 70) + random.uniform(-12, 12, 3)
    return (tint + random.normal(0, random.uniform(1, 6), (BOARD, BOARD, 3))).astype(np.float32)


def draw(things: list[Thing], ground: np.ndarray) -> np.ndarray:
    """[96, 96, 3] uint8 of the things on a background."""
    pixels = ground.copy()
    grain = ground - ground.mean((0, 1))
    for one in things:
        # only the square around the thing is drawn, as far as it lies on the board
        left, top = (max(0, int(centre - one.radius) - 2) for centre in (one.x, one.y))
        side = int(2 * one.radius) + 5
        window = np.s_[top : top + side, left : left + side]
        height, width = grain[window].shape[:2]
        mask = Image.new("L", (width * _SCALE, height * _SCALE))
        _outline(ImageDraw.Draw(mask), replace(one, x=one.x - left, y=one.y - top))
        cover = np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / 255
        colour = np.array(COLOURS[one.colour] if isinstance(one.colour, str) else one.colour, np.float32)
        # the ground's grain stays, so that a thing is not of one number alone
        pixels[window] = pixels[window] * (1 - cover) + (colour + grain[window]) * cover
    return pixels.clip(0, 255).astype(np.uint8)


def clip(one: Thing, motion: str, begin: int, distance: float, ground: np.ndarray) -> np.ndarray:
    """[8, 96, 96, 3] uint8: the thing rests, and from frame `begin` on moves `distance` pixels until the end."""
    down, right = MOTIONS[motion]
    frames = []
    for frame in range(FRAMES):
        done = distance * max(0, frame - begin + 1) / (FRAMES - begin)
        frames.append(draw([replace(one, x=one.x + right * done, y=one.y + down * done)], ground))
    return np.stack(frames)


def _outline(canvas: ImageDraw.ImageDraw, one: Thing) -> None:
    x, y, radius = one.x * _SCALE, one.y * _SCALE, one.radius * _SCALE
    box = (x - radius, y - radius, x + radius, y + radius)
    if one.shape == "circle":
        canvas.ellipse(box, fill=255)
    elif one.shape == "ring":
        canvas.ellipse(box, outline=255, width=int(radius * 0.38))
    else:
        canvas.polygon(_corners(one.shape, x, y, radius, np.radians(one.turn)), fill=255)


def _corners(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    if shape == "square":
        points = [(s * 0.85, t * 0.85) for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    elif shape == "triangle":
        points = [(np.sin(angle), -np.cos(angle)) for angle in np.radians([0, 120, 240])]
    elif shape == "cross":
        arm = 0.3
        points = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        points += [(-px, -py) for px, py in points]
    else:
        angles = np.radians(np.arange(0, 360, 36))
        points = [(r * np.sin(a), -r * np.cos(a)) for a, r in zip(angles, [1, 0.42] * 5)]
    cos, sin = np.cos(turn), np.sin(turn)
    return [(x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos)) for px, py in points]


__all__ = [
    "BOARD",
    "CELL",
    "COLOURS",
    "FRAMES",
    "MOTIONS",
    "PLACES",
    "SHAPES",
    "Thing",
    "background",
    "clip",
    "draw",
    "thing",
]
