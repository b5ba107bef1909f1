"""Fused QKV rows: split o fuse = identity bit for bit; FP8 blocks that fit are copied, others keep half their rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dequantize
from reference import split_qkv as reference_split

from modeling_mimo.conversion import fused_qkv
from modeling_mimo.conversion.fp8 import LARGEST_CODE, quantize_blocks, quantize_chunks
from modeling_mimo.conversion.fused_qkv import (
    fuse_qkv,
    fuse_qkv_fp8,
    qkv_blocks_are_exact,
    rechunk_qkv,
    rechunk_qkv_fp8,
    split_qkv,
    split_qkv_fp8,
)
from modeling_mimo.conversion.random_checkpoint import SIZES


pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

# rows of Q, K and V over all chunks, and the chunks
GEOMETRIES = {
    "V2.5 global": ((12288, 768, 512), 4),
    "V2.5 sliding": ((12288, 1536, 1024), 4),
    "V2.5-Pro": ((24576, 1536, 1024), 8),
    "tiny global": ((192, 48, 32), 2),
    "tiny sliding": ((192, 96, 64), 2),
}
EXACT = {"V2.5 sliding"}


@st.composite
def geometries(draw, largest=300):
    """(sizes, chunks, columns): chunk parts of any number of rows, so that blocks rarely fall together."""
    chunks = draw(st.integers(1, 5))
    sizes = tuple(chunks * draw(st.integers(1, largest)) for _ in range(3))
    return sizes, chunks, draw(st.integers(1, 300))


def random_weight(rows, columns, seed=0):
    """Rows of very different size, so that the scales of neighbouring blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp()


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def divisors(sizes):
    return [number for number in range(1, 9) if all(size % number == 0 for size in sizes)]


# Floats -----------------------------------------------------------------------------------------------------------


@given(geometry=geometries(), to_seed=st.integers(0, 100))
@PROPERTY
def test_split_and_fuse_are_inverse_and_so_is_rechunking(geometry, to_seed):
    sizes, chunks, columns = geometry
    weight = torch.randn(sum(sizes), columns)
    parts = split_qkv(weight, sizes, chunks)
    assert tuple(map(len, parts)) == sizes
    assert all(part.is_contiguous() for part in parts)
    assert len({part.untyped_storage().data_ptr() for part in (weight, *parts)}) == 4
    assert same_bits(fuse_qkv(*parts, chunks), weight)
    other = divisors(sizes)[to_seed % len(divisors(sizes))]
    moved = rechunk_qkv(weight, sizes, chunks, other)
    assert all(map(same_bits, split_qkv(moved, sizes, other), parts))
    assert same_bits(rechunk_qkv(moved, sizes, other, chunks), weight)


@pytest.mark.parametrize("sliding", [False, True])
def test_rows_are_those_of_the_naive_page(sliding):
    config = SIZES["tiny"]
    heads = {"swa_num_attention_heads": 8, "swa_head_dim": 24, "swa_v_head_dim": 16}
    sizes, chunks = GEOMETRIES["tiny sliding" if sliding else "tiny global"]
    weight = torch.randn(sum(sizes), 5)
    for got, expected in zip(split_qkv(weight, sizes, chunks), reference_split(weight, config | heads, sliding)):
        assert torch.equal(got, expected)
    plain = torch.cat(reference_split(weight, config | heads, sliding))
    assert torch.equal(rechunk_qkv(weight, sizes, chunks, 1), plain)


def test_a_bias_and_any_dtype():
    bias = torch.arange(12, dtype=torch.int16)
    q, k, v = split_qkv(bias, (6, 4, 2), 2)
    assert (q.tolist(), k.tolist(), v.tolist()) == ([0, 1, 2, 6, 7, 8], [3, 4, 9, 10], [5, 11])
    assert torch.equal(fuse_qkv(q, k, v, 2), bias)


# FP8 --------------------------------------------------------------------------------------------------------------


def values_by_rows(codes, scale, chunks):
    return dequantize(codes, scale, chunks)


def assert_error_is_small(got, expected, amax):
    """Half a step of a 3-bit mantissa, or half the smallest code of a scale that holds `amax`."""
    bound = torch.maximum(expected.abs() * 2.0**-4, amax / LARGEST_CODE * 2.0**-9)
    assert ((got - expected).abs() <= bound * 1.001).all()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("to", ["split", 1])
def test_released_geometries_are_exact_where_blocks_fit(name, to):
    sizes, chunks = GEOMETRIES[name]
    weight = random_weight(sum(sizes), 8)
    codes, scale = quantize_chunks(weight, chunks)
    expected = split_qkv(values_by_rows(codes, scale, chunks), sizes, chunks)
    exact = qkv_blocks_are_exact(sizes, chunks, to)
    assert exact == (name in EXACT)
    if to == "split":
        moved = split_qkv_fp8(codes, scale, sizes, chunks)
        got = [values_by_rows(*part, 1) for part in moved]
        back, scale_back = fuse_qkv_fp8(moved, chunks)
        # the query rows of a release are whole blocks of every chunk
        assert torch.equal(got[0], expected[0]) == (not name.startswith("tiny"))
    else:
        moved = rechunk_qkv_fp8(codes, scale, sizes, chunks, to)
        got = split_qkv(values_by_rows(*moved, to), sizes, to)
        back, scale_back = rechunk_qkv_fp8(*moved, sizes, to, chunks)
    if exact:
        assert all(map(torch.equal, got, expected))
        assert same_bits(back, codes)
        assert same_bits(scale_back, scale)
    else:
        assert not all(map(torch.equal, got, expected))
    for part, value in zip(got, expected):
        assert_error_is_small(part, value, weight.abs().amax())


