"""Adapters through Transformers' own methods, on the line of Transformers and the PEFT that are installed."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_scene import load, write_checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from modeling_mimo import MiMoV2ForCausalLM, MiMoV2FP8Config
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.training import load_adapter, lora_config


pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("attention", "mlp", "experts", "mtp")
IDS = torch.arange(1, 25).view(2, 12) * 37 % 2000
WEIGHTS = "adapter_model.safetensors"
KEPT = MiMoV2FP8Config(dequantize=False)


def suits() -> bool:
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


# Transformers 5.24 wants a PEFT that is newer than the newest for all methods but `load_adapter`
SUITS = suits()
needs_suitable_peft = pytest.mark.skipif(not SUITS, reason=f"Transformers asks for peft >= {MIN_PEFT_VERSION}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("adapters") / "omni")


def write_adapter(model, path, config):
    """An adapter of random values, whose base is what `model` was loaded from."""
    config.init_lora_weights = False
    get_peft_model(model, config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    torch.manual_seed(0)
    model = load(folder)
    return write_adapter(model, tmp_path_factory.mktemp("adapter"), lora_config(model, PARTS, r=4, lora_alpha=8))


@pytest.fixture
def edited(adapter, tmp_path):
    """A copy of the adapter whose tensors a function may change."""

    def edit(change):
        shutil.copytree(adapter, tmp_path / "edited")
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, tmp_path / "edited" / WEIGHTS)
        return tmp_path / "edited"

    return edit


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits.float()


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def adapter_parameters(model):
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dequantize", [True, False], ids=["dequantized", "fp8"])
def test_load_adapter_gives_the_logits_of_a_peft_model(folder, adapter, dtype, dequantize):
    """Of every storage, the experts' part included, without rounding the adapter to the dtype of the base."""
    model = load(folder, dtype, dequantize)
    without = logits(model)
    model.load_adapter(adapter)
    assert torch.equal(logits(model), logits(load_adapter(load(folder, dtype, dequantize), adapter)))
    assert relative(logits(model), without) > 0.1
    parameters = adapter_parameters(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in parameters.values())
    for name in ("self_attn.qkv_proj", "mlp.experts.base_layer", "mlp.experts", "mlp.down_proj", "mtp.layers"):
        assert any(name in key for key in parameters)
    if dequantize and dtype == torch.float32:
        assert relative(logits(model), logits(PeftModel.from_pretrained(load(folder), adapter))) < 1e-5


@pytest.mark.parametrize("part", PARTS)
def test_every_part_alone_is_loaded(folder, tmp_path, part):
    model = load(folder)
    write_adapter(model, tmp_path, lora_config(model, (part,)))
    model = load(folder)
    model.load_adapter(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    loaded = {name.replace(".default", ""): tensor for name, tensor in adapter_parameters(model).items()}
    assert loaded.keys() == {name.removeprefix("base_model.model.") for name in stored}
    assert all(torch.equal(loaded[name.removeprefix("base_model.model.")], stored[name]) for name in stored)


@pytest.mark.parametrize("storage", ["mxfp4", "nf4"])
def test_coded_weights_take_adapters(checkpoints, tmp_path, storage):
    settings = {"mxfp4": MiMoV2FP8Config(dequantize=False), "nf4": BitsAndBytesConfig(load_in_4bit=True)}
    source = checkpoints["mxfp4" if storage == "mxfp4" else "bf16_fused"]

    def base(path=source):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=settings[storage])

    model = base()
    write_adapter(model, tmp_path, lora_config(model, ("attention", "experts")))
    expected = logits(load_adapter(base(), tmp_path))
    assert torch.equal(logits(base(tmp_path)), expected)
    model = base()
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "from_folder",
    [
        lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        lambda path: AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32),
        lambda path: MiMoV2ForCausalLM.from_pretrained(path, dtype=torch.float32),
        lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="auto"),
        lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=KEPT),
        lambda path: MiMoV2ForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=KEPT),
        lambda path: pipeline("text-generation", model=str(path), dtype=torch.float32).model,
        lambda path: AutoPeftModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, import_allowlist=["modeling_mimo.modeling_mimo_v2"]
        ),
    ],
    ids=["causal", "image-text", "class", "device_map", "fp8", "class-fp8", "pipeline", "peft"],
)
def test_the_folder_of_an_adapter_loads_its_base_too(folder, adapter, from_folder):
    model = from_folder(adapter)
    assert relative(logits(model), logits(load_adapter(load(folder), adapter))) < 1e-5


