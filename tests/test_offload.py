"""Device maps: layers and experts on disk or in another memory compute the same numbers, and read what they need."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import SMALL, tiny_model, token_ids
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from modeling_mimo import HybridCache, MiMoV2FP8Config
from modeling_mimo.checkpoint_mimo_v2 import Checkpoint
from modeling_mimo.modeling_mimo_v2_text import MiMoV2Router
from modeling_mimo.offload_mimo_v2 import MiMoV2OffloadedExperts, expert_device_map, fetch_hit_experts
from modeling_mimo.processors import MiMoAudioTokenizer


pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["fp8_fused", "bf16_fused", "fp8_split", "fp8_plain", "fp8_omni", "mxfp4"]
# every checkpoint dequantized, and those with codes as codes too
FORMS = [(name, True) for name in NAMES] + [(name, False) for name in NAMES if name != "bf16_fused"]
EVERYTHING = {"": "disk"}


def load(folder, dequantize=True, **options):
    if "bf16" not in Path(folder).name:
        options["quantization_config"] = MiMoV2FP8Config(dequantize=dequantize)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def experts_on_disk(folder, **options):
    return load(folder, device_map=expert_device_map(in_memory(folder).config), **options)


_in_memory = {}


def in_memory(folder, dequantize=True, dtype=torch.float32):
    """The same model without a device map; loaded once."""
    key = (str(folder), dequantize, dtype)
    if key not in _in_memory:
        _in_memory[key] = load(folder, dequantize, dtype=dtype)
    return _in_memory[key]


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(
        left.cpu().view(-1).view(torch.uint8), right.view(-1).view(torch.uint8)
    )


@torch.no_grad()
def logits(model, ids=None):
    return model(token_ids(2, 30) if ids is None else ids).logits


def snapshot(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(Path(folder).rglob("*"))}


def offloaded_experts(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, MiMoV2OffloadedExperts)}


# Disk -------------------------------------------------------------------------------------------------------------


def check_parameters(model, whole):
    """Every parameter on disk reads as loading makes it, and has the shape and dtype of one in memory."""
    expected, names = dict(whole.named_parameters()), dict(model.named_parameters())
    assert set(model.released_weights) == expected.keys() == names.keys()
    assert [key for key in expected if not same_bits(expected[key].data, model.released_weights[key])] == []
    assert [key for key, value in expected.items() if names[key].shape != value.shape] == []
    assert [key for key, value in expected.items() if names[key].dtype != value.dtype] == []


@pytest.mark.parametrize(("name", "dequantize"), FORMS)
def test_a_model_on_disk_is_the_same_and_writes_nothing(checkpoints, tmp_path, monkeypatch, name, dequantize):
    monkeypatch.chdir(tmp_path)
    before = snapshot(checkpoints[name])
    model = load(checkpoints[name], dequantize, dtype=torch.float32, device_map=EVERYTHING)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    # nothing but headers and scales was needed so far
    assert model.released_weights.bytes_read == 0
    assert len(offloaded_experts(model)) == 7
    whole = in_memory(checkpoints[name], dequantize)
    assert torch.equal(logits(model), logits(whole))
    check_parameters(model, whole)
    assert snapshot(checkpoints[name]) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fp8_fused", "fp8_split", "mxfp4"])
def test_weights_for_hopper_kernels_stay_on_disk_too(checkpoints, monkeypatch, name):
    expected = in_memory(checkpoints[name], False, torch.bfloat16).model.layers[1].mlp.experts
    # the kernels need a GPU; what they get does not
    monkeypatch.setattr("modeling_mimo.quantization_mimo_v2.has_fp8_kernels", lambda: True)
    model = load(checkpoints[name], False, device_map=EVERYTHING)
    check_parameters(model, load(checkpoints[name], False))
    experts = model.model.layers[1].mlp.experts
    for got, weight in zip(experts.expert_weights(5, torch.bfloat16), expected.expert_weights(5, torch.bfloat16)):
        assert torch.equal(got, weight)


@pytest.mark.parametrize(
    ("name", "dequantize", "dtype"),
    [("fp8_fused", True, torch.bfloat16), ("fp8_fused", False, torch.float16), ("mxfp4", False, torch.bfloat16)],
    ids=str,
)
def test_half_precision_is_the_same_too(checkpoints, name, dequantize, dtype):
    model = load(checkpoints[name], dequantize, dtype=dtype, device_map=EVERYTHING)
    assert torch.equal(logits(model), logits(in_memory(checkpoints[name], dequantize, dtype)))


@pytest.mark.parametrize("option", [{"load_towers": False}, {"load_mtp": False}], ids=str)
def test_parts_that_are_left_out_are_not_looked_for(checkpoints, option):
    model = load(checkpoints["fp8_omni"], dtype=torch.float32, device_map=EVERYTHING, **option)
    assert torch.equal(logits(model), logits(in_memory(checkpoints["fp8_omni"])))
    assert list(model.load_report.not_loaded)


def test_the_base_model_alone(checkpoints):
    options = {"dtype": torch.float32, "quantization_config": MiMoV2FP8Config(dequantize=False)}
    model = AutoModel.from_pretrained(checkpoints["fp8_fused"], device_map=EVERYTHING, **options)
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = in_memory(checkpoints["fp8_fused"], False).model(ids).last_hidden_state
        assert torch.equal(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("disk", [["model.embed_tokens", "lm_head"], ["lm_head"]], ids=["both", "head"])
def test_tied_embeddings_on_disk(tmp_path, disk):
    whole = tiny_model(**SMALL, tie_word_embeddings=True)
    whole.save_pretrained(tmp_path)
    modules = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "model.mtp", "lm_head"]
    device_map = {module: "disk" if module in disk else "cpu" for module in modules}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(model), logits(whole))


def media(config):
    """Inputs of one row with an image, a video and a sound."""
    generator = torch.Generator().manual_seed(3)
    ids = [5, *[config.image_token_id] * 4, 6, *[config.video_token_id] * 2, 7, *[config.audio_token_id] * 2, 8]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(16, 1536, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values_videos": torch.randn(8, 1536, generator=generator),
        "video_grid_thw": torch.tensor([[1, 2, 4]]),
        "audio_codes": torch.randint(0, 1024, (7, 20), generator=generator),
        "audio_code_lengths": torch.tensor([7]),
    }


def test_media_with_the_towers_on_disk(checkpoints):
    whole = in_memory(checkpoints["fp8_omni"])
    inputs = media(whole.config)
    device_map = expert_device_map(whole.config, experts="cpu")
    device_map |= dict.fromkeys(("visual", "speech_embeddings", "audio_encoder"), "disk")
    for placement in (device_map, EVERYTHING):
        model = load(checkpoints["fp8_omni"], dtype=torch.float32, device_map=placement)
        assert model.visual.patch_embed.proj.weight.device.type == "meta"
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, whole(**inputs).logits)


def test_the_codec_on_disk(checkpoints):
    options = {"subfolder": "audio_tokenizer", "dtype": torch.float32}
    whole = MiMoAudioTokenizer.from_pretrained(checkpoints["fp8_omni"], **options)
    codec = MiMoAudioTokenizer.from_pretrained(checkpoints["fp8_omni"], device_map=EVERYTHING, **options)
    sound = [torch.randn(203, 128)]
    assert codec.encoder.conv1.weight.device.type == "meta"
    assert torch.equal(*(next(iter(model.encode_segments(sound))) for model in (codec, whole)))


# Experts ----------------------------------------------------------------------------------------------------------


def hit_experts(model, ids):
    """{(layer, expert)} of one forward, and the bytes that this process read meanwhile."""
    hit, handles = set(), []
    for index, layer in enumerate(model.model.layers):
        for module in layer.mlp.children():
            if isinstance(module, MiMoV2Router):
                handles.append(
                    module.register_forward_hook(
                        lambda *call, index=index: hit.update((index, e) for e in call[2][2].unique().tolist())
                    )
                )
    before = read_from_files()
    logits(model, ids)
    read = read_from_files() - before
    for handle in handles:
        handle.remove()
    return hit, read


def read_from_files():
    """Bytes that this process has read by system calls, from the page cache or not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io: expected a line `rchar`.")


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the kernel does not count reads")
@pytest.mark.parametrize(("name", "dequantize"), [("fp8_fused", True), ("mxfp4", False), ("bf16_fused", True)])
def test_a_token_reads_the_experts_that_it_hits_and_nothing_else(checkpoints, name, dequantize):
    model = experts_on_disk(checkpoints[name], dequantize=dequantize)
    tensors = Checkpoint.from_folder(checkpoints[name]).tensors
    assert model.released_weights.bytes_read == 0
    hit, read = hit_experts(model, torch.tensor([[7]]))
    assert len(hit) == 7 * model.config.num_experts_per_tok < 7 * model.config.n_routed_experts
    prefixes = tuple(f"model.layers.{layer}.mlp.experts.{expert}." for layer, expert in hit)
    expected = sum(info.nbytes for key, info in tensors.items() if key.startswith(prefixes))
    assert model.released_weights.bytes_read == expected
    # the kernel's count has the few bytes in it that reading it takes
    assert expected <= read < expected + 20_000


