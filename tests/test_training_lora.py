"""LoRA on every part and every storage of the weights; adapters saved, loaded, merged and converted."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from training_scene import load, write_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert
from modeling_mimo.training import LORA_PARTS, load_adapter, lora_config, lora_targets


pytestmark = pytest.mark.usefixtures("one_thread")

TEXT_PARTS = ("attention", "experts", "mlp", "mtp")
IDS = torch.arange(1, 25).view(2, 12) * 37 % 2000
# relative error of logits after weights became FP8 once more: half of its last step is 1/28, random routers change
# their choice at a breath (tests/test_convert.py)
FP8_LOGITS = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("lora") / "omni")


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def adapted(model, parts=TEXT_PARTS, **settings):
    torch.manual_seed(0)
    return get_peft_model(model, lora_config(model, parts, **{"r": 4, "lora_alpha": 8, **settings}))


def stored(folder, checkpoints, storage):
    """A model in bfloat16 whose weights are stored as `storage`."""
    settings = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(storage, MiMoV2FP8Config(dequantize=storage == "bf16"))
    source = checkpoints["mxfp4"] if storage == "mxfp4" else folder
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)


def trained(model, steps=3):
    """`model` after some steps, and its losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        output = model.train()(IDS, labels=IDS, mtp_loss_weight=0.1)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return model.eval(), losses


def test_every_part_has_targets_and_only_those(folder):
    model = load(folder)
    inside = {
        "attention": "model.layers.",
        "experts": "model.layers.",
        "mlp": "model.layers.0.mlp.",
        "vision": "visual.blocks.",
        "audio": "audio_encoder.input_local_transformer.",
        "projectors": ("visual.merger.", "audio_encoder.projection."),
        "mtp": "model.mtp.",
    }
    found = {}
    for part in LORA_PARTS:
        wrapped = adapted(load(folder) if part == LORA_PARTS[0] else model, (part,))
        names = [name.removeprefix("base_model.model.") for name, p in wrapped.named_parameters() if p.requires_grad]
        found[part] = {name.partition(".lora_")[0].replace(".base_layer", "") for name in names}
        assert all(name.startswith(inside[part]) for name in found[part])
        model = wrapped.unload()
    assert {name.rpartition(".")[2] for name in found["attention"]} == {"qkv_proj", "o_proj"}
    # gate_up_proj and down_proj are two wrappers of one module
    assert found["experts"] == {f"model.layers.{layer}.mlp.experts" for layer in (1, 2)}
    assert len(found["projectors"]) == 4
    # every linear layer but the head belongs to one part
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert set().union(*found.values()) == linears | found["experts"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), r"^`parts`: expected some of \['attention', .*got \(\)"),
        ("attention", "^`parts`: expected some of .*got 'attention'"),
        (("router",), "^`parts`: expected some of"),
        (("vision",), r"^`parts`: expected some of \['attention', 'experts', 'mlp', 'mtp'\], got 'vision'"),
    ],
    ids=str,
)
def test_parts_that_are_not_there_are_refused(checkpoints, parts, message):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["bf16_fused"])
    with pytest.raises(ValueError, match=message):
        lora_targets(model, parts)


def test_adapters_of_experts_are_those_of_plain_peft(folder, tmp_path):
    """Same files, same logits, same gradients, with the experts' own layer and with PEFT's."""
    own = adapted(load(folder), ("experts",), init_lora_weights=False)
    own.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(folder), tmp_path, is_trainable=True)
    layers = {type(module).__module__ for module in plain.modules() if type(module).__name__ == "ParamWrapper"}
    assert layers == {"peft.tuners.lora.layer"}
    assert relative(logits(own), logits(load(folder))) > 0.01
    assert relative(logits(own), logits(plain)) < 1e-5
    for model in (own, plain):
        model.train()(IDS, labels=IDS).loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, gradients[name].grad) < 1e-4


def test_base_weights_that_stay_fp8_give_the_gradients_of_dequantized_ones(folder):
    models = [adapted(load(folder, dequantize=dequantize), init_lora_weights=False) for dequantize in (True, False)]
    for model in models:
        model.train()(IDS, labels=IDS, mtp_loss_weight=0.1).loss.backward()
    whole, resident = (dict(model.named_parameters()) for model in models)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in resident.values())
    checked = 0
    for name, parameter in resident.items():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert relative(parameter.grad, whole[name].grad) < 1e-5
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("storage", ["bf16", "fp8", "mxfp4", "nf4", "int8"])
def test_a_few_steps_lower_the_loss_and_leave_the_base(folder, checkpoints, storage, checkpointing):
    model = stored(folder, checkpoints, storage)
    before = logits(model)
    # as TRL and PEFT's examples do; without it a frozen embedding leaves reentrant checkpointing no gradient
    model.enable_input_require_grads()
    model = adapted(model)
    assert torch.equal(logits(model), before)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": True})
    model, losses = trained(model)
    assert losses[-1] < losses[0] - 0.2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


def test_an_adapter_of_an_fp8_base_loads_merges_and_becomes_a_released_checkpoint(folder, tmp_path):
    model, _ = trained(adapted(load(folder, torch.bfloat16, dequantize=False)))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    again = load_adapter(load(folder, torch.bfloat16, dequantize=False), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    with pytest.raises(
        ValueError, match=r"^merge: expected floating-point weights, got torch.float8_e4m3fn; .*MiMoV2FP8"
    ):
        again.merge_and_unload()

    whole = load_adapter(load(folder, torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(whole), expected)
    merged = whole.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    # rounding of the sums to bfloat16, and routers that change their choice for it
    assert relative(logits(merged), expected) < 0.2
    merged.save_pretrained(tmp_path / "merged")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(logits(saved), logits(merged))

    convert(tmp_path / "merged", tmp_path / "released", to="xiaomi", dtype="fp8", progress=False)
    released = AutoModelForCausalLM.from_pretrained(tmp_path / "released", dtype=torch.bfloat16)
    assert released.load_report.fp8
    assert relative(logits(released), logits(merged)) < FP8_LOGITS
    assert relative(logits(released), logits(merged)) < relative(logits(load(folder, torch.bfloat16)), logits(merged))


def test_merged_floats_are_the_adapted_model(folder):
    model, _ = trained(adapted(load(folder), LORA_PARTS))
    expected = logits(model)
    assert relative(logits(model.merge_and_unload()), expected) < 1e-5


def test_the_adapters_of_quantized_experts_merge_into_none(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = adapted(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), ("experts",))
    with pytest.raises(ValueError, match=r"^merge: expected floating-point weights, got torch.uint8"):
        model.merge_and_unload()


@pytest.mark.parametrize("storage", ["fp8", "mxfp4", "nf4", "int8"])
def test_plain_peft_on_coded_experts_is_refused(folder, checkpoints, storage):
    model = stored(folder, checkpoints, storage)
    with pytest.raises(ValueError, match=r"^`target_parameters`: expected none .* modeling_mimo.training.lora_config"):
        get_peft_model(model, LoraConfig(**lora_targets(model, ("experts",))))


def test_adapters_and_their_config_need_nothing_of_this_package_to_load(folder, tmp_path):
    adapted(load(folder), ("attention", "experts")).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.target_parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config._custom_modules is None
