"""MXFP4: dequantized = reference formula for every code and exponent; quantize o dequantize = identity; V2.6 files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dequantize_mxfp4 as reference
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import token_ids
from transformers import AutoModelForCausalLM

from modeling_mimo import MiMoV2FP8Config, mxfp4_mimo_v2
from modeling_mimo.checkpoint_mimo_v2 import Checkpoint, check_tensors, read_config
from modeling_mimo.cli.inspect import inspect_target
from modeling_mimo.cli.releases import read_target
from modeling_mimo.conversion import mxfp4
from modeling_mimo.conversion.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


def assert_same_numbers(got, expected):
    """The same bits, and NaN where NaN is expected."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    numbers = ~expected.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    integers = {2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got[numbers].view(integers), expected[numbers].view(integers))


def every_byte(exponents):
    """Every byte at every of `exponents`, 16 bytes per group."""
    packed = torch.arange(256, dtype=torch.uint8).expand(len(exponents), 256).contiguous()
    return packed, torch.tensor(list(exponents), dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()


# Tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# all of them together, and those that the fast way takes
@pytest.mark.parametrize("exponents", [range(256), range(241), range(240, 256)], ids=str)
def test_every_code_at_every_exponent(dtype, exponents):
    packed, scale = every_byte(exponents)
    assert_same_numbers(dequantize_mxfp4(packed, scale, dtype), reference(packed, scale).to(dtype))


def test_values_known_by_hand():
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8)
    got = dequantize_mxfp4(packed, torch.tensor([[128]], dtype=torch.uint8), torch.float32)[0, :16].tolist()
    # the low nibble is the even column
    assert got[:8] == [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert [str(value) for value in got[8:10]] == ["-0.0", "-1.0"]
    assert dequantize_mxfp4(packed, torch.tensor([[255]], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 96), (3, 7, 64), (2, 2, 3, 160)])
