"""bitsandbytes: codes are its own of every matrix, whatever the files hold; saved and read again they are the same."""

import json
import os
import shutil
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from patience import PATIENCE
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import assert_near, token_ids
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from modeling_mimo import MiMoV2ForCausalLM, MiMoV2FP8Config
from modeling_mimo.cli.main import main
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
SOURCES = ["fp8_fused", "bf16_fused", "fp8_split", "fp8_plain", "mxfp4"]
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 16}
PROJECTIONS = ("gate_up_proj", "down_proj")
KEPT = ("lm_head", "visual.", "audio_encoder.", "speech_embeddings.")


def settings(kind="nf4", **changes):
    return BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": torch.float32, **KINDS[kind], **changes})


def load(folder, kind="nf4", **options):
    """In float32, where nothing but the quantization is rounded."""
    options = {"quantization_config": settings(kind), "dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def plain(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def omni(checkpoints):
    return load(checkpoints["fp8_omni"])


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory):
    """kind -> (model, folder that it was saved to) of the FP8 checkpoint with towers."""
    root, made = tmp_path_factory.mktemp("saved"), {}

    def save(kind):
        if kind not in made:
            model = load(checkpoints["fp8_omni"], kind)
            # bitsandbytes may change layers in their first forward
            logits(model)
            model.save_pretrained(root / kind)
            made[kind] = model, root / kind
        return made[kind]

    return save


def ids_for(model):
    return token_ids(2, 20, vocab_size=2000)


@torch.no_grad()
def logits(model):
    return model(ids_for(model)).logits


def is_quantized(module):
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def experts_of(model):
    return {name: module for name, module in model.named_modules() if name.endswith(".experts")}


def quantized_by_hand(weight, kind):
    """Codes, scales and floats of one matrix, by bitsandbytes' functions."""
    if kind == "int8":
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return [codes, scale], bnb.functional.int8_vectorwise_dequant(codes, scale)
    codes, state = bnb.functional.quantize_4bit(
        weight, quant_type=kind[:3], compress_statistics=kind.endswith("double"), blocksize=64
    )
    parts = [codes.flatten(), state.absmax]
    if state.nested:
        parts += [state.state2.absmax, state.offset]
    return parts, bnb.functional.dequantize_4bit(codes, state)


def stored_parts(experts, name, expert, kind):
    suffixes = {"int8": ("", "_SCB"), "nf4 double": ("", "_absmax", "_nested_absmax", "_offset")}
    return [getattr(experts, name + suffix)[expert] for suffix in suffixes.get(kind, ("", "_absmax"))]


