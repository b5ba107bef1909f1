"""Files to model and back, bit for bit; every broken checkpoint is refused by the name of what is broken."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from audio_reference import audio_features
from mtp_reference import draft_logits
from reference import dequantize, reference_logits, reference_weights, split_qkv
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import LAYOUTS, SMALL, assert_near, released_state, tiny_model, token_ids, trunk_states
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

import modeling_mimo
from modeling_mimo import MiMoV2Config, MiMoV2ForCausalLM, MiMoV2FP8Config, MiMoV2Model
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.quantization_mimo_v2 import MiMoV2MXFP4Experts
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(modeling_mimo.__file__).parent / "data"
INDEX = "model.safetensors.index.json"
AUDIO_PREFIXES = ("speech_embeddings.", "audio_encoder.")
LAYOUT_OF = {
    "fp8_fused": "chunked",
    "bf16_fused": "chunked",
    "fp8_split": "split",
    "fp8_plain": "plain",
    "fp8_omni": "chunked",
    "mxfp4": "chunked",
}
NAMES = list(LAYOUT_OF)
# one of them has MXFP4 experts
FP8_NAMES = [name for name in NAMES if not name.startswith("bf16")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUTER = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")


def read_tensors(folder):
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def read_json(folder, name="config.json"):
    return json.loads((Path(folder) / name).read_text())


def write_json(folder, value, name="config.json"):
    (Path(folder) / name).write_text(json.dumps(value))


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def resident(folder, **options):
    return load(folder, quantization_config=MiMoV2FP8Config(dequantize=False), **options)


def weights_by_name(folder, layout):
    """The float32 values that the files hold, by the naive formula, under the released names."""
    config = read_json(folder)
    weights = reference_weights(read_tensors(folder), config, qkv_layout="plain" if layout == "plain" else "chunked")
    # the page adds parts of a fused projection, of which there are some in the text model alone
    derived = () if layout == "split" else (".q_proj.weight", ".k_proj.weight", ".v_proj.weight")
    return {
        name: weight for name, weight in weights.items() if not (name.startswith("model.") and name.endswith(derived))
    }


def parameter_dtype(name, key, dtype=torch.bfloat16):
    """Dtype of parameter `key` in a model of `dtype`; the router of V2.6 has the model's, its bias has not."""
    kept = ROUTER[1:] if name == "mxfp4" else ROUTER
    return torch.float32 if key.endswith(kept) else dtype


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(as_bytes(left), as_bytes(right))


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []


def ids_for(model):
    return token_ids(2, 30, vocab_size=model.config.vocab_size)


@torch.no_grad()
def logits(model):
    return model(ids_for(model)).logits


