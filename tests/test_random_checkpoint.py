"""Random checkpoints have the released format: names, dtypes, files, headers, index, config; and are reproducible."""

import gzip
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import modeling_mimo
from modeling_mimo.conversion import random_checkpoint
from modeling_mimo.conversion.fp8 import dequantize_blocks, dequantize_chunks
from modeling_mimo.conversion.mxfp4 import dequantize_mxfp4
from modeling_mimo.conversion.random_checkpoint import (
    SIZES,
    main,
    released_config,
    released_tensors_random,
    write_random_checkpoint,
)


# Every kind of text tensor in MiMo-V2.5's manifest, numbers replaced by N.
QUANTIZED = (
    "model.layers.N.self_attn.qkv_proj",
    "model.layers.N.mlp.{gate,up,down}_proj",
    "model.layers.N.mlp.experts.N.{gate,up,down}_proj",
    "model.mtp.layers.N.self_attn.qkv_proj",
    "model.mtp.layers.N.mlp.{gate,up,down}_proj",
)
BFLOAT16 = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.N.{input,post_attention}_layernorm.weight",
    "model.layers.N.self_attn.o_proj.weight",
    "model.layers.N.self_attn.attention_sink_bias",
    "model.mtp.layers.N.{eh_proj,enorm,hnorm}.weight",
    "model.mtp.layers.N.{input,pre_mlp,final}_layernorm.weight",
    "model.mtp.layers.N.self_attn.o_proj.weight",
    "model.mtp.layers.N.self_attn.attention_sink_bias",
)
FLOAT32 = ("model.layers.N.mlp.gate.weight", "model.layers.N.mlp.gate.e_score_correction_bias")


def spread(names):
    """Expand one {a,b} group in each name."""
    for name in names:
        head, _, rest = name.partition("{")
        group, _, tail = rest.partition("}")
        yield from (head + choice + tail for choice in group.split(","))


def released_kinds():
    kinds = {name: "BF16" for name in spread(BFLOAT16)} | {name: "F32" for name in FLOAT32}
    for name in spread(QUANTIZED):
        kinds |= {f"{name}.weight": "F8_E4M3", f"{name}.weight_scale_inv": "F32"}
    return kinds


def kind_of(name):
    return re.sub(r"\.\d+\.", ".N.", name)