@given(geometry=geometries(), seed=st.integers(0, 2**31))
@PROPERTY
def test_fp8_blocks_are_copied_when_exact_and_near_otherwise(geometry, seed):
    sizes, chunks, columns = geometry
    weight = random_weight(sum(sizes), columns, seed)
    codes, scale = quantize_chunks(weight, chunks)
    untouched = codes.view(torch.uint8).clone()
    expected = split_qkv(values_by_rows(codes, scale, chunks), sizes, chunks)
    parts = split_qkv_fp8(codes, scale, sizes, chunks)
    assert torch.equal(codes.view(torch.uint8), untouched)
    exact = [torch.equal(values_by_rows(*part, 1), value) for part, value in zip(parts, expected)]
    if qkv_blocks_are_exact(sizes, chunks, "split"):
        assert all(exact)
    for part, value in zip(parts, expected):
        assert_error_is_small(values_by_rows(*part, 1), value, weight.abs().amax())
    fused = fuse_qkv_fp8(parts, chunks)
    assert fused[1].shape == scale.shape
    if all(exact) and qkv_blocks_are_exact(sizes, "split", chunks):
        assert torch.equal(values_by_rows(*fused, chunks), values_by_rows(codes, scale, chunks))


@given(blocks=st.tuples(*[st.integers(1, 3)] * 3), chunks=st.integers(1, 4), cols=st.integers(1, 260))
@PROPERTY
def test_whole_blocks_come_back_bit_for_bit(blocks, chunks, cols):
    sizes = tuple(128 * chunks * count for count in blocks)
    codes, scale = quantize_chunks(random_weight(sum(sizes), cols), chunks)
    codes.view(torch.uint8)[0, 0] = 0x7F
    assert qkv_blocks_are_exact(sizes, chunks, "split")
    split = split_qkv_fp8(codes, scale, sizes, chunks)
    back = fuse_qkv_fp8(split, chunks)
    assert same_bits(back[0], codes)
    assert same_bits(back[1], scale)
    for other in divisors(sizes):
        if qkv_blocks_are_exact(sizes, chunks, other) and qkv_blocks_are_exact(sizes, other, chunks):
            back = rechunk_qkv_fp8(*rechunk_qkv_fp8(codes, scale, sizes, chunks, other), sizes, other, chunks)
            assert same_bits(back[0], codes)
            assert same_bits(back[1], scale)


@given(geometry=geometries(), seed=st.integers(0, 2**31))
@PROPERTY
def test_blocks_of_equal_scales_are_exact_wherever_they_fall(geometry, seed):
    sizes, chunks, columns = geometry
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 0x7F, (sum(sizes), columns), dtype=torch.uint8, generator=generator)
    codes = codes.view(torch.float8_e4m3fn)
    block_rows, block_cols = quantize_chunks(codes.float(), chunks)[1].shape
    scale = torch.rand(1, block_cols, generator=generator).expand(block_rows, -1).contiguous()
    parts = split_qkv_fp8(codes, scale, sizes, chunks)
    for (part, part_scale), expected in zip(parts, split_qkv(codes.view(torch.uint8), sizes, chunks)):
        assert torch.equal(part.view(torch.uint8), expected)
        assert (part_scale == scale[0]).all()