@torch.no_grad()
def draft_states(model):
    """[heads, B, S, hidden] of all MTP heads for states that no trunk has made."""
    embeddings, hidden = torch.randn(2, 2, 30, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    embeddings, hidden = embeddings.to(model.dtype), hidden.to(model.dtype)
    rotary = model.model.rotary_emb(hidden, torch.arange(30)[None], "sliding_attention")
    return torch.stack([head(embeddings, hidden, position_embeddings=rotary) for head in model.model.mtp.layers])


# Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_the_reference_value_rounded_once(checkpoints, name):
    expected = weights_by_name(checkpoints[name], LAYOUT_OF[name])
    got = released_state(load(checkpoints[name]))
    assert got.keys() == expected.keys()
    for key, tensor in got.items():
        assert same_bits(tensor, expected[key].to(parameter_dtype(name, key))), key


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_loaded_model_equal_the_naive_page(checkpoints, name):
    # a product that V2.6 rounds to bfloat16 is not near the page's
    router = {"moe_router_dtype": "float32"}
    config = read_json(checkpoints[name]) | router
    weights = reference_weights(
        read_tensors(checkpoints[name]), config, qkv_layout="plain" if LAYOUT_OF[name] == "plain" else "chunked"
    )
    model = load(checkpoints[name], dtype=torch.float32, **router)
    assert_near(logits(model), reference_logits(weights, config, ids_for(model)))


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
@pytest.mark.parametrize("name", ["fp8_fused", "fp8_split"])
def test_every_auto_class_gives_the_same_model(checkpoints, name, auto_class):
    model = auto_class.from_pretrained(checkpoints[name])
    assert type(model) is MiMoV2ForCausalLM
    assert_same_state(model, load(checkpoints[name]))


def test_the_base_model_loads_alone(checkpoints):
    base, whole = AutoModel.from_pretrained(checkpoints["fp8_fused"]), load(checkpoints["fp8_fused"])
    assert type(base) is MiMoV2Model
    assert_same_state(base, whole.model)


@pytest.mark.parametrize("dtype", ["auto", *DTYPES], ids=str)
@pytest.mark.parametrize("name", ["fp8_fused", "bf16_fused", "mxfp4"])
def test_one_dtype_except_the_router(checkpoints, name, dtype):
    model = load(checkpoints[name], dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert model.dtype == model.config.dtype == expected
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == parameter_dtype(name, key, expected), key
    values = weights_by_name(checkpoints[name], LAYOUT_OF[name])
    for key, tensor in released_state(model).items():
        assert torch.equal(tensor, values[key].to(tensor.dtype)), key
    for rotary in (model.model.rotary_emb.full_attention_inv_freq, model.model.rotary_emb.sliding_attention_inv_freq):
        assert rotary.dtype == torch.float32


def test_a_bfloat16_router_stays_bfloat16(tmp_path):
    folder = write_random_checkpoint(
        tmp_path / "v2_6", overrides={**SHORT, "moe_router_dtype": "bfloat16"}, with_tokenizer=False
    )
    for path in folder.glob("*.safetensors"):
        tensors = read_file(path)
        save_file({n: t.bfloat16() if n.endswith("mlp.gate.weight") else t for n, t in tensors.items()}, path)
    state = load(folder).state_dict()
    assert state["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_detected_and_reported(checkpoints, name):
    report = load(checkpoints[name]).load_report
    assert report.layout == LAYOUT_OF[name]
    assert report.fp8 == (name in FP8_NAMES)
    assert report.mxfp4 == (name == "mxfp4")
    # 8 layers and 3 heads
    source = {"chunked": "scale grid of 11 layers", "plain": "scale grid of 11 layers", "split": "separate q/k/v"}
    # bf16 rows look the same either way
    expected = source[report.layout] if report.fp8 else "released rule"
    assert report.layout_source.startswith(expected)
    assert report.not_loaded == {}
    text = str(report)
    assert f"layout: {report.layout}" in text
    assert "mtp: " in text
    assert "not loaded" not in text


def test_plain_bf16_files_need_to_be_told(tmp_path):
    folder = write_random_checkpoint(
        tmp_path / "plain", dtype="bf16", layout="plain", overrides=SHORT, with_tokenizer=False
    )
    config = read_json(folder)
    weights = reference_weights(read_tensors(folder), config, qkv_layout="plain")
    model = load(folder, fused_qkv_layout="plain", dtype=torch.float32)
    assert (model.load_report.layout, model.load_report.layout_source) == ("plain", "config.fused_qkv_layout")
    expected = reference_logits(weights, config, ids_for(model))
    assert_near(logits(model), expected)
    # without the word the rows are read in the released order, which is another model
    assert (logits(load(folder, dtype=torch.float32)) - expected).abs().max() > 0.1
    # the saved copy remembers
    model.save_pretrained(tmp_path / "saved")
    assert_near(logits(load(tmp_path / "saved")), expected)


def test_an_override_that_the_scale_grid_contradicts_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"`fused_qkv_layout`: expected 'chunked'.*got 'plain'"):
        load(checkpoints["fp8_fused"], fused_qkv_layout="plain")


@pytest.mark.parametrize("name", NAMES)
def test_loading_info_is_empty(checkpoints, name):
    _, info = load(checkpoints[name], output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}


def test_the_checkpoint_has_the_traps_of_the_released_one(checkpoints):
    weight_map = read_json(checkpoints["fp8_fused"], INDEX)["weight_map"]
    apart = [name for name, file in weight_map.items() if weight_map.get(f"{name}_scale_inv", file) != file]
    assert apart
    for path in checkpoints["fp8_fused"].glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() is None


@pytest.mark.parametrize(
    "option", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}], ids=str
)
def test_device_maps(checkpoints, option):
    assert_same_state(load(checkpoints["fp8_fused"], **option), load(checkpoints["fp8_fused"]))