def test_adapters_side_by_side(folder, adapter, tmp_path):
    model = load(folder)
    write_adapter(model, tmp_path, lora_config(model, ("attention",), r=2))
    model = load(folder)
    model.load_adapter(adapter)
    info = model.load_adapter(tmp_path, adapter_name="second")
    # neither the base's nor those of the first
    assert not info.missing_keys
    # the one that came last is active
    assert torch.equal(logits(model), logits(load_adapter(load(folder), tmp_path)))
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(tmp_path, adapter_name="second")
    with pytest.raises(ValueError, match=r"^`model`: expected one without adapters, got one with"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"^`hotswap`: expected False, got True"):
        model.load_adapter(tmp_path, adapter_name="second", hotswap=True)


def test_an_adapter_may_come_as_tensors_and_may_learn(folder, adapter):
    model = load(folder)
    config, tensors = PeftConfig.from_pretrained(adapter), load_file(adapter / WEIGHTS)
    model.load_adapter(peft_config=config, adapter_state_dict=tensors, is_trainable=True)
    assert torch.equal(logits(model), logits(load_adapter(load(folder), adapter)))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == set(adapter_parameters(model))


def test_embeddings_and_whole_modules_come_along(folder, tmp_path):
    targets = {"target_modules": ["qkv_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    with pytest.warns(UserWarning, match="embedding layers found"):
        write_adapter(load(folder), tmp_path, LoraConfig(**targets))
    model = load(folder)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), logits(load_adapter(load(folder), tmp_path)))


def test_hub_arguments_reach_config_and_weights(folder, adapter):
    model = load(folder)
    where = {"adapter_kwargs": {"subfolder": adapter.name}, "local_files_only": True}
    model.load_adapter(str(adapter.parent), **where)
    assert torch.equal(logits(model), logits(load_adapter(load(folder), adapter)))


def drop(tensors):
    del tensors["base_model.model.model.layers.1.mlp.experts.lora_A.weight"]


def add(tensors):
    tensors["base_model.model.model.layers.1.mlp.router.lora_A.weight"] = torch.zeros(2, 2)


def add_another_name(tensors):
    tensors["base_model.model.model.layers.1.self_attn.qkv_proj.lora_C.weight"] = torch.zeros(2, 2)


def reshape(tensors):
    tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"] = torch.zeros(4, 7)


WRONG = [
    (drop, r"missing \(1\): model.layers.1.mlp.experts.lora_A.weight$"),
    (add, r"unknown \(1\): model.layers.1.mlp.router.lora_A.weight$"),
    (add_another_name, r"unknown \(1\): model.layers.1.self_attn.qkv_proj.lora_C.weight$"),
    (
        reshape,
        r"mis-shaped \(expected, got\) \(1\): model.layers.0.self_attn.qkv_proj.lora_A.weight \(\[4, 256\], \[4",
    ),
]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:Some weights of PeftModel")
@pytest.mark.parametrize("how", ["method", "from_pretrained", "training"])
@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_file_that_does_not_fit_is_an_error_that_lists_it(folder, adapter, edited, how, change, message):
    path, model = edited(change), load(folder)
    calls = {
        "method": lambda path: model.load_adapter(path),
        "from_pretrained": lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        "training": lambda path: load_adapter(model, path),
    }
    without = logits(model)
    with pytest.raises(ValueError, match=f"^the adapter does not fit the model; {message}"):
        calls[how](path)
    # nothing of it stays, and the right one can be loaded under the same name
    assert torch.equal(logits(model), without)
    if how == "method":
        model.load_adapter(adapter)
        assert torch.equal(logits(model), logits(load_adapter(load(folder), adapter)))


