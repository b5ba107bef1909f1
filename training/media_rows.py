"""Which rows of the media tensors belong to which medium, and examples cut so that every medium stays whole."""

from collections.abc import Sequence

import torch


# tensors of media in a batch, in the order in which they are joined
MEDIA_ROWS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "audio_codes",
    "audio_code_lengths",
)
# kind -> its tensor of rows, and the one that says how many rows each medium has
_TENSORS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
    "audio": ("audio_codes", "audio_code_lengths"),
}


def cut_inputs(
    inputs: dict[str, torch.Tensor], learned: torch.Tensor, length: int, layout: Sequence
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """At most the first `length` tokens of one example, to the last learned one; media that are not whole are gone.

    Args:
        inputs: `input_ids`, `attention_mask` [1, S] and media tensors.
        learned: [1, S] bool.
        layout: the segments of the row, as `processor.explain` returns them.
    """
    extents = {}
    for segment in layout:
        if segment.kind in _TENSORS:
            first, _ = extents.get((segment.kind, segment.index), (segment.start, 0))
            extents[segment.kind, segment.index] = (first, segment.end)
    cut = length
    while True:
        # nothing is learned from what comes behind the last learned token
        places = learned[0, :cut].nonzero()
        cut = int(places[-1]) + 1 if len(places) else 0
        # the soundtrack of a video lies between its frames: a cut before one may cut the other
        broken = [first for first, end in extents.values() if first < cut < end]
        if not broken:
            break
        cut = min(broken)
    kept = {
        kind: sum(end <= cut for (of_kind, _), (_, end) in extents.items() if of_kind == kind) for kind in _TENSORS
    }
    result = {name: tensor[:, :cut] for name, tensor in inputs.items() if name not in MEDIA_ROWS}
    for kind, (rows, sizes) in _TENSORS.items():
        if kept[kind]:
            result[sizes] = inputs[sizes][: kept[kind]]
            counts = result[sizes] if kind == "audio" else result[sizes].prod(dim=-1)
            result[rows] = inputs[rows][: int(counts.sum())]
    return result, learned[:, :cut]


__all__ = ["MEDIA_ROWS", "cut_inputs"]