def test_layers_offloaded_to_disk(checkpoints, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.mtp.layers.0": "cpu", "model.mtp.layers.1": "disk", "model.mtp.layers.2": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index in (2, 5) else "cpu" for index in range(8)}
    model = load(checkpoints["fp8_fused"], device_map=device_map, offload_folder=tmp_path)
    assert model.model.layers[2].self_attn.qkv_proj.weight.device.type == "meta"
    assert model.model.mtp.layers[1].eh_proj.weight.device.type == "meta"
    whole = load(checkpoints["fp8_fused"])
    assert torch.equal(logits(model), logits(whole))
    assert torch.equal(draft_states(model), draft_states(whole))


# FP8 kept in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
@pytest.mark.parametrize("name", FP8_NAMES)
def test_resident_equals_dequantized(checkpoints, name, dtype):
    model = resident(checkpoints[name], dtype=dtype)
    dequantized = load(checkpoints[name], dtype=dtype)
    assert torch.equal(logits(model), logits(dequantized))
    assert torch.equal(draft_states(model), draft_states(dequantized))
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())


@pytest.mark.parametrize("name", FP8_NAMES)
def test_resident_takes_the_memory_of_its_files(checkpoints, name):
    model = resident(checkpoints[name])
    report = model.load_report
    loaded = sum(totals["bytes"] for totals in report.parts.values())
    assert loaded <= model.get_memory_footprint() <= 1.1 * loaded
    assert load(checkpoints[name]).get_memory_footprint() > 1.3 * loaded


@pytest.mark.parametrize("name", FP8_NAMES)
def test_resident_saves_what_the_files_hold(checkpoints, name, tmp_path):
    model = resident(checkpoints[name])
    model.save_pretrained(tmp_path)
    before, after = read_tensors(checkpoints[name]), read_tensors(tmp_path)
    assert after.keys() == before.keys()
    assert [key for key in after if not same_bits(before[key], after[key])] == []
    assert read_json(tmp_path)["quantization_config"] == read_json(checkpoints[name])["quantization_config"]
    assert read_json(tmp_path)["quantization_config"]["quant_method"] == "fp8"
    again = resident(tmp_path)
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    # and the copy can be dequantized like a release
    assert_same_state(load(tmp_path), load(checkpoints[name]))