def test_an_adapter_of_another_base_is_an_error(adapter, tmp_path):
    other = write_random_checkpoint(tmp_path / "other", "tiny", with_tokenizer=False, dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(other)
    with pytest.raises(ValueError, match=r"^the adapter does not fit the model; missing \(\d+\): model.layers.3"):
        model.load_adapter(adapter)


def test_an_adapter_in_a_pickle_is_not_read(folder, adapter, edited):
    path = edited(lambda tensors: None)
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS}: expected a safetensors file, got nothing"):
        load(folder).load_adapter(path)
    with pytest.raises(OSError, match=f"file named {WEIGHTS}"):
        load_adapter(load(folder), path)


def test_a_checkpoint_without_a_tensor_is_refused_though_an_adapter_lies_beside_it(folder, adapter, tmp_path):
    """What counts is which load it is, not which files are in the folder."""
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(adapter / name, whole / name)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load_adapter(load(folder), adapter)))
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.norm.weight")
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(whole / file)
    del tensors["model.norm.weight"]
    save_file(tensors, whole / file)
    with pytest.raises(ValueError, match=r"missing \(1\): model.norm.weight"):
        AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)


@pytest.mark.parametrize("name", [None, ""])
def test_an_adapter_that_names_no_base_says_what_to_call(folder, edited, name):
    path = edited(lambda tensors: None)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    with pytest.raises(
        ValueError, match=r"expected `base_model_name_or_path` in an adapter's folder, got .*load_adapter"
    ):
        MiMoV2ForCausalLM.from_pretrained(path)
    load(folder).load_adapter(path)


def attention_on_disk(folder):
    backbone = load(folder).model
    names = [name for name, _ in load(folder).named_children() if name != "model"]
    names += [f"model.{name}" for name, _ in backbone.named_children() if name != "layers"]
    names += [f"model.layers.{name}" for name, _ in backbone.layers.named_modules() if name.count(".") == 1]
    device_map = {name: "disk" if name.endswith("self_attn") else "cpu" for name in names}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)


def test_adapters_beside_weights_on_disk(folder, tmp_path):
    config = lora_config(load(folder), ("attention",))
    write_adapter(load(folder), tmp_path, config)
    expected = logits(load_adapter(load(folder), tmp_path))
    model = attention_on_disk(folder)
    with pytest.raises(
        ValueError, match=r"^`device_map`: expected the weights of a new adapter's layers in memory, got"
    ):
        lora_config(model, ("attention",))
    with pytest.raises(ValueError, match=r"^`device_map`: expected weights in memory, .* model.load_adapter works"):
        load_adapter(model, tmp_path)
    if SUITS:
        with pytest.raises(
            ValueError, match=r"^`device_map`: expected the weights of a new adapter's layers in memory"
        ):
            model.add_adapter(LoraConfig(target_modules=["qkv_proj"]))
    assert lora_config(model, ("mlp",)).target_modules
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model), expected)


# method of Transformers -> a call, and what its error names where PEFT is too old for Transformers
GATED = {
    "add_adapter": (
        lambda model: model.add_adapter(LoraConfig(target_modules=["o_proj"]), "new"),
        "peft.get_peft_model",
    ),
    "set_adapter": (lambda model: model.set_adapter("default"), "`set_adapter` of the PeftModel"),
    "disable_adapters": (lambda model: model.disable_adapters(), "`disable_adapter` of the PeftModel"),
    "enable_adapters": (lambda model: model.enable_adapters(), "`base_model.enable_adapter_layers` of the PeftModel"),
    "active_adapters": (lambda model: model.active_adapters(), "`active_adapters` of the PeftModel"),
    "get_adapter_state_dict": (lambda model: model.get_adapter_state_dict(), "peft.get_peft_model_state_dict"),
    "delete_adapter": (lambda model: model.delete_adapter("default"), "`delete_adapter` of the PeftModel"),
    "save_pretrained": (lambda model: model.save_pretrained("unused"), "`save_pretrained` of the PeftModel"),
}