def test_what_is_no_expert_is_read_once_per_forward(checkpoints):
    model = load(checkpoints["fp8_fused"], device_map=EVERYTHING)
    tensors = Checkpoint.from_folder(checkpoints["fp8_fused"]).tensors
    hit, _ = hit_experts(model, torch.tensor([[7]]))
    prefixes = tuple(f"model.layers.{layer}.mlp.experts.{expert}." for layer, expert in hit)
    # the correction bias is a buffer, and the heads do not run
    expected = sum(
        info.nbytes
        for key, info in tensors.items()
        if key.startswith(prefixes) or not any(part in key for part in (".experts.", ".mtp.", "e_score_correction"))
    )
    assert model.released_weights.bytes_read == expected


def test_the_cache_of_experts(checkpoints):
    model = experts_on_disk(checkpoints["fp8_fused"])
    whole, ids, released = (
        in_memory(checkpoints["fp8_fused"], dtype=torch.bfloat16),
        token_ids(2, 9),
        model.released_weights,
    )
    expected = logits(whole, ids)
    model.set_expert_cache("1GB")
    assert torch.equal(logits(model, ids), expected)
    first = released.bytes_read
    assert torch.equal(logits(model, ids), expected)
    assert released.bytes_read == first > 0
    # a budget that holds two experts of each layer
    layers = offloaded_experts(model)
    layer = next(iter(layers.values()))
    size = sum(t.nbytes for name in ("gate_up_proj", "down_proj") for pair in layer.stored(name, 0) for t in pair)
    model.set_expert_cache(2 * size * len(layers))
    assert torch.equal(logits(model, ids), expected)
    # two parameters each
    assert {len(layer.cache) for layer in layers.values()} == {4}
    for expert, read in ((3, True), (5, True), (3, False), (6, True), (3, False), (5, True)):
        before = released.bytes_read
        layer.expert_weights(expert, torch.bfloat16)
        assert (released.bytes_read > before) == read, expert
    model.set_expert_cache(0)
    assert {len(layer.cache) for layer in layers.values()} == {0}
    before = released.bytes_read
    assert torch.equal(logits(model, ids), expected)
    assert released.bytes_read - before == first


