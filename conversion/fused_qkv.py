"""Fused QKV rows between chunked, plain and split order, FP8 scale blocks included.

A fused projection holds its rows in `chunks` equal groups, each `[Q_c | K_c | V_c]`; one chunk is the plain order
`[Q | K | V]`. Moving float rows is a permutation. FP8 rows bring a scale grid along that is counted in blocks of 128
rows inside each chunk (inside each tensor when split), so a block of the target may get rows of several blocks of the
source. Released geometries, rows of Q, K and V per chunk:

    V2.5 global           4 x [3072 | 192 | 128]    split and plain: K and V cross blocks
    V2.5 sliding, MTP     4 x [3072 | 384 | 256]    every part is whole blocks: always exact
    V2.5-Pro              8 x [3072 | 192 | 128]    as V2.5 global

Tensors in, tensors out: nothing here knows a file or a name. `sizes` are always the rows of (Q, K, V) over all chunks,
as `AttentionGeometry.qkv_sizes` gives them.
"""

import math

import torch

from .fp8 import BLOCK, LARGEST_CODE, scale_shape


# target blocks that are requantized at once: 33 MB of float32 at 4096 columns
_BLOCKS_PER_STEP = 16

FP8Tensor = tuple[torch.Tensor, torch.Tensor]


def split_qkv(
    weight: torch.Tensor, sizes: tuple[int, int, int], chunks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[sum of sizes, ...] in `chunks` groups `[Q_c | K_c | V_c]` -> Q, K and V, each a copy of its own.

    Any dtype, and a bias as well as a weight. ValueError: rows that are not the sum of `sizes`, or a size that
    `chunks` does not divide.
    """
    _check_rows(weight, sum(sizes), sizes, chunks)
    pieces = weight.unflatten(0, (chunks, -1)).split([size // chunks for size in sizes], dim=1)
    return tuple(piece.clone(memory_format=torch.contiguous_format).flatten(0, 1) for piece in pieces)


def fuse_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: int) -> torch.Tensor:
    """Inverse of `split_qkv`: Q, K and V with rows in the first dimension -> `chunks` groups `[Q_c | K_c | V_c]`.

    ValueError: a tensor whose rows `chunks` does not divide.
    """
    sizes = (len(q), len(k), len(v))
    _check_rows(q, sizes[0], sizes, chunks)
    return torch.cat([part.unflatten(0, (chunks, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)


def rechunk_qkv(weight: torch.Tensor, sizes: tuple[int, int, int], from_chunks: int, to_chunks: int) -> torch.Tensor:
    """The rows of a fused weight in `from_chunks` groups, put into `to_chunks` groups. ValueError as `split_qkv`."""
    return fuse_qkv(*split_qkv(weight, sizes, from_chunks), to_chunks)


def split_qkv_fp8(
    codes: torch.Tensor, scale: torch.Tensor, sizes: tuple[int, int, int], chunks: int
) -> tuple[FP8Tensor, FP8Tensor, FP8Tensor]:
    """`split_qkv` for FP8: each part as (codes, scale) with a scale grid of its own.

    codes: [sum of sizes, cols] float8_e4m3fn.
    scale: [chunks * ceil(rows per chunk / 128), ceil(cols / 128)] float32.

    A target block whose rows all had the same scales keeps codes and scales bit for bit. Any other is requantized
    with the smallest of its rows' scales that holds its largest value: rows of that scale still keep their codes.
    ValueError: shapes that do not fit; a NaN code, or a scale that is not finite and non-negative, in a block that
    has to be requantized.
    """
    origin = _origin(codes, scale, chunks)
    parts = zip(split_qkv(_as_bytes(codes), sizes, chunks), split_qkv(origin, sizes, chunks))
    return tuple(_regrid(part, scale, rows, 1) for part, rows in parts)


def fuse_qkv_fp8(parts: tuple[FP8Tensor, FP8Tensor, FP8Tensor], chunks: int) -> FP8Tensor:
    """`fuse_qkv` for FP8: (codes, scale) of Q, K and V -> (codes, scale). Exactness and errors as `split_qkv_fp8`."""
    origins, scale_rows = [], 0
    for codes, scale in parts:
        origins.append(_origin(codes, scale, 1) + scale_rows)
        scale_rows += len(scale)
    fused = fuse_qkv(*(_as_bytes(codes) for codes, _ in parts), chunks)
    return _regrid(fused, torch.cat([scale for _, scale in parts]), fuse_qkv(*origins, chunks), chunks)


def rechunk_qkv_fp8(
    codes: torch.Tensor, scale: torch.Tensor, sizes: tuple[int, int, int], from_chunks: int, to_chunks: int
) -> FP8Tensor:
    """`rechunk_qkv` for FP8: (codes, scale) in the new order. Exactness and errors as `split_qkv_fp8`."""
    origin = rechunk_qkv(_origin(codes, scale, from_chunks), sizes, from_chunks, to_chunks)
    return _regrid(rechunk_qkv(_as_bytes(codes), sizes, from_chunks, to_chunks), scale, origin, to_chunks)


def qkv_blocks_are_exact(sizes: tuple[int, int, int], source: int | str, target: int | str) -> bool:
    """Whether FP8 rows go from one form to the other without requantization, whatever their scales are.

    Args:
        source, target: a number of chunks, or `"split"`.
    """
    if source == "split":
        starts = torch.tensor([0, *(math.ceil(size / BLOCK) for size in sizes[:2])]).cumsum(0).tolist()
        parts = [_scale_row_of_rows(size, 1) + start for size, start in zip(sizes, starts)]
    else:
        parts = split_qkv(_scale_row_of_rows(sum(sizes), source), sizes, source)
    groups = [(part, 1) for part in parts] if target == "split" else [(fuse_qkv(*parts, target), target)]
    return not any(_is_mixed(_blocks(origin, chunks)).any() for origin, chunks in groups)


def _check_rows(weight: torch.Tensor, rows: int, sizes: tuple[int, ...], chunks: int) -> None:
    if chunks < 1 or any(size % chunks for size in sizes):
        raise ValueError(f"chunks: expected a divisor of the rows {list(sizes)} of Q, K and V, got {chunks}")
    if weight.dim() < 1 or len(weight) != rows:
        raise ValueError(f"weight: expected {rows} rows (Q, K and V of {list(sizes)}), got {list(weight.shape)}")


def _as_bytes(codes: torch.Tensor) -> torch.Tensor:
    # float8 has no index and comparison kernels
    return codes.view(torch.uint8)


def _scale_row_of_rows(rows: int, chunks: int) -> torch.Tensor:
    """[rows] int64: the row of the scale grid that scales each row, blocks counted inside each of `chunks` groups."""
    blocks = torch.arange(rows // chunks) // BLOCK
    return (torch.arange(chunks)[:, None] * math.ceil(rows // chunks / BLOCK) + blocks).flatten()


def _origin(codes: torch.Tensor, scale: torch.Tensor, chunks: int) -> torch.Tensor:
    """`_scale_row_of_rows` of a weight, after a look at its shape, dtypes and grid."""
    if codes.dim() != 2 or codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(
            "codes, scale: expected [rows, cols] torch.float8_e4m3fn and torch.float32, "
            f"got {list(codes.shape)} {codes.dtype} and {scale.dtype}"
        )
    rows, cols = codes.shape
    if chunks < 1 or rows % chunks:
        raise ValueError(f"chunks: expected a divisor of the {rows} rows, got {chunks}")
    block_rows, block_cols = scale_shape(rows // chunks, cols)
    if tuple(scale.shape) != (chunks * block_rows, block_cols):
        raise ValueError(
            f"scale of a weight {list(codes.shape)} in {chunks} chunks: "
            f"expected {[chunks * block_rows, block_cols]}, got {list(scale.shape)}"
        )
    return _scale_row_of_rows(rows, chunks)


def _blocks(values: torch.Tensor, chunks: int) -> torch.Tensor:
    """[rows] -> [scale rows, 128]: what the rows of each block have; a short block repeats its last row."""
    groups = values.view(chunks, -1)
    padding = -groups.shape[1] % BLOCK
    return torch.cat([groups, groups[:, -1:].expand(-1, padding)], dim=1).view(-1, BLOCK)


def _is_mixed(origin: torch.Tensor) -> torch.Tensor:
    """[n, 128] scale row of every row of a block -> [n] bool: rows of more than one."""
    return (origin != origin[:, :1]).any(dim=1)


def _regrid(codes: torch.Tensor, scale: torch.Tensor, origin: torch.Tensor, chunks: int) -> FP8Tensor:
    """(codes, scale) of rows in their new order, with a grid for `chunks` groups.

    codes: [rows, cols] uint8, a copy in the new order, changed in place. scale: the grid of the source. origin:
    [rows], the row of that grid that scales each row.
    """
    if not len(codes):
        return codes.view(torch.float8_e4m3fn), scale[:0]
    origin, rows = _blocks(origin, chunks), _blocks(torch.arange(len(codes)), chunks)
    grid = scale[origin[:, 0]]
    for step in _is_mixed(origin).nonzero().flatten().split(_BLOCKS_PER_STEP):
        codes[rows[step]], grid[step] = _requantize(codes[rows[step]], scale[origin[step]])
    return codes.view(torch.float8_e4m3fn), grid


def _requantize(codes: torch.Tensor, scale: torch.Tensor) -> FP8Tensor:
    """codes [n, 128, cols] uint8 with a scale per row [n, 128, block cols] -> codes, and one scale per block."""
    cols = codes.shape[-1]
    spread = scale.repeat_interleave(BLOCK, dim=-1)[..., :cols]
    values = codes.view(torch.float8_e4m3fn).to(torch.float32) * spread
    padded = torch.nn.functional.pad(values, (0, -cols % BLOCK))
    amax = padded.unflatten(-1, (-1, BLOCK)).abs().amax((1, 3))[:, None]
    if not (amax.isfinite().all() and scale.isfinite().all() and (scale >= 0).all()):
        raise ValueError("codes, scale: expected no NaN code and finite, non-negative scales in a requantized block")
    # a scale of zero holds zeros alone, which any other scale holds too
    holds = (scale > 0) & (scale * LARGEST_CODE >= amax)
    chosen = torch.where(holds, scale, torch.inf).amin(dim=1, keepdim=True)
    chosen = torch.where(chosen.isinf(), scale.amax(dim=1, keepdim=True), chosen)
    target = chosen.repeat_interleave(BLOCK, dim=-1)[..., :cols]
    rounded = (values / target).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(spread == target, codes, rounded), chosen[:, 0]


__all__ = [
    "fuse_qkv",
    "fuse_qkv_fp8",
    "qkv_blocks_are_exact",
    "rechunk_qkv",
    "rechunk_qkv_fp8",
    "split_qkv",
    "split_qkv_fp8",
]
