"""Block-scaled FP8: dequantized = reference formula, bit for bit; quantize o dequantize = identity."""

import concurrent.futures

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mimo import fp8_mimo_v2
from modeling_mimo.conversion import fp8
from modeling_mimo.conversion.fp8 import (
    LARGEST_CODE,
    SMALLEST_SCALE,
    dequantize_blocks,
    dequantize_chunks,
    pad_chunks,
    quantize_blocks,
    quantize_chunks,
    scale_shape,
    unpad_chunks,
)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(256, 256), (200, 300), (1, 1), (13, 999), (3, 200, 130), (3, 256, 384), (2, 2, 129, 127)]
ORDINARY = [0.01, -3.7, 1.0, 2.0**-117, 2.0**119]
EXTREME = [0.0, -0.0, 1e-45, 1e-40, 2.0**-126, -1e-36, 2.0**120, 3e38, -3e38, float("inf"), float("nan")]


def reference(weight, scale, dtype, block=128):
    """The formula on checkpoint pages, written with plain indexing."""
    rows = torch.arange(weight.shape[-2]) // block
    cols = torch.arange(weight.shape[-1]) // block
    return (weight.to(torch.float32) * scale[..., rows[:, None], cols]).to(dtype)


def random_codes(shape, seed=0, nan=False):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if not nan:
        codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(torch.float8_e4m3fn)


