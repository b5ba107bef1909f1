"""How the plots of the gallery look, and how their data is kept: one style, one palette, one form of JSON.

matplotlib is imported where something is drawn: the page is made of the JSON files without it.
"""

import io
import json
import math
from pathlib import Path

from PIL import Image


# Okabe and Ito's palette, which colour-blind people can tell apart
BLUE, RED, GREEN, ORANGE, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#6E6E6E"
# of the heat maps: one hue, light to dark, the same in grey
SHADES = "Blues"
# inches of a plot and pixels per inch: shown half as large, so that it is sharp on fine screens
WIDTH, DPI = 9.0, 160
INK = "#222222"


def set_style() -> None:
    """White ground, also on dark pages; no frames, faint grids, titles on the left."""
    import matplotlib

    matplotlib.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.dpi": DPI,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.wspace": 0.05,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#999999",
            "axes.titlesize": 9.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E4E4E4",
            "grid.linewidth": 0.7,
            "xtick.color": "#444444",
            "ytick.color": "#444444",
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
        }
    )


def panels(rows: int, columns: int, height: float, **options):
    """A figure of the gallery's width with rows x columns axes, [rows][columns]."""
    from matplotlib.figure import Figure

    set_style()
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path: Path) -> None:
    """As PNG of 256 colours, a third of the bytes, without the version that would make every file another."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def tokens_label(count: float) -> str:
    """512, "4K", "1M": K is 1024."""
    for size, letter in ((1024**2, "M"), (1024, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def bytes_label(size: float) -> str:
    """Three digits and a unit: "5.65 GiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{size / 2**power:.3g} {unit}"
    return f"{size:.0f} B"


def token_axis(axes, contexts: list[int]) -> None:
    """A logarithmic axis of tokens with a mark at every second context, the largest among them."""
    axes.set_xscale("log", base=2)
    step = 1 if len(contexts) <= 6 else 2
    marks = sorted(contexts)[::-1][::step]
    axes.set_xticks(marks, [tokens_label(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens (K = 1024)")


def number_axis(axis) -> None:
    """A logarithmic axis, of which 1, 2 and 5 times each power of ten are written out."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def byte_axis(axes) -> None:
    """A logarithmic axis of bytes with about six marks at powers of two."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    step = max(1, len(powers) // 6)
    axes.set_yticks([2**power for power in powers[::step]], [bytes_label(2**power) for power in powers[::step]])
    axes.minorticks_off()


def rounded(value):
    """Numbers of a JSON value to six digits."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_json(path: Path, value: dict) -> None:
    """Indented, with lists of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{lines_of(rounded(value))}\n", encoding="utf-8")


def lines_of(value, indent: str = "") -> str:
    inner = indent + "  "
    if isinstance(value, dict) and value:
        parts = [f"{inner}{json.dumps(key)}: {lines_of(part, inner)}" for key, part in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        return "[\n" + ",\n".join(inner + lines_of(part, inner) for part in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