def read_header(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert (
        max(entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry) == len(data) - 8 - length
    )
    return header


def read_headers(folder):
    return {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(folder):
    """All tensors, each from the file the index names."""
    weight_map = read_json(folder / "model.safetensors.index.json")["weight_map"]
    tensors = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, framework="pt", backend="pread") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    assert set(tensors) == set(weight_map)
    return tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders by (dtype, layout), size tiny, seed 0, without tokenizer."""
    base = tmp_path_factory.mktemp("checkpoints")
    kinds = [(dtype, layout) for dtype in ("fp8", "bf16") for layout in ("fused_qkv", "plain", "split")]
    return {
        kind: write_random_checkpoint(base / "_".join(kind), dtype=kind[0], layout=kind[1], with_tokenizer=False)
        for kind in kinds
    }


@pytest.fixture(scope="module")
def released(written):
    return written["fp8", "fused_qkv"]


def test_names_and_dtypes_are_the_released_ones(released):
    kinds = {}
    for header in read_headers(released).values():
        assert "__metadata__" not in header
        for name, entry in header.items():
            assert kinds.setdefault(kind_of(name), entry["dtype"]) == entry["dtype"]
    assert kinds == released_kinds()


def test_header_order(released):
    # As in the released model_mtp.safetensors: F32 first, then BF16, then F8, each by name; offsets without a gap.
    for header in read_headers(released).values():
        rank = {"F32": 0, "BF16": 1, "F8_E4M3": 2}
        assert list(header) == sorted(header, key=lambda name: (rank[header[name]["dtype"]], name))
        end = 0
        for entry in header.values():
            assert entry["data_offsets"][0] == end
            end = entry["data_offsets"][1]


def test_counts_by_formula(released):
    config = read_json(released / "config.json")
    layers, experts = config["num_hidden_layers"], config["n_routed_experts"]
    headers = read_headers(released)
    counts = {file: len(header) for file, header in headers.items()}
    ranks = 2
    share = experts // ranks
    # Released: 42 layers before the cut, 32 experts per rank: 42 * 32 * 6 + 127 = 8191.
    before = (layers - 3) * share * 6 + 4 * share - 1
    after = (layers - 1) * share * 6 - before
    swa = sum(config["hybrid_layer_pattern"])
    # Per layer two norms, o_proj and qkv_proj with scale; sinks; layer 0's MLP; router; embedding, norm and head.
    others = layers * 5 + swa + 6 + (layers - 1) * 2 + 3
    assert counts == {
        "model_mtp.safetensors": 48,
        "model_pp0_ep0_shard0.safetensors": before,
        "model_pp0_ep0_shard1.safetensors": after + others,
        "model_pp0_ep1_shard0.safetensors": before,
        "model_pp0_ep1_shard1.safetensors": after,
    }


def test_index(released):
    text = (released / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    headers = read_headers(released)
    assert text == json.dumps(index, indent=2)
    assert list(index) == ["metadata", "weight_map"]
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["weight_map"] == {name: file for file, header in sorted(headers.items()) for name in header}
    stored = sum(
        end - start for header in headers.values() for start, end in (e["data_offsets"] for e in header.values())
    )
    assert index["metadata"] == {"save_format": "fp8", "total_size": stored, "tp_size": 2}


def test_scale_in_another_file_than_its_weight(released):
    weight_map = read_json(released / "model.safetensors.index.json")["weight_map"]
    apart = {
        name: (file, weight_map[name + "_scale_inv"])
        for name, file in weight_map.items()
        if weight_map.get(name + "_scale_inv", file) != file
    }
    assert apart == {
        f"model.layers.6.mlp.experts.{4 * rank + 3}.up_proj.weight": (
            f"model_pp0_ep{rank}_shard0.safetensors",
            f"model_pp0_ep{rank}_shard1.safetensors",
        )
        for rank in range(2)
    }


def test_shapes_keep_the_asymmetries(released):
    tensors = read_tensors(released)
    # GA: chunks of 4 * 24 + 24 + 16 = 136 rows, two block rows each; SWA: 4 * 24 + 2 * 24 + 2 * 16 = 176.
    assert tensors["model.layers.0.self_attn.qkv_proj.weight"].shape == (272, 256)
    assert tensors["model.layers.0.self_attn.qkv_proj.weight_scale_inv"].shape == (4, 2)
    assert tensors["model.layers.1.self_attn.qkv_proj.weight"].shape == (352, 256)
    assert tensors["model.layers.1.self_attn.qkv_proj.weight_scale_inv"].shape == (4, 2)
    assert tensors["model.layers.1.self_attn.attention_sink_bias"].shape == (8,)
    assert "model.layers.5.self_attn.attention_sink_bias" not in tensors
    assert tensors["model.mtp.layers.2.eh_proj.weight"].shape == (256, 512)
    assert tensors["model.embed_tokens.weight"].shape == (2176, 256)


def test_plain_layout_has_a_regular_grid(written):
    tensors = read_tensors(written["fp8", "plain"])
    assert tensors["model.layers.0.self_attn.qkv_proj.weight_scale_inv"].shape == (3, 2)
    assert read_json(written["fp8", "plain"] / "config.json")["attention_projection_layout"] == "fused_qkv"


def test_split_layout_is_flash(written):
    for dtype in ("fp8", "bf16"):
        config = read_json(written[dtype, "split"] / "config.json")
        assert config["model_type"] == "mimo_v2_flash"
        assert config["architectures"] == ["MiMoV2FlashForCausalLM"]
        assert "attention_projection_layout" not in config
    tensors = read_tensors(written["fp8", "split"])
    assert not any("qkv_proj" in name for name in tensors)
    for prefix in ("model.layers.1.", "model.mtp.layers.0."):
        assert tensors[prefix + "self_attn.k_proj.weight"].shape == (96, 256)
        assert tensors[prefix + "self_attn.k_proj.weight_scale_inv"].shape == (1, 2)
        assert tensors[prefix + "self_attn.q_proj.weight_scale_inv"].shape == (2, 2)


def defused(qkv, config, layer, chunks):
    """(q, k, v) of a fused weight whose rows are chunks [Q_c | K_c | V_c]; written from the checkpoint facts."""
    kind = "swa_" if config["hybrid_layer_pattern"][layer] else ""
    heads, kv_heads = config[kind + "num_attention_heads"], config[kind + "num_key_value_heads"]
    rows = [heads * config["head_dim"], kv_heads * config["head_dim"], kv_heads * config["v_head_dim"]]
    pieces = [chunk.split([count // chunks for count in rows]) for chunk in qkv.chunk(chunks)]
    return [torch.cat(parts) for parts in zip(*pieces)]


@pytest.mark.parametrize("layer", [0, 1])
def test_layouts_hold_the_same_model(written, layer):
    name = f"model.layers.{layer}.self_attn."
    split = read_tensors(written["bf16", "split"])
    expected = [split[f"{name}{part}_proj.weight"] for part in "qkv"]
    for layout, chunks in (("fused_qkv", 2), ("plain", 1)):
        config = read_json(written["bf16", layout] / "config.json")
        exact = read_tensors(written["bf16", layout])
        codes = read_tensors(written["fp8", layout])
        weight = codes[name + "qkv_proj.weight"], codes[name + "qkv_proj.weight_scale_inv"]
        rounded = defused(dequantize_chunks(*weight, chunks), config, layer, chunks)
        for got, close, want in zip(
            defused(exact[name + "qkv_proj.weight"], config, layer, chunks), rounded, expected
        ):
            assert torch.equal(got, want)
            assert (close - want).abs().max() < 0.02
        assert torch.equal(exact["lm_head.weight"], split["lm_head.weight"])


def test_stored_values_are_the_generated_ones(written):
    for (dtype, layout), folder in written.items():
        config, stored = read_json(folder / "config.json"), read_tensors(folder)
        values = released_tensors_random(config, layout=layout)
        assert {name for name in stored if not name.endswith("_scale_inv")} == set(values)
        for name, tensor in stored.items():
            if name + "_scale_inv" in stored and "qkv" not in name:
                back = dequantize_blocks(tensor, stored[name + "_scale_inv"])
                assert (back - values[name]).abs().max() <= values[name].abs().max() / 16
            elif tensor.dtype != torch.float8_e4m3fn and not name.endswith("_scale_inv"):
                assert torch.equal(tensor, values[name])
        assert any(name.endswith("_scale_inv") for name in stored) == (dtype == "fp8")
        assert ("quantization_config" in config) == (dtype == "fp8")


def test_values_are_sane():
    tensors = released_tensors_random(released_config())
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all()
        if name.endswith("_proj.weight"):
            assert tensor.float().std() * math.sqrt(tensor.shape[1]) == pytest.approx(1, abs=0.05)
        if name.endswith("norm.weight"):
            assert tensor.float().mean() == pytest.approx(1, abs=0.05)
    assert tensors["model.embed_tokens.weight"].float().std() == pytest.approx(1, abs=0.05)


def test_same_arguments_same_bytes(released, tmp_path):
    def digests(folder):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    again = write_random_checkpoint(tmp_path / "again", with_tokenizer=False)
    other = write_random_checkpoint(tmp_path / "other", seed=1, with_tokenizer=False)
    assert digests(again) == digests(released)
    changed = {name for name, digest in digests(other).items() if digest != digests(released)[name]}
    assert changed == {path.name for path in released.glob("*.safetensors")}


def test_config_is_the_released_text_config(released):
    config = read_json(released / "config.json")
    order = list(config)
    assert order[:3] == ["architectures", "auto_map", "attention_bias"]
    assert order[-3:] == ["vision_end_token_id", "vision_start_token_id", "vocab_size"]
    assert config["layernorm_epsilon"] == 1e-5
    assert config["n_shared_experts"] is None
    assert config["sliding_window"] == config["sliding_window_size"] == config["attention_chunk_size"] == 8
    assert "num_nextn_predict_layers" not in config
    ignored = config["quantization_config"]["ignored_layers"]
    assert ignored[0] == "model.layers.0.self_attn.o_proj"
    assert ignored[-2:] == ["model.layers.7.self_attn.o_proj", "model.decoder.self_attn.o_proj"]
    assert len(ignored) == 9


def test_element_counts_at_the_released_sizes():
    # MiMo-V2.5: 308,778,780,864 text parameters and 987,820,224 in the draft layers.
    pattern = [0, 1, 1, 1, 1, 0] + [1, 1, 1, 1, 1, 0] * 7
    config = released_config(
        overrides={
            "hidden_size": 4096,
            "num_hidden_layers": 48,
            "hybrid_layer_pattern": pattern,
            "moe_layer_freq": [0] + [1] * 47,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 192,
            "v_head_dim": 128,
            "swa_num_attention_heads": 64,
            "swa_num_key_value_heads": 8,
            "swa_head_dim": 192,
            "swa_v_head_dim": 128,
            "intermediate_size": 16384,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "vocab_size": 152576,
        }
    )
    elements = {"text": 0, "mtp": 0}
    for name, shape in random_checkpoint._split_shapes(config):
        elements["mtp" if ".mtp." in name else "text"] += math.prod(shape)
    assert elements == {"text": 308_778_780_864, "mtp": 987_820_224}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    config = released_config(size)
    elements = sum(math.prod(shape) for _, shape in random_checkpoint._split_shapes(config))
    low, high = {"tiny": (0, 12e6), "demo": (30e6, 60e6), "bench": (80e6, 200e6)}[size]
    assert low < elements < high
    chunk = config["num_attention_heads"] // config["num_key_value_heads"] * config["head_dim"]
    assert (chunk + config["head_dim"] + config["v_head_dim"]) % 128
    assert int(config["head_dim"] * config["partial_rotary_factor"]) % 2 == 0


def test_tokenizer_and_ids(tmp_path):
    small_tokenizer = pytest.importorskip("modeling_mimo.conversion.small_tokenizer")
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (folder / name).is_file()
    tokenizer = small_tokenizer.build_small_tokenizer(2048)
    ids = small_tokenizer.special_token_ids(tokenizer)
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    keys = [key for key in config if key.endswith("_token_id")]
    assert len(keys) == 6
    assert {key: config[key] for key in keys} == {key: ids[key] for key in keys}
    assert generation["eos_token_id"] == [ids["pad_token_id"], ids["eos_token_id"], ids["audio_eod_token_id"]]
    assert generation["bos_token_id"] == ids["pad_token_id"]
    assert generation["do_sample"] is False
    assert len(tokenizer) < config["vocab_size"]


def test_overrides(tmp_path):
    changes = {
        "num_hidden_layers": 2,
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "num_nextn_predict_layers": 1,
        "add_full_attention_sink_bias": True,
        "eos_token_id": 7,
    }
    folder = write_random_checkpoint(tmp_path / "x", overrides=changes, with_tokenizer=False)
    config, tensors = read_json(folder / "config.json"), read_tensors(folder)
    assert {key: config[key] for key in changes} == changes
    assert len(config["quantization_config"]["ignored_layers"]) == 3
    assert "model.layers.0.self_attn.attention_sink_bias" in tensors
    assert sum(".mtp." in name for name in tensors) == 16


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="size is 'huge', expected one of tiny, demo, bench"):
        released_config("huge")
    with pytest.raises(ValueError, match="hybrid_layer_pattern has 8 entries, expected num_hidden_layers = 3"):
        released_config(overrides={"num_hidden_layers": 3})
    with pytest.raises(ValueError, match="swa_num_key_value_heads is 3"):
        released_config(overrides={"swa_num_key_value_heads": 3})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(ValueError, match="expected a new or an empty folder"):
        write_random_checkpoint(taken)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ValueError, match="interrupted"):
        write_random_checkpoint(tmp_path / "new")


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(random_checkpoint, "_write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        write_random_checkpoint(tmp_path / "x", with_tokenizer=False)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    assert main([str(tmp_path / "x"), "--dtype", "bf16", "--layout", "split", "--no-tokenizer"]) == 0
    assert "8 files" in capsys.readouterr().out
    assert main([str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example:" in capsys.readouterr().out


# With a vision tower ----------------------------------------------------------------------------------------------


SHIPPED = Path(modeling_mimo.__file__).parent / "data" / "MiMo-V2.5"
STUB_SHA256 = "b269e51b"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("vision") / "seeing", vision=True)


def test_vision_tensors_are_the_released_kinds_in_bfloat16(seeing):
    lines = gzip.decompress((SHIPPED / "tensor_manifest.tsv.gz").read_bytes()).decode("utf-8").splitlines()
    rows = [line.split("\t")[:2] for line in lines if line.startswith("visual.")]
    kinds = {(kind_of(name), dtype) for name, dtype in rows}
    got = {
        (kind_of(name), entry["dtype"])
        for header in read_headers(seeing).values()
        for name, entry in header.items()
        if name.startswith("visual.")
    }
    assert got == kinds


def test_sinks_are_on_windowed_blocks_only(seeing):
    types = read_json(seeing / "config.json")["vision_config"]["vit_window_attn_types"]
    names = read_json(seeing / "model.safetensors.index.json")["weight_map"]
    assert [f"visual.blocks.{block}.attn.sinks" in names for block in range(len(types))] == [k != -1 for k in types]


def test_the_text_model_is_the_same_without_eyes(seeing, released):
    text, both = read_tensors(released), read_tensors(seeing)
    assert all(torch.equal(text[name].view(torch.uint8), both[name].view(torch.uint8)) for name in text)


def test_vision_settings_are_the_released_ones(seeing):
    config, shipped = read_json(seeing / "config.json"), read_json(SHIPPED / "config.json")
    assert [key for key in config if key in shipped] == [key for key in shipped if key in config]
    assert list(config["vision_config"]) == list(shipped["vision_config"])
    ids = {key for key in config["processor_config"] if key.endswith("_token_id")}
    for key, value in shipped["processor_config"].items():
        assert config["processor_config"][key] == (value - 151675 + 2048 if key in ids else value), key
    stub = (seeing / "preprocessor_config.json").read_bytes()
    assert hashlib.sha256(stub).hexdigest().startswith(STUB_SHA256)


def test_flash_has_no_vision():
    with pytest.raises(ValueError, match="expected False with layout 'split'"):
        released_config(layout="split", vision=True)


# MiMo-V2.6 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("mxfp4") / "v2_6", dtype="mxfp4", with_tokenizer=False)


def test_v2_6_differs_in_experts_and_router_alone(mxfp4, released):
    expected = {}
    for name, dtype in released_kinds().items():
        if ".experts." in name:
            expected[name.replace("_scale_inv", "_scale")] = "U8"
        else:
            expected[name] = "BF16" if name.endswith("mlp.gate.weight") else dtype
    kinds = {}
    for header in read_headers(mxfp4).values():
        assert "__metadata__" not in header
        kinds |= {kind_of(name): entry["dtype"] for name, entry in header.items()}
    assert kinds == expected
    ours, others = read_tensors(mxfp4), read_tensors(released)
    for name, tensor in others.items():
        if ".experts." not in name:
            assert torch.equal(tensor.to(ours[name].dtype).view(torch.uint8), ours[name].view(torch.uint8)), name


def test_v2_6_experts_hold_the_generated_values(mxfp4):
    stored, config = read_tensors(mxfp4), read_json(mxfp4 / "config.json")
    values = released_tensors_random(config)
    for name in (name for name in stored if ".experts." in name and name.endswith(".weight")):
        rows, columns = values[name].shape
        assert stored[name].shape == (rows, columns // 2)
        assert stored[name + "_scale"].shape == (rows, columns // 32)
        difference = (dequantize_mxfp4(stored[name], stored[name + "_scale"]) - values[name]).abs()
        # half a step of e2m1 is at most a quarter of the value, or a quarter of a scale of the largest / 4
        assert (difference <= torch.maximum(values[name].abs() / 4, values[name].abs().amax() / 14)).all()


def test_v2_6_config_has_the_released_keys_and_values(mxfp4):
    config = read_json(mxfp4 / "config.json")
    shipped = read_json(SHIPPED.parent / "MiMo-V2.6-Flash-RL" / "config.json")
    # text only, as everywhere here without `vision`
    assert config.keys() == shipped.keys() - {"vision_model_type"}
    sizes = {*SIZES["tiny"], "num_hidden_layers", "moe_layer_freq", "sliding_window_size", "attention_chunk_size"}
    for key in config.keys() - sizes:
        if key.endswith("_token_id"):
            assert config[key] == (None if shipped[key] is None else shipped[key] - 151675 + 2048), key
        elif not key.startswith("swa_") or key == "swa_rope_theta":
            entry, other = config[key], shipped[key]
            if key == "quantization_config":
                entry, other = ({k: v for k, v in part.items() if k != "ignored_layers"} for part in (entry, other))
            assert entry == other, key


def test_v2_6_is_never_split(tmp_path, capsys):
    with pytest.raises(ValueError, match="dtype is 'mxfp4', expected fp8 or bf16 with layout 'split'"):
        released_config(dtype="mxfp4", layout="split")
    assert main([str(tmp_path / "x"), "--dtype", "mxfp4", "--no-tokenizer"]) == 0
    assert read_json(tmp_path / "x" / "config.json")["quantization_config"]["store_dtype"] == "mxfp4"
    assert "8 files" in capsys.readouterr().out