def test_experts_that_were_left_out_of_a_step_are_not_fetched(checkpoints):
    model = experts_on_disk(checkpoints["fp8_fused"])
    fetched = {}
    for name, layer in offloaded_experts(model).items():
        fetch, seen = layer.fetch, fetched.setdefault(name, [])
        layer.fetch = lambda part, expert, fetch=fetch, seen=seen: (seen.append(expert), fetch(part, expert))[1]
    hit, _ = hit_experts(model, token_ids(2, 9))
    # once per forward, however many tokens share an expert
    assert {(name, tuple(sorted(seen))) for name, seen in fetched.items()} == {
        (f"model.layers.{index}.mlp.experts", tuple(sorted(2 * [expert for layer, expert in hit if layer == index])))
        for index in range(1, 8)
    }


# Generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dequantize", "placement"), [(True, "experts"), (False, "everything")], ids=["experts", "everything"]
)
def test_generation_is_the_same(checkpoints, dequantize, placement):
    folder = checkpoints["fp8_fused"]
    whole = in_memory(folder, dequantize)
    device_map = expert_device_map(whole.config) if placement == "experts" else EVERYTHING
    model = load(folder, dequantize, dtype=torch.float32, device_map=device_map)
    prompt = {"input_ids": token_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    prompt["attention_mask"][0, :3] = 0
    for options in ({}, {"use_mtp": True}, {"cache": HybridCache}):
        results = []
        for one in (model, whole):
            arguments = {key: value(one.config) if value is HybridCache else value for key, value in options.items()}
            arguments |= {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            results.append(one.generate(**prompt, **arguments, return_dict_in_generate=True))
        assert torch.equal(*(result.sequences for result in results))
        cache = results[0].cache
        assert {buffer.device.type for layer in cache.layers for buffer in layer.buffers} == {"cpu"}


def test_inputs_belong_where_the_model_computes(checkpoints):
    model = load(checkpoints["fp8_fused"], device_map=EVERYTHING)
    # the first parameter is on the meta device
    assert model.device.type == model.model.device.type == "cpu"
    with torch.device("meta"):
        assert type(model)(model.config).device.type == "meta"


# Maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_what_does_not_fit_goes_to_disk_by_itself(checkpoints, placement):
    model = load(checkpoints["fp8_fused"], dtype=torch.float32, device_map=placement, max_memory={"cpu": "8MB"})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert 0 < sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta") < 8e6
    assert torch.equal(logits(model), logits(in_memory(checkpoints["fp8_fused"])))
    # one megabyte has room for nothing
    tight = load(checkpoints["fp8_fused"], dtype=torch.float32, device_map=placement, max_memory={"cpu": "1MB"})
    assert set(tight.hf_device_map.values()) == {"disk"}
    assert torch.equal(logits(tight), logits(in_memory(checkpoints["fp8_fused"])))


def test_a_map_by_hand_with_layers_heads_and_towers(checkpoints):
    whole = in_memory(checkpoints["fp8_omni"], False)
    device_map = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "lm_head", "visual.blocks"), "cpu")
    device_map |= dict.fromkeys(("model.norm", "visual.patch_embed", "visual.merger"), "disk")
    device_map |= {"speech_embeddings": "disk", "audio_encoder": "cpu", "model.mtp.layers.0": "cpu"}
    device_map |= {"model.mtp.layers.1": "disk", "model.mtp.layers.2": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index in (2, 5) else "cpu" for index in range(8)}
    model = load(checkpoints["fp8_omni"], False, dtype=torch.float32, device_map=device_map)
    for name, parameter in model.named_parameters():
        entry = next(module for module in device_map if name.startswith(f"{module}."))
        assert parameter.device.type == ("meta" if device_map[entry] == "disk" else "cpu"), name
    inputs = media(whole.config)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "use_mtp": True}
    assert torch.equal(model.generate(**inputs, **options), whole.generate(**inputs, **options))