@given(geometry=geometries(largest=150), source=st.integers(0, 100), target=st.integers(0, 100))
@PROPERTY
def test_the_forecast_is_right_about_every_move(geometry, source, target):
    """Scales that are all different: a block is requantized exactly when it has rows of two."""
    sizes, _, _ = geometry
    forms = ["split", *divisors(sizes)]
    source, target = forms[source % len(forms)], forms[target % len(forms)]
    # a number of its own for each block of the source, in the order [Q; K; V]
    if source == "split":
        pieces = [torch.arange(size) // 128 + 1000 * part for part, size in enumerate(sizes)]
    else:
        per_chunk = sum(sizes) // source
        fused = torch.cat([torch.arange(per_chunk) // 128 + 1000 * chunk for chunk in range(source)])
        pieces = split_qkv(fused, sizes, source)
    groups = pieces if target == "split" else fuse_qkv(*pieces, target).chunk(target)
    pure = all(len(block.unique()) == 1 for group in groups for block in group.split(128))
    assert qkv_blocks_are_exact(sizes, source, target) == pure


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_forecast_from_split_projections(name):
    sizes, chunks = GEOMETRIES[name]
    assert qkv_blocks_are_exact(sizes, "split", chunks) == (name in EXACT)
    # only a last block may be short, and here K's is in the middle
    assert qkv_blocks_are_exact(sizes, "split", 1) == (not name.startswith("tiny"))
    # the second block has 64 rows of Q and 64 of K
    assert not qkv_blocks_are_exact((192, 64, 128), "split", 1)


def test_a_mixed_block_keeps_the_rows_of_its_scale_and_no_smaller_scale_would_do():
    codes = torch.full((256, 128), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    one, three = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    # the first block of the fused rows has 100 rows of scale 1 and 28 of scale 3
    parts = ((codes[:100], one), (codes[100:200], three), (codes[200:], three))
    fused, fused_scale = fuse_qkv_fp8(parts, 1)
    # 1 * 3 fits the smaller scale
    assert fused_scale.flatten().tolist() == [1.0, 3.0]
    assert fused[:100].float().eq(1).all()
    assert fused[100:128].float().eq(3).all()
    assert fused[128:].float().eq(1).all()
    # 400 * 3 does not
    codes.view(torch.uint8)[127] = 0x7D
    _, fused_scale = fuse_qkv_fp8(parts, 1)
    assert fused_scale.flatten().tolist() == [3.0, 3.0]


def test_zero_scales_and_zero_codes():
    codes = torch.zeros(256, 130, dtype=torch.uint8)
    codes[200:, 5] = 0x38
    codes, scale = codes.view(torch.float8_e4m3fn), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    # rows of both blocks meet in the first 128
    sizes = (64, 32, 32)
    parts = [(codes[64:128], scale[:1]), (codes[:32], scale[:1]), (codes[200:232], scale[1:])]
    fused, fused_scale = fuse_qkv_fp8(tuple(parts), 1)
    assert sum(sizes) == len(fused)
    assert torch.equal(values_by_rows(fused, fused_scale, 1)[96:], values_by_rows(codes[200:232], scale[1:], 1))
    assert not values_by_rows(fused, fused_scale, 1)[:96].any()


def test_rows_that_keep_their_scale_keep_their_codes_even_where_products_are_denormal():
    codes = torch.arange(128, dtype=torch.uint8)[:, None].expand(128, 128).contiguous()
    codes[0x7F] = 0
    codes, small, large = codes.view(torch.float8_e4m3fn), torch.tensor([[2.0**-149]]), torch.tensor([[2.0**-148]])
    fused, scale = fuse_qkv_fp8(((codes[:1], small), (codes[1:], large), (codes[:1], small)), 1)
    assert scale.flatten().tolist() == [large.item(), small.item()]
    assert same_bits(fused[:128], codes)


def test_steps_change_nothing(monkeypatch):
    sizes, chunks = (12288, 768, 512), 4
    codes, scale = quantize_chunks(random_weight(sum(sizes), 130), chunks)
    expected = rechunk_qkv_fp8(codes, scale, sizes, chunks, 1)
    monkeypatch.setattr(fused_qkv, "_BLOCKS_PER_STEP", 1)
    got = rechunk_qkv_fp8(codes, scale, sizes, chunks, 1)
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])


def test_more_rows_keep_their_codes_than_when_quantizing_anew():
    sizes, chunks = GEOMETRIES["V2.5 global"]
    weight = torch.randn(sum(sizes), 512, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_chunks(weight, chunks)
    values = split_qkv(values_by_rows(codes, scale, chunks), sizes, chunks)[1:]
    parts = split_qkv_fp8(codes, scale, sizes, chunks)[1:]
    moved = torch.cat([values_by_rows(*part, 1) - value for part, value in zip(parts, values)]).abs()
    anew = torch.cat([values_by_rows(*quantize_blocks(value), 1) - value for value in values]).abs()
    # a third of K and half of V get another scale
    assert (moved > 0).float().mean() < 0.41 < (anew > 0).float().mean()
    assert moved.sum() < anew.sum()


def test_errors_name_what_does_not_fit():
    codes, scale = quantize_chunks(torch.randn(272, 256), 2)
    with pytest.raises(ValueError, match=r"chunks: expected a divisor of the rows \[192, 48, 32\] .*, got 5"):
        split_qkv(torch.zeros(272, 2), (192, 48, 32), 5)
    with pytest.raises(ValueError, match=r"weight: expected 272 rows .*, got \[270, 2\]"):
        split_qkv(torch.zeros(270, 2), (192, 48, 32), 2)
    with pytest.raises(ValueError, match=r"in 1 chunks: expected \[3, 2\], got \[4, 2\]"):
        split_qkv_fp8(codes, scale, (192, 48, 32), 1)
    with pytest.raises(ValueError, match=r"float8_e4m3fn and torch\.float32, got .* and torch\.float16"):
        split_qkv_fp8(codes, scale.half(), (192, 48, 32), 2)
    with pytest.raises(ValueError, match="a divisor of the 272 rows, got 3"):
        rechunk_qkv_fp8(codes, scale, (192, 48, 32), 3, 1)
    # row 4 of the second chunk is row 100 of Q, whose first block has rows of both chunks
    codes.view(torch.uint8)[140] = 0x7F
    with pytest.raises(ValueError, match="no NaN code"):
        split_qkv_fp8(codes, scale, (192, 48, 32), 2)
