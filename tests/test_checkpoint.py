import functools
import json
import math
from pathlib import Path

import pytest
import torch
from patience import counted_calls
from safetensors.torch import save_file

from modeling_mimo.checkpoint_mimo_v2 import (
    DTYPE_BITS,
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    TensorInfo,
    check_tensors,
    read_header,
    take_mtp_layers_from_files,
)
from modeling_mimo.cli.releases import shipped_config, shipped_manifest
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


GLOBAL_QKV = "model.layers.0.self_attn.qkv_proj.weight"
SLIDING_QKV = "model.layers.1.self_attn.qkv_proj.weight"


def tiny_config(**overrides):
    """Global qkv: 2 chunks of 136 rows, so 4 scale rows chunked and 3 plain; sliding: 2 x 256, 4 either way."""
    values = {
        "vocab_size": 32,
        "hidden_size": 160,
        "intermediate_size": 136,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "swa_num_key_value_heads": 8,
        "head_dim": 24,
        "v_head_dim": 16,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "num_mtp_layers": 1,
    }
    return MiMoV2Config(**(values | overrides))


def info(dtype, shape):
    return TensorInfo(dtype, tuple(shape), math.prod(shape) * DTYPE_BITS[dtype] // 8, Path("a.safetensors"))


def tensors_of(config, layout="chunked", fp8=True):
    tensors = {}
    for name, spec in released_tensors(config, layout).items():
        tensors[name] = info("F8_E4M3" if fp8 and spec.quantized else "BF16", spec.shape)
        if fp8 and spec.quantized:
            tensors[f"{name}_scale_inv"] = info("F32", spec.scale_shape)
    return tensors


@functools.cache
def v2_5():
    return shipped_config("MiMo-V2.5"), shipped_manifest("MiMo-V2.5")


def write_raw(path, header, data_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


# ---- headers


def test_header_of_a_file_the_library_wrote(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert read_header(path) == {
        "a": TensorInfo("BF16", (3, 5), 30, path),
        "b": TensorInfo("F8_E4M3", (2,), 2, path),
        "scalar": TensorInfo("F32", (), 4, path),
        "empty": TensorInfo("F32", (0, 4), 0, path),
    }


def test_header_without_metadata_and_with_trailing_spaces(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", json.dumps({"a": entry(0, 8)}).encode() + b"   ", 8)
    assert read_header(path)["a"].nbytes == 8


GALLERY = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "expected data offset 8, got 4 .an overlap"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "expected data offset 8, got 12 .a hole"),
    "hole in front": ({"a": entry(4, 8)}, 8, "expected data offset 0, got 4 .a hole"),
    "truncated": ({"a": entry(0, 8)}, 7, "expected 8 bytes of tensor data, got 7 .truncated"),
    "too long": ({"a": entry(0, 8)}, 9, "expected 8 bytes of tensor data, got 9 .bytes that no tensor owns"),
    "shape": ({"a": entry(0, 8, shape=[3])}, 8, "expected two data_offsets 12 bytes apart .F32 .3.., got .0, 8"),
    "backwards": ({"a": entry(8, 0, shape=[2])}, 8, "expected two data_offsets 8 bytes apart"),
    "dtype": ({"a": entry(0, 8, dtype="F8")}, 8, "expected a dtype out of .*, got 'F8'"),
    "dtype kind": ({"a": entry(0, 8, dtype=[8])}, 8, r"expected a dtype out of .*, got \[8\]"),
    "half a byte": ({"a": entry(0, 1, dtype="F4", shape=[1])}, 1, "expected two data_offsets 0.5 bytes apart"),
    "negative": ({"a": entry(0, 8, shape=[-2])}, 8, "expected shape as a list of non-negative ints, got .-2"),
    "bool": ({"a": entry(0, 4, shape=[True])}, 4, "expected shape as a list of non-negative ints, got .True"),
    "float": ({"a": entry(0.0, 4.0, shape=[1])}, 4, "expected data_offsets as a list of non-negative ints"),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "expected dtype, shape and data_offsets, got"),
    "not an entry": ({"a": 3}, 4, "expected dtype, shape and data_offsets, got 3"),
    "not an object": (b"[1, 2]", 0, "expected a JSON object, got list"),
    "bad json": (b'{"a": ', 0, "expected a JSON object without duplicate keys, got"),
    "not utf-8": (b'{"\xff": 1}', 0, "expected a JSON object without duplicate keys, got 'utf-8'"),
    "deep": (b"[" * 200_000, 0, "expected a JSON object without duplicate keys, got"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", 0, "expected a JSON object without duplicate keys, got"),
    "duplicate": (
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        8,
        "duplicate key 'a'",
    ),
    "duplicate inside": (b'{"a": {"dtype": "F32", "shape": [1], "shape": [2]}}', 8, "duplicate key 'shape'"),
}


@pytest.mark.parametrize("case", GALLERY)
def test_a_broken_header_is_one_line_that_names_the_file(tmp_path, case):
    header, data_bytes, message = GALLERY[case]
    path = write_raw(tmp_path / "broken.safetensors", header, data_bytes)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at least 8 bytes, got 0 bytes"),
        (b"1234567", "at least 8 bytes, got 7 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "header of at most 2 bytes, got length 3"),
        (b"\xff" * 8 + b"{}", "header of at most 2 bytes, got length 18446744073709551615"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 34369159872\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_safetensors_file(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    with pytest.raises(ValueError, match="at most 100000000 bytes, got length 1099511627776"):
        read_header(path)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}: expected a safetensors file"):
            read_header(path)


# ---- folders and indices


@pytest.fixture
def folder(tmp_path):
    """Weight and scale in different files, as in the release."""
    write_raw(tmp_path / "a.safetensors", {"w": entry(0, 8)}, 8)
    write_raw(tmp_path / "b.safetensors", {"w_scale_inv": entry(0, 4), "x": entry(4, 8)}, 8)
    return set_index(tmp_path, {"w": "a.safetensors", "w_scale_inv": "b.safetensors", "x": "b.safetensors"})


def set_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return folder


def test_a_folder_with_an_index(folder):
    checkpoint = Checkpoint.from_folder(folder)
    assert checkpoint.files == [folder / "a.safetensors", folder / "b.safetensors"]
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
        "w": "a.safetensors",
        "w_scale_inv": "b.safetensors",
        "x": "b.safetensors",
    }
    assert Checkpoint.from_files(checkpoint.files) == checkpoint


def test_progress_sees_every_file(folder):
    seen = []
    Checkpoint.from_folder(folder, lambda files: (seen.append(file.name) or file for file in files))
    assert seen == ["a.safetensors", "b.safetensors"]


def test_a_folder_with_one_file_and_one_without(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors\.index\.json or model"):
        Checkpoint.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Checkpoint.from_folder(tmp_path / "absent")
    write_raw(tmp_path / "model.safetensors", {"w": entry(0, 8)}, 8)
    assert set(Checkpoint.from_folder(tmp_path).tensors) == {"w"}


def test_links_as_in_the_hub_cache(folder, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert set(Checkpoint.from_folder(snapshot).tensors) == {"w", "w_scale_inv", "x"}


@pytest.mark.parametrize("outside", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", "", "sub\\b"])
def test_an_index_that_points_outside(folder, outside):
    # the file exists, so that nothing but the check refuses it
    write_raw(folder.parent / "b.safetensors", {"y": entry(0, 8)}, 8)
    set_index(folder, {"w": "a.safetensors", "y": outside})
    with pytest.raises(ValueError, match=r"expected plain file names, got paths \(1\): y -> "):
        Checkpoint.from_folder(folder)


def test_all_contradictions_of_an_index_in_one_error(folder):
    write_raw(folder / "b.safetensors", {"w": entry(0, 8), "x": entry(8, 12), "z": entry(12, 16)}, 16)
    set_index(folder, {"w": "a.safetensors", "x": "a.safetensors", "y": "b.safetensors", "gone": "gone.safetensors"})
    with pytest.raises(ValueError, match="tensors in two files") as caught:
        Checkpoint.from_folder(folder)
    message = str(caught.value)
    assert "1 tensors in two files: w (a.safetensors, b.safetensors)." in message
    assert "gone.safetensors: expected a safetensors file, got nothing" in message
    assert "x (a.safetensors), y (b.safetensors)" in message
    assert "does not list (1): z (b.safetensors)" in message
    assert "gone (gone" not in message


def test_every_broken_shard_is_named(folder):
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a.safetensors: .*; .*b.safetensors: ") as caught:
        Checkpoint.from_folder(folder)
    assert len(caught.value.problems) == 2
    assert "\n" not in str(caught.value)


def test_long_lists_are_cut(folder):
    set_index(folder, {f"t{index}": "a.safetensors" for index in range(250)})
    with pytest.raises(ValueError, match=r"t199 \(a\.safetensors\) and 50 more"):
        Checkpoint.from_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "without duplicate keys"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "duplicate key 'w'"),
        ('{"weight_map": {"w": 3}}', "expected `weight_map` as an object of file names"),
        ("{}", "expected `weight_map` as an object of file names"),
    ],
)
def test_a_broken_index(folder, text, message):
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        Checkpoint.from_folder(folder)


def test_from_files_checks_the_index_beside_them(folder):
    with pytest.raises(ValueError, match=r"were not given \(1\): b.safetensors"):
        Checkpoint.from_files([folder / "a.safetensors"])
    # a single file with another set's index beside it
    write_raw(folder / "model.safetensors", {"y": entry(0, 8)}, 8)
    assert set(Checkpoint.from_files([str(folder / "model.safetensors")]).tensors) == {"y"}
    with pytest.raises(ValueError, match="at least one"):
        Checkpoint.from_files([])


def test_slices_read_rows(tmp_path):
    weight = torch.arange(12, dtype=torch.float32).view(4, 3)
    save_file({"w": weight, "b": torch.ones(2)}, tmp_path / "model.safetensors")
    slices = Checkpoint.from_folder(tmp_path).slices()
    assert set(slices) == {"w", "b"}
    assert not isinstance(slices["w"], torch.Tensor)
    assert torch.equal(slices["w"][:], weight)
    assert torch.equal(slices["w"][1:3], weight[1:3])


# ---- headers against the config


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("projection", ["fused_qkv", "split"])
def test_complete_checkpoints(fp8, projection):
    config = tiny_config(attention_projection_layout=projection)
    tensors = tensors_of(config, fp8=fp8)
    report = check_tensors(config, tensors)
    assert report.fp8 is fp8
    assert report.not_loaded == {}
    assert "no MTP heads" not in str(report)
    assert sum(part["tensors"] for part in report.parts.values()) == len(tensors)
    assert sum(part["bytes"] for part in report.parts.values()) == sum(info.nbytes for info in tensors.values())
    weights = released_tensors(config).values()
    parameters = sum(part["parameters"] for part in report.parts.values())
    assert parameters == sum(math.prod(spec.shape) for spec in weights)
    assert report.parts["router"]["tensors"] == 4


@pytest.mark.parametrize(
    ("layout", "asked", "fp8", "found", "source"),
    [
        ("chunked", None, True, "chunked", "scale grid of 2 layers"),
        ("plain", None, True, "plain", "scale grid of 2 layers"),
        ("plain", "plain", True, "plain", "scale grid of 2 layers"),
        ("chunked", None, False, "chunked", "released rule (shapes do not decide)"),
        ("chunked", "plain", False, "plain", "config.fused_qkv_layout"),
        ("chunked", "chunked", False, "chunked", "config.fused_qkv_layout"),
    ],
)
def test_the_layout_and_what_decided_it(layout, asked, fp8, found, source):
    config = tiny_config(fused_qkv_layout=asked)
    report = check_tensors(config, tensors_of(config, layout, fp8))
    assert (report.layout, report.layout_source) == (found, source)
    assert str(report).startswith(f"layout: {found}, from: {source}\n")


def test_split_needs_no_detection():
    config = tiny_config(attention_projection_layout="split")
    report = check_tensors(config, tensors_of(config))
    assert (report.layout, report.layout_source) == ("split", "separate q/k/v tensors")


@pytest.mark.parametrize(("layout", "asked"), [("chunked", "plain"), ("plain", "chunked")])
def test_an_override_that_the_grid_contradicts(layout, asked):
    config = tiny_config(fused_qkv_layout=asked)
    with pytest.raises(ValueError, match=f"`fused_qkv_layout`: expected '{layout}'.* 2 layers shows, got '{asked}'"):
        check_tensors(config, tensors_of(config, layout))


def test_layers_that_contradict_each_other():
    config = tiny_config()
    tensors = tensors_of(config)
    tensors[f"{GLOBAL_QKV}_scale_inv"] = info("F32", (3, 2))
    with pytest.raises(ValueError, match=r"'chunked' in 1 \(model.layers.2\) and 'plain' in 1 \(model.layers.0\)"):
        check_tensors(config, tensors)


@pytest.mark.parametrize(("said", "is_in_files"), [("fused_qkv", "split"), ("split", "fused_qkv")])
def test_the_hint_names_the_config_field(said, is_in_files):
    tensors = tensors_of(tiny_config(attention_projection_layout=is_in_files), fp8=False)
    with pytest.raises(ValueError, match=rf'hint: .* pass attention_projection_layout="{is_in_files}"'):
        check_tensors(tiny_config(attention_projection_layout=said), tensors)


def test_all_problems_in_one_error():
    config = tiny_config()
    tensors = tensors_of(config)
    del tensors["model.norm.weight"], tensors[f"{SLIDING_QKV}_scale_inv"]
    tensors["model.extra"] = info("BF16", (1,))
    tensors["lm_head.weight"] = info("BF16", (31, 160))
    tensors[f"{GLOBAL_QKV}_scale_inv"] = info("BF16", (4, 2))
    tensors["model.layers.0.self_attn.o_proj.weight"] = info("F8_E4M3", (160, 128))
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = info("F32", (2, 1))
    with pytest.raises(CheckpointError, match="do not match") as caught:
        check_tensors(config, tensors)
    assert "\n" not in str(caught.value)
    assert caught.value.problems == [
        "the files do not match the config",
        f"missing (2): model.norm.weight, {SLIDING_QKV}_scale_inv",
        "unknown (1): model.extra",
        "mis-shaped (expected, got) (2): lm_head.weight ([32, 160], [31, 160]), "
        "model.layers.0.mlp.up_proj.weight_scale_inv ([2, 2], [2, 1])",
        f"wrong dtype (expected, got) (2): {GLOBAL_QKV}_scale_inv (F32, BF16), "
        "model.layers.0.self_attn.o_proj.weight (F32 or BF16 or F16, F8_E4M3)",
    ]


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "F8_E5M2"])
def test_dtypes_that_no_weight_has(dtype):
    config = tiny_config()
    tensors = tensors_of(config, fp8=False)
    tensors[GLOBAL_QKV] = info(dtype, tensors[GLOBAL_QKV].shape)
    with pytest.raises(ValueError, match=rf"wrong dtype \(expected, got\) \(1\): {GLOBAL_QKV} .*, {dtype}\)"):
        check_tensors(config, tensors)


def test_a_scale_without_fp8_is_unknown():
    config = tiny_config()
    tensors = tensors_of(config, fp8=False)
    tensors[f"{SLIDING_QKV}_scale_inv"] = info("F32", (4, 2))
    with pytest.raises(ValueError, match=rf"unknown \(1\): {SLIDING_QKV}_scale_inv"):
        check_tensors(config, tensors)


@pytest.mark.parametrize("part", ["mtp", "vision", "audio"])
def test_a_part_that_is_left_out_is_missing_as_a_whole_or_not_at_all(part):
    config, tensors = v2_5()[0], dict(v2_5()[1])
    names = [name for name, spec in released_tensors(config).items() if spec.part == part and not spec.quantized]
    assert check_tensors(config, tensors, (part,)).not_loaded.keys() == {part}
    prefixes = {"mtp": "model.mtp.", "vision": "visual.", "audio": ("audio_encoder.", "speech_embeddings.")}
    without = {name: value for name, value in tensors.items() if not name.startswith(prefixes[part])}
    assert len(without) < len(tensors)
    report = check_tensors(config, without, (part,))
    assert part not in report.parts
    assert report.not_loaded == {}
    with pytest.raises(ValueError, match=r"missing .*hint: "):
        check_tensors(config, without)
    del tensors[names[0]]
    with pytest.raises(ValueError, match=rf"missing \(1\): {names[0]}$"):
        check_tensors(config, tensors, (part,))
    tensors[names[0]] = info("BF16", (1, 2, 3))
    with pytest.raises(ValueError, match=r"mis-shaped .* \(1\): "):
        check_tensors(config, tensors, (part,))


@pytest.mark.parametrize(
    ("said", "in_files", "taken"), [(None, 0, 0), (None, 2, 2), (None, 3, 3), (None, 4, 3), (2, 1, 2), (0, 3, 0)]
)
def test_files_decide_how_many_heads_there_are_where_the_config_is_silent(said, in_files, taken):
    config, tensors = tiny_config(num_mtp_layers=said), tensors_of(tiny_config(num_mtp_layers=in_files))
    take_mtp_layers_from_files(config, tensors)
    assert config.num_mtp_layers == taken
    if taken == in_files:
        report = check_tensors(config, tensors)
        assert ("no MTP heads in the files" in str(report)) == (in_files == 0)
    else:
        with pytest.raises(ValueError, match=r"(missing|unknown) \(\d+\): model\.mtp\."):
            check_tensors(config, tensors)


def test_files_without_heads_of_a_config_that_has_some():
    with pytest.raises(ValueError, match=r"hint: the files have no MTP heads: pass load_mtp=False"):
        check_tensors(tiny_config(num_mtp_layers=1), tensors_of(tiny_config(num_mtp_layers=0)))


def test_the_release_passes_with_little_work_and_one_row_less_fails():
    config, tensors = v2_5()[0], dict(v2_5()[1])
    report, calls = counted_calls(lambda: check_tensors(config, tensors))
    # 7 for each
    assert calls < 15 * len(tensors)
    assert (report.layout, report.layout_source, report.fp8) == ("chunked", "scale grid of 9 layers", True)
    assert report.parts["experts"]["parameters"] == 302_795_194_368
    assert report.parts["mtp"]["bytes"] == 1_189_400_448
    assert sum(part["bytes"] for part in report.parts.values()) == 315_031_102_208
    name = "model.layers.5.self_attn.qkv_proj.weight_scale_inv"
    tensors[name] = info("F32", (107, 32))
    with pytest.raises(ValueError, match=rf"\(1\): {name} \(\[108, 32\], \[107, 32\]\)"):
        check_tensors(config, tensors)