def random_scales(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.01


def grid_of(shape, block=128):
    return (*shape[:-2], *scale_shape(*shape[-2:], block))


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(got, expected):
    assert got.dtype == expected.dtype
    assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", ORDINARY + EXTREME)
def test_all_codes_at_every_scale(dtype, factor):
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 2).view(torch.float8_e4m3fn)
    scale = torch.full((1, 4), factor)
    assert_same_bits(dequantize_blocks(codes, scale, dtype), reference(codes, scale, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nan", [False, True])
def test_any_shape(dtype, shape, nan):
    codes, scale = random_codes(shape, nan=nan), random_scales(grid_of(shape))
    expected = reference(codes, scale, dtype)
    assert_same_bits(dequantize_blocks(codes, scale, dtype), expected)
    out = torch.empty(shape, dtype=dtype)
    assert dequantize_blocks(codes, scale, dtype, out=out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("shape", [(1000, 1100), (129, 9000), (5, 384, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_steps(shape, dtype, monkeypatch):
    # steps of several blocks, and of a part of one (9000 columns)
    monkeypatch.setattr(fp8_mimo_v2, "_STEP_CPU", 2**18)
    codes, scale = random_codes(shape), random_scales(grid_of(shape))
    codes.view(torch.uint8)[..., 70, 3] = 0xFF
    assert_same_bits(dequantize_blocks(codes, scale, dtype), reference(codes, scale, dtype))


def test_values_known_by_hand():
    codes = torch.tensor([[0x00, 0x80, 0x01, 0x08, 0x38, 0xB8, 0x7E, 0x7F]], dtype=torch.uint8)
    got = dequantize_blocks(codes.view(torch.float8_e4m3fn), torch.tensor([[2.0]]), torch.float32)[0].tolist()
    assert got[:7] == [0.0, 0.0, 2.0**-8, 2.0**-5, 2.0, -2.0, 896.0]
    assert str(got[1]) == "-0.0"
    assert got[7] != got[7]


@pytest.mark.parametrize("block", [32, 100])
def test_other_block_sizes(block):
    codes, scale = random_codes((3, 210, 330)), random_scales(grid_of((3, 210, 330), block))
    got = dequantize_blocks(codes, scale, torch.bfloat16, block=block)
    assert_same_bits(got, reference(codes, scale, torch.bfloat16, block))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(dtype):
    codes = random_codes((3, 520, 300))[:, ::2, 20:]
    scale = random_scales((3, 6, 3))[:, ::2]
    out = torch.zeros(3, 260, 560, dtype=dtype)
    dequantize_blocks(codes, scale, dtype, out=out[..., ::2])
    assert_same_bits(out[..., ::2], reference(codes, scale, dtype))
    assert not out[..., 1::2].any()
    square = random_codes((256, 256)).t()
    assert_same_bits(
        dequantize_blocks(square, random_scales((2, 2)), dtype), reference(square, random_scales((2, 2)), dtype)
    )


def test_flushed_denormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        codes, scale = random_codes((2, 512, 1024)), random_scales((2, 4, 8))
        scale[0, 0, :3] = torch.tensor([0.0, 2.0**-117, 2.0**119])
        got = dequantize_blocks(codes, scale, torch.float32)
        expected = reference(codes, scale, torch.float32)
        tiny = dequantize_blocks(codes[0, :64, :64], torch.full((1, 1), 1e-40), torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, expected)
    assert not tiny.any()


def test_empty():
    assert dequantize_blocks(random_codes((0, 256)), torch.zeros(0, 2)).shape == (0, 256)
    assert dequantize_blocks(random_codes((4, 0, 256)), torch.zeros(4, 0, 2)).shape == (4, 0, 256)


def test_many_callers_and_modes():
    codes, scale = random_codes((1024, 1024)), random_scales((8, 8))
    expected = reference(codes, scale, torch.bfloat16)
    threads = torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: dequantize_blocks(codes, scale), range(8)))
    with torch.inference_mode():
        results.append(dequantize_blocks(codes, scale))
    results.append(dequantize_blocks(torch.nn.Parameter(codes, requires_grad=False), torch.nn.Parameter(scale)))
    for result in results:
        assert_same_bits(result, expected)
    assert not results[0].is_inference()
    assert not results[-1].requires_grad
    assert torch.get_num_threads() == threads


# Rows per chunk that divide by 128, that do not, and the released 3392.
CHUNKS = [(4, 256, 130), (4, 88, 256), (3, 300, 129), (1, 77, 64), (4, 3392, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunks", "rows", "cols"), CHUNKS)
def test_chunks(dtype, chunks, rows, cols):
    codes = random_codes((chunks * rows, cols))
    block_rows, block_cols = scale_shape(rows, cols)
    scale = random_scales((chunks * block_rows, block_cols))
    pieces = [
        reference(codes[c * rows : (c + 1) * rows], scale[c * block_rows : (c + 1) * block_rows], dtype)
        for c in range(chunks)
    ]
    assert_same_bits(dequantize_chunks(codes, scale, chunks, dtype), torch.cat(pieces))
    out = torch.empty(codes.shape, dtype=dtype)
    assert dequantize_chunks(codes, scale, chunks, dtype, out=out) is out
    assert_same_bits(out, torch.cat(pieces))
    padded = pad_chunks(codes, chunks)
    assert_same_bits(
        unpad_chunks(dequantize_blocks(padded, scale, dtype), chunks, rows),
        torch.cat(pieces),
    )


@pytest.mark.parametrize(("chunks", "rows", "cols"), CHUNKS)
def test_padding_round_trip(chunks, rows, cols):
    codes = random_codes((2, chunks * rows, cols), nan=True)
    padded = pad_chunks(codes, chunks)
    block_rows = scale_shape(rows, cols)[0]
    assert padded.shape == (2, chunks * block_rows * 128, cols)
    assert torch.equal(bits(unpad_chunks(padded, chunks, rows)), bits(codes))
    margin = padded.unflatten(1, (chunks, -1))[:, :, rows:]
    assert not bits(margin).any()


def test_released_grid_sizes():
    # MiMo-V2.5: GA 13568 rows in 4 chunks have 108 scale rows, not ceil(13568 / 128) = 106.
    assert quantize_chunks(torch.zeros(13568, 4), 4)[1].shape == (108, 1)
    assert quantize_chunks(torch.zeros(14848, 4), 4)[1].shape == (116, 1)
    assert pad_chunks(torch.zeros(13568, 4), 4).shape == (4 * 3456, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_idempotent(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.03
    codes, scale = quantize_blocks(weight)
    assert codes.shape == weight.shape
    assert scale.shape == grid_of(shape)
    values = dequantize_blocks(codes, scale, torch.float32)
    # Half a step of a 3-bit mantissa, or half the smallest code.
    largest = scale.abs().amax() * 2.0**-10
    assert ((values - weight).abs() <= weight.abs() * 2.0**-4 * 1.00001 + largest).all()
    again, scale_again = quantize_blocks(values)
    assert_same_bits(again, codes)
    assert_same_bits(scale_again, scale)


def quantize_reference(weight, block=128):
    """Tile by tile, as the docstring says it."""
    rows, cols = weight.shape
    codes, scale = torch.empty(rows, cols, dtype=torch.uint8), torch.empty(scale_shape(rows, cols, block))
    for top in range(0, rows, block):
        for left in range(0, cols, block):
            place = slice(top, top + block), slice(left, left + block)
            tile = weight[place].float()
            amax = tile.abs().max()
            factor = (amax / LARGEST_CODE).clamp(min=SMALLEST_SCALE)
            # up to a multiple of 16 units in the last place: 20 significant bits
            factor = ((factor.view(torch.int32) + 15) // 16 * 16).view(torch.float32)
            factor = torch.ones(()) if amax == 0 else factor
            rounded = (tile / factor).clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.float8_e4m3fn)
            codes[place] = rounded.view(torch.uint8)
            scale[top // block, left // block] = factor
    return codes.view(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("step", [2**13, 2**15, 2**17, 2**20])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantize_in_steps_of_any_size(step, dtype, monkeypatch):
    monkeypatch.setattr(fp8, "_STEP", step)
    weight = torch.randn(3, 128 * 5 + 17, 700, generator=torch.Generator().manual_seed(6)).to(dtype)
    weight[1, 130:300] = 0
    for matrix, *got in zip(weight, *quantize_blocks(weight)):
        for ours, expected in zip(got, quantize_reference(matrix)):
            assert_same_bits(ours, expected)
    # rows that do not lie together
    strided = weight[0].t()
    for ours, expected in zip(quantize_blocks(strided), quantize_reference(strided)):
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("place", [(0, 0), (129, 650), (300, 699)])
def test_quantize_finds_a_bad_value_anywhere(place, monkeypatch):
    monkeypatch.setattr(fp8, "_STEP", 2**14)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.zeros(301, 700)
        weight[place] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_blocks(weight)


@given(
    chunks=st.integers(1, 4),
    rows=st.integers(1, 300),
    cols=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 3),
    center=st.floats(-80, 80),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_quantize_dequantize_quantize_is_quantize(chunks, rows, cols, seed, spread, center):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(chunks * rows, cols, generator=generator)
    weight = weight * torch.exp2(torch.randn(chunks * rows, cols, generator=generator) * spread + center)
    codes, scale = quantize_chunks(weight, chunks)
    again, scale_again = quantize_chunks(dequantize_chunks(codes, scale, chunks, torch.float32), chunks)
    assert_same_bits(again, codes)
    assert_same_bits(scale_again, scale)


def test_quantize_odd_blocks():
    weight = torch.zeros(128, 5 * 128)
    weight[:, 128:256] = torch.randn(128, 128) * 1e-36
    weight[:, 256:384] = torch.randn(128, 128) * 1e36
    weight[:, 384:512] = -7.0
    codes, scale = quantize_blocks(weight)
    assert scale[0, 0] == 1.0
    assert scale[0, 4] == 1.0
    assert torch.isfinite(scale).all()
    values = dequantize_blocks(codes, scale, torch.float32)
    assert not values[:, :128].any()
    assert torch.equal(values[:, 384:512], weight[:, 384:512])
    again, scale_again = quantize_blocks(values)
    assert_same_bits(dequantize_blocks(again, scale_again, torch.float32), values)


@pytest.mark.parametrize(("chunks", "rows", "cols"), CHUNKS)
def test_quantize_chunks(chunks, rows, cols):
    weight = torch.randn(chunks * rows, cols, generator=torch.Generator().manual_seed(4))
    codes, scale = quantize_chunks(weight, chunks)
    pieces = [quantize_blocks(piece) for piece in weight.split(rows)]
    assert_same_bits(codes, torch.cat([piece[0] for piece in pieces]))
    assert_same_bits(scale, torch.cat([piece[1] for piece in pieces]))


def test_errors_name_the_shapes():
    codes = random_codes((13568, 128))
    with pytest.raises(ValueError, match=r"\[13568, 128\].*got \[108, 1\], expected \[106, 1\]"):
        dequantize_blocks(codes, torch.ones(108, 1))
    with pytest.raises(ValueError, match=r"\[13568, 128\] in 4 chunks of 3392.*got \[106, 1\], expected \[108, 1\]"):
        dequantize_chunks(codes, torch.ones(106, 1), 4)
    with pytest.raises(ValueError, match="divisible by 5 chunks"):
        dequantize_chunks(codes, torch.ones(108, 1), 5)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        dequantize_blocks(torch.zeros(2, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="float32"):
        dequantize_blocks(codes, torch.ones(106, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="int8"):
        dequantize_blocks(codes, torch.ones(106, 1), torch.int8)
    with pytest.raises(ValueError, match="out is"):
        dequantize_blocks(codes, torch.ones(106, 1), out=torch.zeros(1, 1))
    with pytest.raises(ValueError, match="rows, cols"):
        dequantize_blocks(codes[0], torch.ones(1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_blocks(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="divisible by 3 chunks"):
        pad_chunks(codes, 3)
    with pytest.raises(ValueError, match="rows_per_chunk = 4000"):
        unpad_chunks(codes, 4, 4000)