def test_any_shape_in_steps(shape, monkeypatch):
    monkeypatch.setattr(mxfp4_mimo_v2, "_STEP_CPU", 128)
    monkeypatch.setattr(mxfp4, "_STEP", 128)
    *lead, cols = shape
    packed = torch.randint(0, 256, (*lead, cols // 2), dtype=torch.uint8)
    scale = torch.randint(100, 140, (*lead, cols // 32), dtype=torch.uint8)
    got = dequantize_mxfp4(packed, scale, torch.float32)
    assert_same_numbers(got, reference(packed, scale))
    out = torch.empty(shape)
    assert dequantize_mxfp4(packed, scale, torch.float32, out=out) is out
    assert_same_numbers(out, got)
    again, scale_again = quantize_mxfp4(got)
    assert_same_numbers(dequantize_mxfp4(again, scale_again, torch.float32), got)


def test_empty():
    empty = torch.zeros(0, 16, dtype=torch.uint8)
    assert dequantize_mxfp4(empty, empty[:, :1]).shape == (0, 32)
    packed, scale = quantize_mxfp4(torch.zeros(0, 64))
    assert (packed.shape, scale.shape) == ((0, 32), (0, 2))


def naive_codes(scaled):
    """Nearest value, ties to the even code, by comparing with all of them."""
    distance = (scaled.abs().double()[..., None] - VALUES.double()).abs()
    nearest = distance == distance.amin(dim=-1, keepdim=True)
    # of two that are equally near, the even one
    best = (nearest.int() * 2 + (torch.arange(8) % 2 == 0)).argmax(dim=-1)
    return best + 8 * scaled.signbit()


def unpacked(packed):
    return torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)


def test_codes_are_the_nearest_ones_and_ties_go_to_even():
    # a step of 2**-10 meets every tie; the neighbours in float32 of each tie are on the right side of it
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    beside = torch.cat([torch.nextafter(ties, torch.tensor(end)) for end in (0.0, 9.0)])
    values = torch.cat([torch.arange(0, 7, 2**-10), ties, beside])
    values = torch.cat([values, -values])
    values = torch.cat([values, torch.zeros(-len(values) % 31)])
    groups = torch.cat([torch.full((len(values) // 31, 1), 6.0), values.view(-1, 31)], dim=1)
    packed, scale = quantize_mxfp4(groups)
    assert (scale == 127).all()
    assert torch.equal(unpacked(packed).int(), naive_codes(groups).int())


@pytest.mark.parametrize(
    ("largest", "exponent", "code"),
    [
        (0.0, 127, 0),
        (4.0, 127, 6),
        (6.0, 127, 7),
        # still rounds to 6; from 7 on the exponent of the specification would saturate
        (6.99, 127, 7),
        (7.0, 128, 6),
        (7.99, 128, 6),
        (8.0, 128, 6),
        (3.49, 126, 7),
        (3.5, 127, 6),
        (2.0**-126, 0, 4),
        (2.0**-129, 127, 0),
        (2.0**-128, 0, 1),
        # the next exponent would dequantize to infinity
        (3.4e38, 252, 7),
    ],
)
def test_the_exponent_is_the_smallest_that_holds_the_largest(largest, exponent, code):
    group = torch.zeros(1, 32)
    group[0, 5] = -largest
    packed, scale = quantize_mxfp4(group)
    assert scale.item() == exponent
    assert unpacked(packed)[0, 5] == code + 8


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 20),
    center=st.integers(-140, 127),
    dtype=st.sampled_from(DTYPES),
)
@PROPERTY
def test_quantizing_again_gives_the_same_bytes(rows, groups, seed, spread, center, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * 32, generator=generator)
    weight = weight * torch.exp2(torch.randn(rows, groups * 32, generator=generator) * spread + center)
    limit = torch.finfo(dtype).max
    weight = weight.clamp(-limit, limit).to(dtype)
    packed, scale = quantize_mxfp4(weight)
    values = dequantize_mxfp4(packed, scale, torch.float32)
    assert values.isfinite().all()
    again, scale_again = quantize_mxfp4(values)
    assert torch.equal(again, packed)
    assert torch.equal(scale_again, scale)
    # within half a step: a quarter of the value (0.5 to 1 and 4 to 6: an eighth and more), or of the smallest code
    step = torch.exp2(scale.float() - 127).repeat_interleave(32, dim=-1)
    inside = weight.float().abs() < 7 * step
    error = (values - weight.float()).abs()
    assert (error <= torch.maximum(weight.float().abs() / 4, step / 4))[inside].all()


@given(seed=st.integers(0, 2**31), low=st.integers(0, 254))
@PROPERTY
def test_canonical_bytes_come_back(seed, low):
    """Any group whose largest code is 4 or 6 has one exponent that gives its values."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (4, 64), generator=generator)
    codes[:, ::32] = 6 + 8 * (seed % 2)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    scale = torch.randint(low, 255, (4, 2), generator=generator).clamp(max=252).to(torch.uint8)
    again, scale_again = quantize_mxfp4(dequantize_mxfp4(packed, scale, torch.bfloat16))
    assert torch.equal(again, packed)
    assert torch.equal(scale_again, scale)


def test_errors_name_the_shapes():
    packed, scale = every_byte([127])
    with pytest.raises(ValueError, match=r"packed \[1, 256\]: expected \[1, 16\], got \[1, 8\]"):
        dequantize_mxfp4(packed, scale[:, :8])
    with pytest.raises(ValueError, match=r"cols divisible by 32, got \[1, 8\]"):
        dequantize_mxfp4(packed[:, :8], scale)
    with pytest.raises(ValueError, match=r"expected torch.uint8, got torch.uint8 and torch.float32"):
        dequantize_mxfp4(packed, scale.float())
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got torch.int8"):
        dequantize_mxfp4(packed, scale, torch.int8)
    with pytest.raises(ValueError, match=r"out: expected contiguous \[1, 512\]"):
        dequantize_mxfp4(packed, scale, out=torch.empty(1, 1024, dtype=torch.bfloat16)[:, ::2])
    with pytest.raises(ValueError, match=r"cols divisible by 32, got \[2, 31\]"):
        quantize_mxfp4(torch.zeros(2, 31))
    with pytest.raises(ValueError, match="floating point"):
        quantize_mxfp4(torch.zeros(2, 32, dtype=torch.int32))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_mxfp4(torch.full((1, 32), bad))


# Files of V2.6 (tests of loading, saving and logits: test_loading.py) -----------------------------------------------


SHORT = {
    "num_hidden_layers": 2,
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "hidden_size": 128,
    "n_routed_experts": 4,
    "num_nextn_predict_layers": 1,
    "vocab_size": 320,
}
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mxfp4") / "short"
    return write_random_checkpoint(folder, dtype="mxfp4", overrides=SHORT, with_tokenizer=False)


@pytest.fixture
def broken(short, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(short, tmp_path / "broken"))


def rewrite(folder, name, change):
    """Replaces tensor `name` by `change(tensor)`."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


def set_quantization(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def resident(folder):
    return load(folder, quantization_config=MiMoV2FP8Config(dequantize=False))


def test_inspection_finds_no_problem_and_two_parameters_per_byte(checkpoints):
    result = inspect_target(read_target(str(checkpoints["mxfp4"]), iter))
    assert result["problems"] == []
    config = json.loads((checkpoints["mxfp4"] / "config.json").read_text())
    moe_layers, experts = sum(config["moe_layer_freq"]), config["n_routed_experts"]
    weights = 3 * moe_layers * experts * config["moe_intermediate_size"] * config["hidden_size"]
    assert result["parts"]["experts"]["parameters"] == weights
    assert result["parts"]["experts"]["bytes"] == weights // 2 + weights // 32
    assert result["parts"]["experts"]["dtypes"] == {"U8": 6 * moe_layers * experts}


def test_the_report_says_what_the_experts_are(short):
    config, tensors = read_config(short / "config.json"), Checkpoint.from_folder(short).tensors
    report = check_tensors(config, tensors)
    assert report.fp8
    assert report.mxfp4
    assert "weights: FP8, experts MXFP4" in str(report)


@torch.no_grad()
def test_hit_experts_alone_are_dequantized(checkpoints, monkeypatch):
    model, seen = resident(checkpoints["mxfp4"]), []

    def recorded(packed, *args):
        seen.append(packed.shape)
        return dequantize_mxfp4(packed, *args)

    monkeypatch.setattr("modeling_mimo.quantization_mimo_v2.dequantize_mxfp4", recorded)
    experts = model.model.layers[1].mlp.experts
    experts(torch.randn(1, 256, dtype=torch.bfloat16), torch.tensor([[3, 5]]), torch.tensor([[0.5, 0.5]]))
    # gate_up and down of two experts, never the stack
    assert seen == [(256, 128), (256, 64)] * 2
    sizes = [parameter.element_size() * parameter.numel() for parameter in experts.parameters()]
    assert sum(sizes) * 8 == 8 * 3 * 128 * 256 * 4.25


@pytest.mark.parametrize("vision", [False, True])
def test_the_settings_of_the_release_reach_the_model(short, tmp_path, vision):
    folder = short
    if vision:
        options = {"dtype": "mxfp4", "with_tokenizer": False, "vision": True, "audio": True}
        folder = write_random_checkpoint(tmp_path / "omni", **options)
    model = load(folder)
    assert model.config.rms_norm_eps == model.model.norm.eps == 1e-6
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype == gate.compute_dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert model.config.audio_token_id == json.loads((folder / "config.json").read_text())["audio_token_id"]
    assert (model.visual is not None) == vision
    with torch.no_grad():
        assert model(token_ids(1, 9, vocab_size=300)).logits.isfinite().all()


@pytest.mark.parametrize("mode", [load, resident])
def test_a_broken_expert_is_refused_by_name(broken, mode):
    rewrite(broken, EXPERT, lambda tensor: tensor[:, :-1].contiguous())
    rewrite(broken, f"{EXPERT}_scale", lambda tensor: tensor.float())
    with pytest.raises(ValueError, match=r"do not match the config") as error:
        mode(broken)
    assert f"mis-shaped (expected, got) (1): {EXPERT} ([128, 64], [128, 63])" in str(error.value)
    assert f"wrong dtype (expected, got) (1): {EXPERT}_scale (U8, F32)" in str(error.value)


def test_mxfp4_outside_the_experts_is_refused_by_name(short):
    config, tensors = read_config(short / "config.json"), dict(Checkpoint.from_folder(short).tensors)
    name = "model.layers.0.mlp.gate_proj.weight"
    rows, columns = tensors[name].shape
    tensors[name] = tensors[name]._replace(dtype="U8", shape=(rows, columns // 2))
    tensors[f"{name}_scale"] = tensors.pop(f"{name}_scale_inv")._replace(dtype="U8", shape=(rows, columns // 32))
    with pytest.raises(ValueError, match=rf"unknown \(1\): {name}_scale;.* wrong dtype .*: {name} \(F8_E4M3 or"):
        check_tensors(config, tensors)


@pytest.mark.parametrize("mode", [load, resident])
def test_an_exponent_that_is_no_number_is_refused_by_name(broken, mode):
    rewrite(broken, f"{EXPERT}_scale", lambda tensor: tensor.index_fill(0, torch.tensor([7]), 255))
    with pytest.raises(ValueError, match=rf"scales: expected finite.* got others in {EXPERT}_scale\."):
        mode(broken)


@pytest.mark.parametrize("mode", [load, resident])
def test_experts_of_two_dtypes_are_refused(broken, mode):
    rewrite(broken, EXPERT, lambda tensor: dequantize_mxfp4(tensor, torch.full((128, 4), 120, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"experts of several dtypes \(1\): \S+\.down_proj \(BF16 and U8\)"):
        mode(broken)


@pytest.mark.parametrize("mode", [load, resident])
def test_a_config_that_says_another_format_is_refused(broken, mode, checkpoints, tmp_path):
    set_quantization(broken, store_dtype="fp8")
    with pytest.raises(ValueError, match=r"`store_dtype` .*: 'fp8' expects F8_E4M3 experts, got U8"):
        mode(broken)
    other = Path(shutil.copytree(checkpoints["fp8_fused"], tmp_path / "fp8"))
    set_quantization(other, store_dtype="mxfp4")
    with pytest.raises(ValueError, match=r"`store_dtype` .*: 'mxfp4' expects U8 experts, got F8_E4M3"):
        mode(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store_dtype": "nvfp4"}, "`store_dtype`: expected 'fp8' or 'mxfp4', got 'nvfp4'"),
        ({"mxfp4_block_size": 16}, "`mxfp4_block_size`: expected 32, got 16"),
    ],
)
def test_a_format_that_no_release_has_is_refused(broken, changes, message):
    set_quantization(broken, **changes)
    with pytest.raises(ValueError, match=message):
        load(broken)