@pytest.mark.parametrize("name", FP8_NAMES)
def test_modules_for_hopper_kernels_are_filled_and_saved(checkpoints, name, tmp_path, monkeypatch):
    # the kernels need a GPU; which modules they get, and with what in them, does not
    monkeypatch.setattr("modeling_mimo.quantization_mimo_v2.has_fp8_kernels", lambda: True)
    model = load(checkpoints[name])
    layer = model.model.layers[1]
    # Transformers has no kernels for MXFP4 as it is stored here
    assert type(layer.mlp.experts) is (MiMoV2MXFP4Experts if name == "mxfp4" else FP8Experts)
    head = model.model.mtp.layers[2]
    assert [type(part) for part in (head.mlp.down_proj, head.eh_proj, head.self_attn.o_proj)] == [
        FP8Linear,
        torch.nn.Linear,
        torch.nn.Linear,
    ]
    projections = [
        child
        for attention in (layer.self_attn, head.self_attn)
        for child in attention.children()
        if isinstance(child, FP8Linear)
    ]
    assert len(projections) == (6 if name == "fp8_split" else 2)
    for projection in projections:
        rows, columns = projection.weight.shape
        assert projection.weight_scale_inv.shape == (-(-rows // 128), -(-columns // 128))
    if name == "fp8_fused":
        # 2 chunks of 176 rows in 2 blocks each: a regular grid, and the weights it scales
        assert projections[0].weight.shape[0] == 2 * 256
        fused = projections[0].weight.float() * projections[0].weight_scale_inv.repeat_interleave(
            128, 0
        ).repeat_interleave(128, 1)
        expected = load(checkpoints[name], quantization_config=MiMoV2FP8Config(dequantize=True), dtype=torch.float32)
        chunks = expected.model.layers[1].self_attn.qkv_proj.weight.unflatten(0, (2, -1))
        assert torch.equal(fused.unflatten(0, (2, -1))[:, : chunks.shape[1]], chunks)
    model.save_pretrained(tmp_path)
    before, after = read_tensors(checkpoints[name]), read_tensors(tmp_path)
    assert after.keys() == before.keys()
    assert [key for key in after if not same_bits(before[key], after[key])] == []


def test_resident_generates_the_same_tokens(checkpoints):
    prompt = token_ids(2, 9)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = [
        model.generate(prompt, **options)
        for model in (resident(checkpoints["fp8_fused"]), load(checkpoints["fp8_fused"]))
    ]
    assert torch.equal(*tokens)


# Saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_bit_for_bit_under_the_released_names(checkpoints, name, dtype, tmp_path):
    model = load(checkpoints[name], dtype=dtype)
    model.save_pretrained(tmp_path)
    released = read_tensors(checkpoints[name]).keys()
    assert read_tensors(tmp_path).keys() == {key for key in released if not key.endswith(("_scale_inv", "_scale"))}
    again, info = load(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    written, original = read_json(tmp_path), read_json(checkpoints[name])
    assert "quantization_config" not in written
    kept = original.keys() - {"quantization_config", "transformers_version", "dtype", "torch_dtype"}
    assert {key for key in kept if written[key] != original[key]} <= {"architectures", "auto_map"}


def test_many_small_shards(checkpoints, tmp_path):
    model = load(checkpoints["fp8_fused"])
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_state(load(tmp_path), model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_made_from_a_config_is_saved_in_the_released_form(layout, tmp_path):
    model = tiny_model(**SMALL, **LAYOUTS[layout])
    model.save_pretrained(tmp_path)
    got, expected = read_tensors(tmp_path), released_state(model)
    assert got.keys() == expected.keys() == released_tensors(model.config).keys()
    assert [key for key in got if not same_bits(got[key], expected[key].contiguous())] == []
    assert_same_state(load(tmp_path), model)


def test_tied_embeddings_are_saved_once(tmp_path):
    model = tiny_model(**SMALL, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read_tensors(tmp_path)
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_state(again, model)


# Broken checkpoints -----------------------------------------------------------------------------------------------


SHORT = {
    "num_hidden_layers": 2,
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "hidden_size": 128,
    "n_routed_experts": 4,
    "num_nextn_predict_layers": 1,
    "vocab_size": 320,
}
QKV = "model.layers.1.self_attn.qkv_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("short") / "short", overrides=SHORT, with_tokenizer=False)


@pytest.fixture
def broken(short, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(short, tmp_path / "broken"))


def read_file(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def file_of(folder, name):
    return folder / read_json(folder, INDEX)["weight_map"][name]


def rewrite(folder, name, change):
    """Replaces tensor `name` by `change(tensor)`; None drops it from file and index."""
    path, index = file_of(folder, name), read_json(folder, INDEX)
    tensors = read_file(path)
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name], index["weight_map"][name]
        write_json(folder, index, INDEX)
    save_file(tensors, path)


def set_index(folder, change):
    index = read_json(folder, INDEX)
    change(index["weight_map"])
    write_json(folder, index, INDEX)


def truncate(folder):
    path = file_of(folder, EXPERT)
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def remove_shard(folder):
    path = file_of(folder, EXPERT)
    path.unlink()
    return path.name


def unknown_file_in_index(folder):
    set_index(folder, lambda weight_map: weight_map.update({EXPERT: "nowhere.safetensors"}))
    return "nowhere.safetensors"


def path_in_index(folder):
    """A file that exists, but outside: a checkpoint must not read what lies beside it."""
    path = file_of(folder, EXPERT)
    shutil.copy(path, folder.parent / "outside.safetensors")
    names = [name for name, file in read_json(folder, INDEX)["weight_map"].items() if file == path.name]
    set_index(folder, lambda weight_map: weight_map.update(dict.fromkeys(names, "../outside.safetensors")))
    return "outside.safetensors"


def no_json_index(folder):
    (folder / INDEX).write_text("{")
    return ""


def duplicate_key(folder):
    path = folder / "model_mtp.safetensors"
    save_file({**read_file(path), EXPERT: read_tensors(folder)[EXPERT]}, path)
    return EXPERT


def unlisted_tensor(folder):
    set_index(folder, lambda weight_map: weight_map.pop(EXPERT))
    return EXPERT


def missing_tensor(folder):
    rewrite(folder, EXPERT, lambda tensor: None)
    return EXPERT


def missing_scale(folder):
    rewrite(folder, f"{EXPERT}_scale_inv", lambda tensor: None)
    return f"{EXPERT}_scale_inv"


def unknown_tensor(folder):
    name = "model.layers.1.self_attn.surprise.weight"
    path = file_of(folder, QKV)
    save_file({**read_file(path), name: torch.zeros(3)}, path)
    set_index(folder, lambda weight_map: weight_map.update({name: path.name}))
    return name


def mis_shaped(folder):
    rewrite(folder, "model.layers.0.self_attn.o_proj.weight", lambda tensor: tensor[:, :-1].contiguous())
    return "model.layers.0.self_attn.o_proj.weight"


def mis_shaped_rows(folder):
    rewrite(folder, QKV, lambda tensor: tensor[:-1].contiguous())
    return QKV


def wrong_scale_shape(folder):
    rewrite(folder, f"{EXPERT}_scale_inv", lambda tensor: torch.ones(tensor.shape[0] + 1, tensor.shape[1]))
    return f"{EXPERT}_scale_inv"


def nan_scale(folder):
    rewrite(folder, f"{QKV}_scale_inv", lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("nan")))
    return f"{QKV}_scale_inv"


def negative_scale(folder):
    rewrite(folder, f"{EXPERT}_scale_inv", lambda tensor: -tensor)
    return f"{EXPERT}_scale_inv"


def half_scale(folder):
    rewrite(folder, f"{EXPERT}_scale_inv", lambda tensor: tensor.half())
    return f"{EXPERT}_scale_inv"


def integer_weight(folder):
    rewrite(folder, "model.norm.weight", lambda tensor: tensor.to(torch.int32))
    return "model.norm.weight"


def another_block_size(folder):
    config = read_json(folder)
    config["quantization_config"]["weight_block_size"] = [64, 64]
    write_json(folder, config)
    return "weight_block_size"


def contradictory_config(folder):
    write_json(folder, {**read_json(folder), "hybrid_layer_pattern": [0]})
    return "hybrid_layer_pattern"


def one_expert_less_in_config(folder):
    write_json(folder, {**read_json(folder), "n_routed_experts": 3})
    return "model.layers.1.mlp.experts.3.down_proj.weight"


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    return "safetensors"


BREAKS = [
    truncate,
    remove_shard,
    unknown_file_in_index,
    path_in_index,
    no_json_index,
    duplicate_key,
    unlisted_tensor,
    missing_tensor,
    missing_scale,
    unknown_tensor,
    mis_shaped,
    mis_shaped_rows,
    wrong_scale_shape,
    nan_scale,
    negative_scale,
    half_scale,
    integer_weight,
    another_block_size,
    contradictory_config,
    one_expert_less_in_config,
    no_weights,
]


@pytest.mark.parametrize("mode", [load, resident])
@pytest.mark.parametrize("breaking", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_checkpoint_is_refused_by_name(broken, breaking, mode):
    name = breaking(broken)
    with pytest.raises((ValueError, OSError)) as error:
        mode(broken)
    assert name in str(error.value)


@pytest.mark.parametrize("mode", [load, resident])
def test_fp8_files_of_a_config_that_does_not_say_so(broken, mode):
    config = read_json(broken)
    del config["quantization_config"]
    write_json(broken, config)
    with pytest.raises(ValueError, match=r"quantiz"):
        mode(broken)


def test_the_copy_that_is_broken_above_loads_when_whole(broken):
    load(broken)
    resident(broken)


def test_a_broken_checkpoint_is_refused_before_weights_are_read(broken, monkeypatch):
    missing_tensor(broken)
    monkeypatch.setattr("modeling_mimo.checkpoint_mimo_v2.Checkpoint.slices", lambda self: pytest.fail("read"))
    with pytest.raises(ValueError, match="missing"):
        load(broken)


def test_all_problems_come_in_one_error(broken):
    rewrite(broken, EXPERT, lambda tensor: None)
    rewrite(broken, "model.norm.weight", lambda tensor: tensor[:-1])
    unknown = unknown_tensor(broken)
    with pytest.raises(ValueError, match="do not match the config") as error:
        load(broken)
    for name in (EXPERT, "model.norm.weight", unknown):
        assert name in str(error.value)


# The released sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2-Flash", "MiMo-V2.6-Flash-RL"])
def test_every_tensor_of_a_release_has_its_place_and_every_place_its_tensor(name):
    config = MiMoV2Config.from_pretrained(DATA / name)
    with torch.device("meta"):
        state = MiMoV2ForCausalLM(config).state_dict()
    sources = defaultdict(list)
    for tensor in released_tensors(config).values():
        if tensor.target is not None:
            sources[tensor.target].append(tensor.shape)
    assert sources.keys() == state.keys()
    experts = config.n_routed_experts
    for target, shapes in sources.items():
        if target.endswith("experts.gate_up_proj"):
            (rows, columns), *rest = shapes
            assert len(shapes) == 2 * experts
            assert set(rest) == {(rows, columns)}
            expected = (experts, 2 * config.moe_intermediate_size, config.hidden_size)
        elif target.endswith("experts.down_proj"):
            assert len(shapes) == experts
            expected = (experts, config.hidden_size, config.moe_intermediate_size)
        else:
            (expected,) = shapes
        assert tuple(state[target].shape) == expected, target


def test_the_reference_formula_is_the_one_that_counts_blocks_per_chunk(checkpoints):
    """Guards the oracle of this file: the two ways to count blocks give different values in these files."""
    tensors, config = read_tensors(checkpoints["fp8_fused"]), read_json(checkpoints["fp8_fused"])
    weight, scale = tensors[QKV], tensors[f"{QKV}_scale_inv"]
    assert scale.shape[0] == 2 * -(-weight.shape[0] // 2 // 128)
    right = dequantize(weight, scale, chunks=2)
    assert len(split_qkv(right, config, True)) == 3
    rows = torch.arange(weight.shape[0]) // 128
    assert not torch.equal(weight.float() * scale[rows].repeat_interleave(128, 1)[:, : weight.shape[1]], right)


# Towers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_frequencies_of_the_tower_stay_float32(checkpoints, dtype):
    model = load(checkpoints["fp8_omni"], dtype=dtype)
    assert model.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.visual.rotary_pos_emb.inv_freq, model.visual.rotary_pos_emb.inverse_frequencies())


def test_no_tower_is_loaded_where_none_is_wanted(checkpoints, tmp_path):
    model = load(checkpoints["fp8_omni"], load_towers=False)
    assert model.visual is None
    assert model.audio_encoder is None
    assert model.speech_embeddings is None
    names = list(read_tensors(checkpoints["fp8_omni"]))
    for part, prefixes in (("vision", ("visual.",)), ("audio", AUDIO_PREFIXES)):
        assert model.load_report.not_loaded[part] == len([name for name in names if name.startswith(prefixes)])
    assert torch.equal(logits(model), logits(load(checkpoints["fp8_omni"])))
    # the saved folder remembers, and still knows what it has no tensors for
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.visual is None
    assert again.audio_encoder is None
    assert again.config.vision_config is not None
    assert again.config.audio_config is not None
    assert_same_state(again, model)


def test_the_base_model_leaves_the_tower_in_the_files(checkpoints):
    base, whole = AutoModel.from_pretrained(checkpoints["fp8_omni"]), load(checkpoints["fp8_omni"])
    assert_same_state(base, whole.model)
    assert {"vision", "audio"} <= base.load_report.not_loaded.keys()


@pytest.mark.parametrize("mode", [load, resident])
def test_a_loaded_model_hears_what_the_naive_page_says(checkpoints, mode):
    model = mode(checkpoints["fp8_omni"], dtype=torch.float32)
    config = read_json(checkpoints["fp8_omni"])["audio_config"]
    weights = {name: part.float() for name, part in read_tensors(checkpoints["fp8_omni"]).items()}
    audios = [torch.randint(0, int(config["speech_zeroemb_idx"]), (n, config["audio_channels"])) for n in (3, 9)]
    features = model.get_audio_features(torch.cat(audios), torch.tensor([3, 9])).pooler_output
    assert_near(torch.cat(features), torch.cat(audio_features(audios, config, weights)))


def without(checkpoint, folder, prefixes):
    """A copy of `checkpoint` in which no tensor begins with one of `prefixes`."""
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in read_file(path).items() if not name.startswith(prefixes)}, path)
    index = read_json(folder, INDEX)
    index["weight_map"] = {n: file for n, file in index["weight_map"].items() if not n.startswith(prefixes)}
    write_json(folder, index, INDEX)
    return folder


def test_a_missing_tower_is_an_error_that_says_what_to_do(checkpoints, tmp_path):
    folder = without(checkpoints["fp8_omni"], tmp_path / "blind", ("visual.",))
    with pytest.raises(ValueError, match=r"missing \(\d+\): visual\..*pass load_towers=False"):
        load(folder)
    assert load(folder, load_towers=False).visual is None


def test_a_missing_audio_encoder_is_an_error_that_says_what_to_do(checkpoints, tmp_path):
    folder = without(checkpoints["fp8_omni"], tmp_path / "deaf", AUDIO_PREFIXES)
    with pytest.raises(ValueError, match=r"missing \(\d+\): speech_embeddings\..*pass audio_config=None"):
        load(folder)
    seeing = load(folder, audio_config=None)
    assert seeing.audio_encoder is None
    assert seeing.visual is not None


@pytest.mark.parametrize(
    "name", ["visual.merger.ln_q.weight", "speech_embeddings.7.weight", "audio_encoder.projection.mlp.2.weight"]
)
def test_a_tower_without_one_tensor_is_refused(checkpoints, tmp_path, name):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints["fp8_omni"], folder)
    rewrite(folder, name, lambda tensor: None)
    with pytest.raises(ValueError, match=rf"missing \(1\): {name}$"):
        load(folder)


# MTP heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_draft_logits_of_a_loaded_model_equal_the_naive_page(checkpoints, name):
    config = read_json(checkpoints[name])
    layout = "plain" if LAYOUT_OF[name] == "plain" else "chunked"
    weights = reference_weights(read_tensors(checkpoints[name]), config, qkv_layout=layout)
    model, ids = load(checkpoints[name], dtype=torch.float32), token_ids(1, 30)
    with torch.no_grad():
        hidden = trunk_states(model, ids)
        for index, head in enumerate(model.model.mtp.layers):
            later = model.model.embed_tokens(ids[:, 1 + index :])
            rotary = model.model.rotary_emb(later, torch.arange(later.shape[1])[None], "sliding_attention")
            got = model.lm_head(head(later, hidden[:, : later.shape[1]], position_embeddings=rotary))[0]
            assert_near(got, draft_logits(weights, config, ids[0], hidden[0], index))


@pytest.mark.parametrize("mode", [load, resident])
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_no_heads_are_loaded_where_none_are_wanted(checkpoints, mode, auto_class, tmp_path):
    quantization = {"quantization_config": MiMoV2FP8Config(dequantize=False)} if mode is resident else {}
    model = auto_class.from_pretrained(checkpoints["fp8_fused"], load_mtp=False, **quantization)
    whole = mode(checkpoints["fp8_fused"])
    assert model.base_model.mtp is None
    names = [name for name in read_tensors(checkpoints["fp8_fused"]) if name.startswith("model.mtp.")]
    assert model.load_report.not_loaded == {"mtp": len(names)}
    assert "(known, not loaded)" in str(model.load_report)
    expected = {key: part for key, part in whole.base_model.state_dict().items() if not key.startswith("mtp.")}
    got = model.base_model.state_dict()
    assert got.keys() == expected.keys()
    assert [key for key in got if not same_bits(got[key], expected[key])] == []


def test_a_folder_saved_without_heads_remembers(checkpoints, tmp_path):
    model = load(checkpoints["fp8_fused"], load_mtp=False)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.model.mtp is None
    assert again.load_report.not_loaded == {}
    assert "no MTP heads in the files" in str(again.load_report)
    assert_same_state(again, model)


@pytest.fixture
def silent(checkpoints, tmp_path):
    """A release, whose config does not give the number of heads, to take heads from."""
    folder = Path(shutil.copytree(checkpoints["fp8_fused"], tmp_path / "silent"))
    assert "num_nextn_predict_layers" not in read_json(folder)
    return folder


def drop(folder, prefix):
    names = [name for name in read_json(folder, INDEX)["weight_map"] if name.startswith(prefix)]
    path = folder / "model_mtp.safetensors"
    rest = {name: tensor for name, tensor in read_file(path).items() if name not in names}
    if rest:
        save_file(rest, path)
    else:
        path.unlink()
    set_index(folder, lambda weight_map: [weight_map.pop(name) for name in names])
    return folder


@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("mode", [load, resident])
def test_files_without_heads_of_a_silent_config_give_a_model_without(silent, checkpoints, tmp_path, mode, device_map):
    model, info = mode(drop(silent, "model.mtp."), device_map=device_map, output_loading_info=True)
    assert not any(info.values())
    assert model.model.mtp is None
    assert model.config.num_mtp_layers == 0
    assert "no MTP heads in the files" in str(model.load_report)
    assert torch.equal(logits(model), logits(mode(checkpoints["fp8_fused"])))
    assert AutoModel.from_pretrained(silent).mtp is None
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(mode(tmp_path / "saved"), model)
    assert load(silent, load_mtp=False).model.mtp is None


@pytest.mark.parametrize("mode", [load, resident])
def test_files_with_fewer_heads_of_a_silent_config_give_as_many(silent, checkpoints, tmp_path, mode):
    model, info = mode(drop(silent, "model.mtp.layers.2."), output_loading_info=True)
    assert not any(info.values())
    assert model.config.num_mtp_layers == len(model.model.mtp.layers) == 2
    assert torch.equal(draft_states(model), draft_states(mode(checkpoints["fp8_fused"]))[:2])
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(mode(tmp_path / "saved"), model)


def test_files_without_heads_of_a_config_that_has_some_are_refused(silent):
    drop(silent, "model.mtp.")
    write_json(silent, {**read_json(silent), "num_nextn_predict_layers": 3})
    with pytest.raises(ValueError, match=r"missing \(36\): model\.mtp\..*pass load_mtp=False"):
        load(silent)
    assert load(silent, load_mtp=False).model.mtp is None


def test_an_override_of_the_number_of_heads_is_as_good_as_the_config(silent):
    drop(silent, "model.mtp.")
    with pytest.raises(ValueError, match=r"missing \(36\): model\.mtp\."):
        load(silent, num_mtp_layers=3)


@pytest.mark.parametrize("name", ["model.mtp.layers.0.eh_proj.weight", "model.mtp.layers.2.self_attn.o_proj.weight"])
def test_a_head_without_one_tensor_is_refused(silent, name):
    rewrite(silent, name, lambda tensor: None)
    with pytest.raises(ValueError, match=rf"missing \(1\): {name}$"):
        load(silent)
