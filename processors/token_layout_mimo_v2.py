"""What each token of the model's inputs stands for, as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch


@dataclass
class Segment:
    """Tokens `start` to `end` (exclusive) of a row that belong together.

    kind: "padding", "text", "image", "video" (one pair of frames) or "audio" (a stretch of it).
    text: of a text, as decoded.
    index: of a medium, its place in `images` or `videos`; of audio and the sound of videos, that in
        `audio_code_lengths`. `frame`: of a video, the place of the pair.
    grid: of a medium, (t, h, w) in patches of 16 x 16 pixels; `patches`: how many of them these tokens stand for.
    seconds: of a video, the time that stands before the pair as "MM:SS".
    """

    kind: str
    start: int
    end: int
    text: str = ""
    index: int | None = None
    frame: int | None = None
    grid: tuple[int, int, int] | None = None
    patches: int | None = None
    seconds: int | None = None

    @property
    def tokens(self) -> int:
        return self.end - self.start

    def cells(self) -> tuple[str, ...]:
        """A line of the table: tokens, count, what, grid, patches, time, text."""
        what = self.kind
        if self.index is not None:
            name = self.kind if self.kind == "audio" else f"{self.kind}s"
            what = f"{name}[{self.index}]" + ("" if self.frame is None else f" pair {self.frame}")
        grid = "" if self.grid is None else " x ".join(map(str, self.grid))
        time = "" if self.seconds is None else f"{self.seconds // 60:02d}:{self.seconds % 60:02d}"
        text = self.text if len(self.text) <= 60 else f"{self.text[:40]} ... {self.text[-15:]}"
        return (
            f"{self.start}-{self.end - 1}",
            str(self.tokens),
            what,
            grid,
            "" if self.patches is None else str(self.patches),
            time,
            repr(text) if text else "",
        )


@dataclass
class TokenLayout:
    """`rows`: the segments of each row of `input_ids`. Prints as a table."""

    rows: list[list[Segment]] = field(default_factory=list)

    def __str__(self) -> str:
        head = ("tokens", "count", "what", "grid t x h x w", "patches", "time", "text")
        lines = []
        cells = [head, *(segment.cells() for row in self.rows for segment in row)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        for index, row in enumerate(self.rows):
            kinds = ("text", "image", "video", "audio", "padding")
            counts = {kind: sum(s.tokens for s in row if s.kind == kind) for kind in kinds}
            summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            lines += ["", f"row {index}: {sum(counts.values())} tokens ({summary})"]
            for line in (head, *(segment.cells() for segment in row)):
                padded = (
                    cell.rjust(width) if name in ("count", "patches") else cell.ljust(width)
                    for name, cell, width in zip(head, line, widths)
                )
                lines.append("  " + "  ".join(padded).rstrip())
        return "\n".join(lines[1:])

    __repr__ = __str__


def token_layout(tokenizer, token_ids: dict[str, int], merge_size: int, group_size: int, inputs) -> TokenLayout:
    """The layout of `inputs` (`input_ids`, and `attention_mask`, grids and lengths of codes where there are any).

    ValueError: more or fewer placeholders than the grids and lengths ask for.
    """
    ids = _rows(inputs["input_ids"])
    masks = _rows(inputs["attention_mask"]) if "attention_mask" in inputs else [[1] * len(row) for row in ids]
    media = {
        token_ids["image_token_id"]: _media("image", inputs.get("image_grid_thw"), merge_size),
        token_ids["video_token_id"]: _media("video", inputs.get("video_grid_thw"), merge_size),
        token_ids["audio_token_id"]: _sounds(inputs.get("audio_code_lengths"), group_size),
    }
    layout = TokenLayout([_row_segments(tokenizer, row, mask, media) for row, mask in zip(ids, masks)])
    left = [next(segments, None) for segments in media.values()]
    for segment in left:
        if segment is not None:
            raise ValueError(f"input_ids: expected placeholders of {segment.cells()[2]}, got none")
    return layout


def _rows(ids) -> list[list[int]]:
    rows = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return rows if rows and isinstance(rows[0], Sequence) else [rows]


def _media(kind: str, grids, merge_size: int) -> Iterator[Segment]:
    """Segments of the media in order, at position 0: whole images, and videos pair by pair."""
    for index, grid in enumerate(() if grids is None else torch.as_tensor(grids).tolist()):
        time, height, width = grid
        pairs = [None] if kind == "image" else range(time)
        patches = height * width * (time if kind == "image" else 1)
        for frame in pairs:
            yield Segment(kind, 0, patches // merge_size**2, "", index, frame, (time, height, width), patches)


def _sounds(lengths, group_size: int) -> Iterator[Segment]:
    for index, length in enumerate(() if lengths is None else torch.as_tensor(lengths).tolist()):
        yield Segment("audio", 0, -(-length // group_size), "", index)


def _row_segments(tokenizer, ids: list[int], mask: list[int], media: dict[int, Iterator[Segment]]) -> list[Segment]:
    segments = []
    start = 0
    while start < len(ids):
        if ids[start] in media:
            segment = next(media[ids[start]], None)
            if segment is not None and segment.kind == "audio":
                # the sound of a video goes on behind its next frames
                at_hand = next((at for at, token in enumerate(ids[start:]) if token != ids[start]), len(ids) - start)
                if at_hand < segment.tokens:
                    rest = replace(segment, end=segment.end - at_hand)
                    media[ids[start]] = chain([rest], media[ids[start]])
                    segment.end = at_hand
            end = start + (0 if segment is None else segment.tokens)
            if segment is None or ids[start:end] != [ids[start]] * segment.tokens:
                token = tokenizer.convert_ids_to_tokens(ids[start])
                wanted = "no more media" if segment is None else f"{segment.tokens} for {segment.cells()[2]}"
                raise ValueError(f"input_ids: expected {token} for {wanted} from token {start} on, got others")
            segment.start, segment.end = start, end
            if segment.kind == "video" and segments:
                segment.seconds = _seconds_before(segments[-1].text)
        else:
            end = start + 1
            while end < len(ids) and bool(mask[end]) == bool(mask[start]) and ids[end] not in media:
                end += 1
            text = tokenizer.decode(ids[start:end]) if mask[start] else ""
            segment = Segment("text" if mask[start] else "padding", start, end, text)
        segments.append(segment)
        start = end
    return segments


def _seconds_before(text: str) -> int | None:
    """The "MM:SS" in front of the last `<|vision_start|>` of `text`."""
    digits = text.removesuffix("<|vision_start|>").rpartition(">")[2]
    minutes, colon, seconds = digits.partition(":")
    return int(minutes) * 60 + int(seconds) if colon and (minutes + seconds).isdigit() else None