def test_a_map_for_the_experts_covers_the_model_and_nothing_twice(checkpoints):
    for name in ("fp8_omni", "fp8_fused"):
        model = in_memory(checkpoints[name])
        device_map = expert_device_map(model.config)
        for weight in model.state_dict():
            assert len([module for module in device_map if weight.startswith(f"{module}.")]) == 1, weight
        on_disk = [module for module, device in device_map.items() if device == "disk"]
        assert on_disk == [f"model.layers.{index}.mlp.experts" for index in range(1, 8)]


# accelerate by hand -----------------------------------------------------------------------------------------------


def small_model():
    return tiny_model(**SMALL)


def test_dispatch_model_with_a_map_of_accelerate(tmp_path):
    model, expected = small_model(), logits(small_model())
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": total // 2}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    dispatch_model(model, device_map, offload_dir=tmp_path, skip_keys=model._skip_keys_device_placement)
    assert torch.equal(logits(model), expected)
    tokens = model.generate(token_ids(1, 9), max_new_tokens=5, do_sample=False, use_mtp=True)
    assert torch.equal(tokens, small_model().generate(token_ids(1, 9), max_new_tokens=5, do_sample=False))


def test_hooks_of_accelerate_bring_whole_layers_until_they_fetch_hit_experts():
    model, expected = small_model(), logits(small_model())
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model), expected)
    fetch_hit_experts(model)
    fetch_hit_experts(model)
    experts = offloaded_experts(model)
    assert len(experts) == 3
    # the stacked tensors stay away while the experts run
    devices = []
    for layer in experts.values():
        layer.act_fn.register_forward_hook(lambda *_, layer=layer: devices.append(layer.gate_up_proj.device.type))
    assert torch.equal(logits(model), expected)
    assert set(devices) == {"meta"}
    assert model.device.type == "cpu"