def assert_all_equal(got, expected):
    assert len(got) == len(expected)
    for left, right in zip(got, expected):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].dtype != right[name].dtype] == []
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def refused(call):
    """The message of a ValueError, which is one line."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        call()
    return str(caught.value)


# Quantizing -------------------------------------------------------------------------------------------------------


def test_what_is_quantized_and_what_is_not(omni):
    expected = {"qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    linears = {name: module for name, module in omni.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name, module in linears.items() if is_quantized(module)}
    assert {name.rpartition(".")[2] for name in quantized} == expected
    assert any(name.startswith("model.mtp.") for name in quantized)
    # nothing else but those of other modalities and the heads' input is left
    others = set(linears) - quantized
    assert others
    assert all(name.startswith(KEPT) or name.endswith("eh_proj") for name in others)
    assert not any(name.startswith(KEPT) for name in quantized)
    assert len(experts_of(omni)) == 7
    for experts in experts_of(omni).values():
        assert {parameter.dtype for parameter in experts.parameters()} == {torch.uint8, torch.float32}
        assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.uint8
    names = ("norm.weight", "embed_tokens.weight", "mlp.gate.weight", "attention_sink_bias", "enorm.weight")
    kept = {name: parameter for name, parameter in omni.named_parameters() if name.endswith(names)}
    assert all(parameter.dtype == torch.float32 for parameter in kept.values())
    assert {name.rpartition(".")[2] for name in kept} == {"weight", "attention_sink_bias"}
    assert omni.is_loaded_in_4bit
    assert omni.load_report.fp8


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_codes_are_those_of_the_floats_of_the_files(checkpoints, source, kind):
    """One step from FP8, MXFP4 or bf16 = bitsandbytes on each matrix of the dequantized model."""
    model, floats = load(checkpoints[source], kind, dtype=torch.bfloat16), plain(checkpoints[source]).bfloat16()
    for name, experts in experts_of(model).items():
        stacked = floats.get_submodule(name)
        for expert in (0, experts.num_experts - 1):
            for projection in PROJECTIONS:
                expected, _ = quantized_by_hand(getattr(stacked, projection)[expert], kind)
                assert_all_equal(stored_parts(experts, projection, expert, kind), expected)
    linears = {name: module for name, module in model.named_modules() if is_quantized(module)}
    assert len(linears) > 30
    for name, module in linears.items():
        (codes, *_), _ = quantized_by_hand(floats.get_submodule(name).weight, kind)
        assert torch.equal(module.weight.flatten(), codes.flatten()), name
    left, right = model.state_dict(), floats.state_dict()
    same = [name for name in left if name in right and left[name].shape == right[name].shape]
    plain_names = [name for name in same if left[name].dtype == right[name].dtype]
    assert all(torch.equal(left[name], right[name]) for name in plain_names)
    assert len(plain_names) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_the_dequantized_weights(checkpoints, kind):
    model, reference = load(checkpoints["fp8_fused"], kind), plain(checkpoints["fp8_fused"])
    for name, experts in experts_of(model).items():
        for projection in PROJECTIONS:
            floats = getattr(reference.get_submodule(name), projection).data
            for expert in range(experts.num_experts):
                floats[expert] = quantized_by_hand(floats[expert], kind)[1]
                assert torch.equal(experts.expert_weight(projection, expert, torch.float32), floats[expert])
    for name, module in model.named_modules():
        if is_quantized(module):
            weight = reference.get_submodule(name).weight.data
            weight.copy_(quantized_by_hand(weight, kind)[1])
    expected = logits(reference)
    if kind == "int8":
        # LLM.int8() rounds activations as well, on a CPU not in training mode
        assert (logits(model) - expected).norm() < 0.3 * expected.norm()
        model.train()
    assert_near(logits(model), expected, 1e-5 * expected.abs().max().item())


def test_blocks_do_not_reach_into_the_next_expert(checkpoints):
    """48 x 24 = 1152 weights are 18 blocks, 20 x 24 = 480 are seven and a half."""
    experts = experts_of(load(checkpoints["fp8_fused"]))["model.layers.1.mlp.experts"]
    for shape, blocks in (((48, 24), 18), ((20, 24), 8), ((3, 5), 1)):
        stored = experts.stored(*shape)
        assert stored["_absmax"][0] == (blocks,)
        weight = torch.randn(shape)
        parts = experts.quantize(weight)
        assert {suffix: (tuple(part.shape), part.dtype) for suffix, part in parts.items()} == stored


def test_modules_left_out_stay_floats(checkpoints):
    skip = settings(llm_int8_skip_modules=["o_proj", "model.layers.2.mlp.experts", "model.mtp"])
    model, floats = load(checkpoints["fp8_fused"], quantization_config=skip), plain(checkpoints["fp8_fused"])
    left = [name for name, module in model.named_modules() if is_quantized(module)]
    assert left
    assert not any(name.endswith("o_proj") or name.startswith(("model.mtp", "lm_head")) for name in left)
    kept = model.model.layers[2].mlp.experts
    assert torch.equal(kept.gate_up_proj, floats.model.layers[2].mlp.experts.gate_up_proj)
    assert model.model.layers[3].mlp.experts.gate_up_proj.dtype == torch.uint8
    assert logits(model).isfinite().all()


def test_left_out_modules_are_saved_and_stay_left_out(checkpoints, tmp_path):
    skip = settings(llm_int8_skip_modules=["o_proj", "model.layers.2.mlp.experts"])
    model = load(checkpoints["fp8_fused"], quantization_config=skip)
    model.save_pretrained(tmp_path)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_the_backbone_and_models_without_heads_or_towers(checkpoints, omni):
    options = {"quantization_config": settings(), "dtype": torch.float32}
    without = MiMoV2ForCausalLM.from_pretrained(checkpoints["fp8_omni"], load_towers=False, load_mtp=False, **options)
    assert without.model.mtp is None
    assert without.visual is None
    assert torch.equal(logits(without), logits(omni))
    backbone = AutoModel.from_pretrained(checkpoints["fp8_omni"], **options)
    with torch.no_grad():
        assert torch.equal(omni.lm_head(backbone(ids_for(omni)).last_hidden_state), logits(omni))


def test_memory_footprint_counts_every_byte(saved):
    for kind in ("nf4", "nf4 double", "int8"):
        model, folder = saved(kind)
        stored = 0
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            # a description in JSON, and a format number, are no tensors of the model
            skipped = ("bitsandbytes__nf4", "weight_format")
            stored += sum(part.nbytes for name, part in tensors.items() if not name.endswith(skipped))
        tables = sum(buffer.nbytes for _, buffer in model.named_buffers() if _ not in model.state_dict())
        assert model.get_memory_footprint() == stored + tables


# Saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_again_is_the_same_model(saved, kind):
    model, folder = saved(kind)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    quantized = [module for module in again.modules() if is_quantized(module)] + list(experts_of(again).values())
    assert not any(parameter.requires_grad for module in quantized for parameter in module.parameters())
    method = "mimo_v2_bitsandbytes_8bit" if kind == "int8" else "mimo_v2_bitsandbytes_4bit"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert again.load_report.quantized == {"int8": "bitsandbytes llm_int8"}.get(kind, f"bitsandbytes {kind[:3]}")
    assert f"weights: {again.load_report.quantized}" in str(again.load_report)
    floats = model.load_report.parts
    assert {part: totals["parameters"] for part, totals in again.load_report.parts.items()} == {
        part: totals["parameters"] for part, totals in floats.items()
    }


def test_a_saved_folder_in_parts(saved):
    model, folder = saved("nf4 double")
    without = AutoModelForCausalLM.from_pretrained(folder, load_towers=False, load_mtp=False)
    assert set(without.load_report.not_loaded) == {"mtp", "vision", "audio"}
    assert torch.equal(logits(without), logits(model))
    backbone = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model.lm_head(backbone(ids_for(model)).last_hidden_state), logits(model))


def test_a_saved_folder_computes_in_another_dtype(saved):
    _, folder = saved("nf4")
    in_bf16 = settings("nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=in_bf16)
    assert model.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.gate_proj.compute_dtype == torch.bfloat16
    assert model.model.layers[1].mlp.experts.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


def test_dequantized_it_is_a_released_checkpoint_again(saved, tmp_path):
    _, folder = saved("nf4 double")
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    expected = logits(model)
    assert_near(expected, logits(AutoModelForCausalLM.from_pretrained(folder)), 1e-4)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "model.layers.1.mlp.experts.0.gate_proj.weight" in file.keys()  # noqa: SIM118
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in again.config.to_dict()
    assert torch.equal(logits(again), expected)


def broken(folder, target, change):
    """A copy of a saved folder whose tensors are changed."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_a_broken_folder_is_refused_by_name(saved, tmp_path):
    _, folder = saved("nf4")
    experts, linear = "model.layers.1.mlp.experts", "model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        del tensors[f"{experts}.down_proj_absmax"]
        del tensors[f"{linear}.quant_map"]
        tensors[f"{experts}.gate_up_proj"] = tensors[f"{experts}.gate_up_proj"][:, 1:].contiguous()
        tensors[f"{linear}.absmax"] = tensors[f"{linear}.absmax"].half()
        tensors["model.layers.1.surprise"] = torch.zeros(2)

    message = refused(lambda: AutoModelForCausalLM.from_pretrained(broken(folder, tmp_path / "broken", change)))
    assert "missing (2): " in message
    for name in (f"{experts}.down_proj_absmax", f"{linear}.quant_map"):
        assert name in message.partition("unknown")[0]
    assert "unknown (1): model.layers.1.surprise" in message
    assert f"{experts}.gate_up_proj ([8, 32768] U8, [8, 32767] U8)" in message
    assert f"{linear}.absmax ([1536] F32, [1536] F16)" in message