@pytest.mark.skipif(SUITS, reason="Transformers takes the PEFT that is installed")
@pytest.mark.parametrize("name", GATED)
def test_what_transformers_refuses_says_in_one_line_what_works(folder, adapter, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load(folder)
    model.load_adapter(adapter)
    call, instead = GATED[name]
    with pytest.raises(ValueError, match=f"^`{name}`: expected peft >= ") as error:
        call(model)
    message = str(error.value)
    assert instead in message
    assert "\n" not in message
    assert all(part in message for part in (MIN_PEFT_VERSION, transformers.__version__, f"got {peft.__version__}"))
    assert not list(tmp_path.iterdir())


def test_what_the_messages_name_works(folder, adapter, tmp_path):
    """On any line: a `PeftModel` and PEFT's own functions."""
    base = logits(load(folder))
    model = load_adapter(load(folder), adapter)
    expected = logits(model)
    assert list(model.active_adapters) == ["default"]
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(load(folder), tmp_path)), expected)
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    injected = load(folder)
    injected.load_adapter(adapter)
    assert len(peft.get_peft_model_state_dict(injected)) == len(load_file(adapter / WEIGHTS))


@needs_suitable_peft
def test_the_methods_of_transformers_work(folder, adapter, tmp_path):
    model = load(folder)
    without = logits(model)
    model.load_adapter(adapter)
    expected = logits(model)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert torch.equal(logits(model), without)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    assert len(model.get_adapter_state_dict()) == len(load_file(adapter / WEIGHTS))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), expected)
    model.add_adapter(lora_config(load(folder)), "second")
    assert torch.equal(logits(model), without)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter(["default", "second"])
    assert torch.equal(logits(model), without)


@needs_suitable_peft
@pytest.mark.parametrize("dequantize", [True, False], ids=["bf16", "fp8"])
def test_an_added_adapter_learns_and_is_saved(folder, tmp_path, dequantize):
    """With a plain `LoraConfig`: the layers that work on any storage come with the method."""
    model = load(folder, torch.bfloat16, dequantize)
    targets = {"target_modules": ["qkv_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    model.add_adapter(LoraConfig(r=4, **targets))
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in learns} == {torch.float32}
    optimizer = torch.optim.Adam(learns, lr=5e-3)
    losses = []
    for _ in range(3):
        output = model.train()(IDS, labels=IDS)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_adapter(load(folder, torch.bfloat16, dequantize), tmp_path)), logits(model))


@needs_suitable_peft
def test_a_backbone_saves_and_loads_its_adapter(folder, tmp_path):
    def backbone():
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    model = backbone()
    model.add_adapter(LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = backbone()
    again.load_adapter(tmp_path)
    assert torch.equal(again(IDS).last_hidden_state, model.eval()(IDS).last_hidden_state)
    with pytest.raises(ValueError, match=r"^the adapter does not fit the model; missing \(\d+\): model.layers.0"):
        load(folder).load_adapter(tmp_path)


def test_prompt_learning_says_what_to_call(folder, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(load(folder), config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^`peft_type`: expected adapters of layers, got PROMPT_TUNING; .*load_adapter"
    ):
        load(folder).load_adapter(tmp_path)
    load_adapter(load(folder), tmp_path)


@pytest.mark.parametrize(
    ("targets", "lost"),
    [
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        (["q_proj", "o_proj"], "q_proj"),
        (["qkv_proj"], None),
        (["q_proj", "qkv_proj"], None),
        ("all-linear", None),
        (r"audio_encoder\..*\.q_proj", None),
    ],
    ids=str,
)
def test_targets_that_miss_the_fused_attention_are_warned_of(folder, targets, lost, caplog):
    """`["q_proj", "v_proj"]` of most tutorials is in the audio encoder alone."""
    get_peft_model(load(folder), LoraConfig(target_modules=targets))
    messages = [record.getMessage() for record in caplog.records if "target_modules" in record.getMessage()]
    if lost is None:
        assert not messages
    else:
        assert len(messages) == 1
        assert f"expected qkv_proj for the language model's attention, got {lost}, which" in messages[0]
        assert "modeling_mimo.training.lora_config" in messages[0]


def test_split_projections_of_a_split_checkpoint_are_right(checkpoints, caplog):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["fp8_split"])
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert not [record for record in caplog.records if "target_modules" in record.getMessage()]