def test_what_accelerate_wrote_to_disk_is_read_as_accelerate_does(tmp_path):
    model, expected = small_model(), logits(small_model())
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    fetch_hit_experts(model)
    # its files give whole tensors only
    assert offloaded_experts(model) == {}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["fp8_fused", "mxfp4"])
def test_codes_in_cpu_memory_are_fetched_by_expert(checkpoints, name):
    model = load(checkpoints[name], False, dtype=torch.float32)
    cpu_offload(model, execution_device=torch.device("cpu"))
    fetch_hit_experts(model)
    assert torch.equal(logits(model), logits(in_memory(checkpoints[name], False)))
    (layer, *_) = offloaded_experts(model).values()
    assert {weight.dtype for weight, _ in layer.stored("gate_up_proj", 0)} <= {torch.float8_e4m3fn, torch.uint8}


def test_beside_an_accelerator_weights_come_from_memory_and_from_disk(checkpoints):
    whole = in_memory(checkpoints["fp8_fused"], False)
    device_map = expert_device_map(whole.config, experts="cpu") | {
        "model.layers.2.self_attn": "disk",
        "lm_head": "disk",
    }
    model = load(checkpoints["fp8_fused"], False, dtype=torch.float32, device_map=device_map)
    remove_hook_from_submodules(model)
    # the meta device stands for one: all is done but the arithmetic
    dispatch_model(model, device_map, main_device="meta", offload_index=model.released_weights)
    fetch_hit_experts(model)
    assert len(offloaded_experts(model)) == 7
    for name, parameter in whole.named_parameters():
        assert model.get_parameter(name).device.type == "meta"
        module, _, leaf = name.rpartition(".")
        assert same_bits(model.get_submodule(module)._hf_hook.weights_map[leaf], parameter.data), name
    layer = model.model.layers[3].mlp.experts
    assert {tensor.device.type for pair in layer.stored("down_proj", 5) for tensor in pair} == {"meta"}
    expected = whole.model.layers[3].mlp.experts.expert_weights(5, torch.float32)
    layer.device = "cpu"
    assert all(torch.equal(*pair) for pair in zip(layer.expert_weights(5, torch.float32), expected))


# Saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dequantize", "placement"),
    [("fp8_omni", True, "experts"), ("fp8_omni", False, "everything"), ("mxfp4", False, "experts")],
)
def test_an_offloaded_model_saves_what_one_in_memory_saves(checkpoints, tmp_path, name, dequantize, placement):
    whole = load(checkpoints[name], dequantize)
    device_map = expert_device_map(whole.config) if placement == "experts" else EVERYTHING
    model = load(checkpoints[name], dequantize, device_map=device_map)
    model.save_pretrained(tmp_path / "offloaded", max_shard_size="4MB")
    whole.save_pretrained(tmp_path / "whole", max_shard_size="4MB")
    saved = {}
    for folder in ("offloaded", "whole"):
        tensors = saved.setdefault(folder, {})
        for path in (tmp_path / folder).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert saved["offloaded"].keys() == saved["whole"].keys()
    assert [key for key, value in saved["whole"].items() if not same_bits(saved["offloaded"][key], value)] == []
    assert (tmp_path / "offloaded/config.json").read_text() == (tmp_path / "whole/config.json").read_text()
    assert len(list((tmp_path / "offloaded").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "offloaded", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(whole))


# Refusals ---------------------------------------------------------------------------------------------------------


def refused(call):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": "cpu"}, "expected an entry for every module, got none for lm_head."),
        (
            {"model.layers": "disk", "lm_head": "cpu", "model.embed_tokens": "cpu", "model.mtp.layers.1": "cpu"},
            "got none for model.mtp.layers.0, model.mtp.layers.2, model.norm.",
        ),
        (
            {"model.layer": "cpu", "lm_head": "cpu"},
            "got none for model.embed_tokens, model.layers, model.mtp, model.norm",
        ),
        ({"": "gpu"}, "`device_map['']`: expected 'cpu', 'disk' or one of the"),
        ({"model": "cpu", "lm_head": "cuda:99"}, "`device_map['lm_head']`: expected 'cpu', 'disk'"),
        ({"model": 99, "lm_head": "cpu"}, "got 99."),
        ({"model": None, "lm_head": "cpu"}, "got None."),
        ({"": "cpu", "model.layers.2": "disk"}, "got 'model.layers.2'; `expert_device_map` writes a map"),
    ],
    ids=str,
)
def test_a_map_that_cannot_be_is_refused_before_weights_are_read(checkpoints, monkeypatch, device_map, message):
    monkeypatch.setattr("modeling_mimo.checkpoint_mimo_v2.Checkpoint.slices", lambda self: pytest.fail("read"))
    assert message in refused(lambda: load(checkpoints["fp8_fused"], device_map=device_map))


def test_a_device_name_that_is_none(checkpoints):
    assert "'auto', 'balanced'" in refused(lambda: load(checkpoints["fp8_fused"], device_map="gpu"))


def test_training_with_weights_on_disk_is_refused(checkpoints):
    model = experts_on_disk(checkpoints["fp8_fused"])
    message = refused(model.train)
    assert "14 parameters on disk, which get no gradients: load without 'disk' in `device_map`" in message
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.device.type == "meta")
    assert not model.eval().training
    in_memory(checkpoints["fp8_fused"]).train().eval()


def test_adapters_that_offloaded_experts_would_not_see_are_refused(checkpoints):
    model = experts_on_disk(checkpoints["bf16_fused"])
    adapters = LoraConfig(target_parameters=["mlp.experts.down_proj"])
    assert "modeling_mimo.training.lora_config" in refused(lambda: get_peft_model(model, adapters))


def test_a_cache_of_experts_needs_offloaded_ones(checkpoints):
    message = refused(lambda: in_memory(checkpoints["fp8_fused"]).set_expert_cache("1GB"))
    assert message == "`set_expert_cache`: expected a model with offloaded experts, got none."


def test_quantization_while_loading_and_disk_are_refused(checkpoints):
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    message = refused(
        lambda: AutoModelForCausalLM.from_pretrained(
            checkpoints["bf16_fused"], quantization_config=quantization, device_map=EVERYTHING
        )
    )
    assert "disk" in message


def test_a_state_dict_has_no_files_to_stay_in(tmp_path):
    model = small_model()
    options = {"config": model.config, "state_dict": model.state_dict(), "device_map": EVERYTHING}
    load_state = lambda **more: type(model).from_pretrained(None, **options, **more)  # noqa: E731
    assert "Please provide an `offload_folder`" in refused(load_state)
    # Transformers writes them there
    assert torch.equal(logits(load_state(offload_folder=tmp_path)), logits(model))