def test_a_layer_that_describes_itself_as_larger_is_refused(saved, tmp_path):
    """bitsandbytes' kernels would read beyond the weights."""
    _, folder = saved("nf4")
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"

    def change(tensors):
        text = bytes(tensors[name]).decode().replace("[384, 256]", "[3840, 256]")
        assert "3840" in text
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    message = refused(lambda: AutoModelForCausalLM.from_pretrained(broken(folder, tmp_path / "larger", change)))
    assert message.startswith("model.layers.0.mlp.up_proj.weight.quant_state: expected [(384, 256), 'nf4', 64, None]")


# Running ----------------------------------------------------------------------------------------------------------


def test_drafting_gives_the_same_tokens(omni):
    ids = token_ids(1, 12, vocab_size=2000)
    expected = omni.generate(ids, **GREEDY)
    assert torch.equal(omni.generate(ids, use_mtp=True, **GREEDY), expected)
    assert expected.shape[1] == 28


def test_left_padding_changes_nothing(omni):
    ids = token_ids(1, 12, vocab_size=2000)
    padded = torch.cat([torch.full((1, 5), 3), ids], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    got = omni.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(got[:, 5:], omni.generate(ids, **GREEDY))


def test_towers_see_and_hear_as_before(checkpoints, omni):
    """Features equal those of the plain model, and the quantized one takes them."""
    floats = plain(checkpoints["fp8_omni"])
    vision, audio = omni.config.vision_config, omni.config.audio_config
    values = vision.num_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels, grid = torch.randn(16, values), torch.tensor([[1, 4, 4]])
    codes, lengths = torch.randint(0, 16, (8, audio.audio_channels)), torch.tensor([8])
    image = omni.get_image_features(pixels, grid).pooler_output[0]
    assert torch.equal(image, floats.get_image_features(pixels, grid).pooler_output[0])
    sound = omni.get_audio_features(codes, lengths).pooler_output[0]
    assert torch.equal(sound, floats.get_audio_features(codes, lengths).pooler_output[0])
    ids = [5, *[omni.config.image_token_id] * len(image), 6, *[omni.config.audio_token_id] * len(sound), 7]
    media = {"pixel_values": pixels, "image_grid_thw": grid, "audio_codes": codes, "audio_code_lengths": lengths}
    ids = torch.tensor([ids])
    output = omni.generate(ids, **media, **GREEDY)
    assert torch.equal(omni.generate(ids, use_mtp=True, **media, **GREEDY), output)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_gradients_reach_the_inputs(checkpoints, kind):
    """Through frozen codes, as through the dequantized floats; also behind a forward without gradients."""
    model = load(checkpoints["fp8_fused"], kind)
    logits(model)
    experts = experts_of(model)["model.layers.3.mlp.experts"]
    hidden, index = torch.randn(7, 256), torch.randint(0, 8, (7, 2))
    weights = torch.rand(7, 2)
    got, expected = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    experts(got, index, weights).square().sum().backward()
    total = 0
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weights)):
        output = 0
        for expert, share in zip(chosen, shares):
            gate_up, down = experts.expert_weights(expert, torch.float32)
            gate, up = (gate_up @ expected[token]).chunk(2)
            output = output + share * (down @ (nn.functional.silu(gate) * up))
        total = total + output.square().sum()
    total.backward()
    assert_near(got.grad, expected.grad, 1e-4 * expected.grad.abs().max().item())
    embeddings = model.get_input_embeddings()(ids_for(model)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    assert embeddings.grad.abs().sum(dim=-1).gt(0).all()
    assert not any(parameter.requires_grad for parameter in experts.parameters())


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": {"": "disk"}}, "released FP8 and MXFP4 files can stay on disk without it"),
        ({"experts_implementation": "grouped_mm"}, "expected 'eager' with bitsandbytes, got 'grouped_mm'"),
        ({"quantization_config": settings(bnb_4bit_quant_storage="bfloat16")}, "expected torch.uint8"),
        ({"quantization_config": settings(bnb_4bit_quant_type="int4")}, "expected 'nf4' or 'fp4', got 'int4'"),
        ({"quantization_config": settings("int8", llm_int8_has_fp16_weight=True)}, "expected False, got True"),
        ({"quantization_config": BitsAndBytesConfig()}, "expected load_in_4bit=True or load_in_8bit=True"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_weights_are_read(checkpoints, monkeypatch, options, message):
    monkeypatch.setattr("modeling_mimo.checkpoint_mimo_v2.Checkpoint.slices", lambda self: pytest.fail("read"))
    assert message in refused(lambda: load(checkpoints["fp8_fused"], **options))


def test_another_quantization_of_a_quantized_checkpoint_is_refused(saved):
    _, folder = saved("nf4")
    for other in (settings("int8"), settings("fp4"), settings("nf4 double"), MiMoV2FP8Config(dequantize=False)):
        message = refused(
            lambda config=other: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        )
        assert "expected none or the same for a checkpoint of bitsandbytes" in message
        assert "starts from the checkpoint it was made of" in message
    same = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings("nf4"))
    assert same.is_loaded_in_4bit
    message = refused(lambda: AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm"))
    assert "expected 'eager' with bitsandbytes" in message


def test_fp8_of_a_checkpoint_without_it_is_refused(checkpoints):
    message = refused(lambda: plain(checkpoints["bf16_fused"], quantization_config=MiMoV2FP8Config()))
    assert "BitsAndBytesConfig quantizes while loading" in message


@pytest.mark.parametrize(
    "command", [["convert", "SRC", "DST"], ["plan", "SRC"], ["doctor", "SRC"]], ids=lambda c: c[0]
)
def test_commands_say_what_such_a_folder_is(saved, tmp_path, capsys, command):
    places = {"SRC": str(saved("nf4")[1]), "DST": str(tmp_path / "converted")}
    assert main([places.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mimo: error: `quantization_config`: expected a released or converted checkpoint")
    assert "\n" not in error


class RoundingConfig(QuantizationConfigMixin):
    def __init__(self, **settings):
        super().__init__(quant_method="rounding")


class RoundingQuantizer(HfQuantizer):
    """Anybody's quantizer that works while loading: what it does to weights is its business."""

    is_trainable = False

    def is_serializable(self):
        return True


def test_other_quantizers_get_floats_of_quantized_files_and_cannot_be_saved(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "rounding", RoundingQuantizer)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", RoundingConfig)
    for source in ("fp8_fused", "fp8_plain", "mxfp4"):
        model = load(checkpoints[source], quantization_config=RoundingConfig())
        assert_same_state(model, plain(checkpoints[source]))
    message = refused(lambda: model.save_pretrained(tmp_path))
    assert "got 'rounding', which could not be read again; quantize while loading" in message


# Processes --------------------------------------------------------------------------------------------------------


MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
import modeling_mimo

imported = "bitsandbytes" in sys.modules

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def load(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

small, large = sys.argv[1:]
load(small)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = load(large)
grown = resident("VmHWM") - before
layer = sum(parameter.nbytes for parameter in model.model.layers[1].parameters())
print(json.dumps({"imported": imported, "grown": grown, "footprint": model.get_memory_footprint(), "layer": layer}))
"""


@pytest.fixture(scope="module")
def measured(checkpoints, tmp_path_factory):
    """What a fresh process says of loading FP8 files in nf4: 77 MB in the end, of which a layer has 14."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("peak memory is read from /proc")
    shape = {
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "n_routed_experts": 32,
        "num_hidden_layers": 6,
        "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1, 1, 1],
        "num_nextn_predict_layers": 0,
    }
    folder = tmp_path_factory.mktemp("large") / "large"
    write_random_checkpoint(folder, "tiny", dtype="fp8", overrides=shape, with_tokenizer=False)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, checkpoints["fp8_fused"], folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_loading_holds_the_final_size_and_at_most_one_layer(measured):
    # modules, names and the allocator take 10 MB; measured together: 100 MB of 107
    assert measured["footprint"] < measured["grown"] <= measured["footprint"] + measured["layer"] + 16e6


def test_importing_this_package_leaves_bitsandbytes_out(measured):
    assert not measured["imported"]
