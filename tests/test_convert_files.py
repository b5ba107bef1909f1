"""What a conversion writes beside the numbers: names, files, config.json; and what it refuses to begin with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_convert import INDEX, as_bytes, digests, read_json, read_tensors, same_tensors, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mimo.checkpoint_mimo_v2 import Checkpoint, read_header
from modeling_mimo.conversion import shard_writer
from modeling_mimo.conversion.checkpoint import SafetensorsSource, open_headers, open_source
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert
from modeling_mimo.conversion.converters import PARTS, plan_conversions
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

MTP_FILE = "model_mtp.safetensors"
VISION, AUDIO = ("visual.",), ("speech_embeddings.", "audio_encoder.")
SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"


def run(*arguments, **options):
    return convert(*arguments, progress=False, **options)


@pytest.fixture
def source(checkpoints, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(checkpoints["fp8_fused"], tmp_path / "source")


def rewrite(folder, name, change):
    """Writes the file that holds tensor `name` again, after `change(tensors)`, and the index to it."""
    index = read_json(folder, INDEX)
    file = index["weight_map"][name]
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    kept = {key: value for key, value in index["weight_map"].items() if value != file}
    index["weight_map"] = kept | dict.fromkeys(tensors, file)
    write_json(folder, index, INDEX)


def test_a_round_trip_gives_the_same_tensors(checkpoints, tmp_path):
    source = checkpoints["fp8_omni"]
    run(source, tmp_path / "hub", shard_size="1MB")
    run(tmp_path / "hub", tmp_path / "xiaomi", to="xiaomi")
    run(tmp_path / "xiaomi", tmp_path / "again")
    for folder in ("hub", "xiaomi", "again"):
        assert same_tensors(source, tmp_path / folder)
    # the entry that names remote code is all that is lost
    before, after = read_json(source), read_json(tmp_path / "xiaomi")
    del before["auto_map"]
    assert before == after
    assert list(before) == list(after)
    assert read_json(source, INDEX)["metadata"] == read_json(tmp_path / "xiaomi", INDEX)["metadata"]


def test_a_released_folder_stays_the_same_files(checkpoints, tmp_path):
    source = shutil.copytree(checkpoints["fp8_omni"], tmp_path / "source")
    for name in ("modeling_mimo_v2.py", "README.md", "LICENSE"):
        (source / name).write_text(name)
    (source / "dflash").mkdir()
    (source / "dflash" / "mask_embedding.pt").write_bytes(b"bytes that nobody opens")
    report = run(source, tmp_path / "out", to="xiaomi")
    assert digests(source) == digests(tmp_path / "out")
    assert report.changes == []
    assert {file["name"]: file["sha256"] for file in report.files}.items() <= digests(source).items()


def test_ranks_share_the_experts_and_rank_0_has_the_rest(checkpoints, tmp_path):
    run(checkpoints["fp8_fused"], tmp_path / "hub")
    run(tmp_path / "hub", tmp_path / "out", to="xiaomi", shard_size="200KB")
    weight_map = read_json(tmp_path / "out", INDEX)["weight_map"]
    assert list(weight_map) == sorted(weight_map)
    for name, file in weight_map.items():
        if name.startswith("model.mtp."):
            assert file == MTP_FILE
        elif ".experts." in name:
            assert file.startswith(f"model_pp0_ep{name.split('.')[5]}_shard")
        else:
            assert file == max(each for each in weight_map.values() if "_ep0_" in each)
    # the first file of a rank ends with the first tensor past the limit: 98,816 bytes per expert, gate, up and down
    first = {name for name, file in weight_map.items() if file == "model_pp0_ep5_shard0.safetensors"}
    header = read_header(tmp_path / "out" / "model_pp0_ep5_shard0.safetensors")
    assert sum(info.nbytes for info in header.values()) > 2e5
    assert {name.split(".")[2] for name in first} == {"1", "2", "3"}
    assert "model.layers.3.mlp.experts.5.gate_proj.weight" in first
    assert "model.layers.3.mlp.experts.5.up_proj.weight" not in first


def test_hub_shards_are_standard_and_small(checkpoints, tmp_path):
    report = run(checkpoints["fp8_fused"], tmp_path / "out", shard_size="1MB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)]
    index, tensors = read_json(tmp_path / "out", INDEX), Checkpoint.from_folder(tmp_path / "out").tensors
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in tensors.values()) == report.total_size
    for file in files:
        header = read_header(tmp_path / "out" / file)
        assert len(header) == 1 or sum(info.nbytes for info in header.values()) <= 10**6
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    for name, file in index["weight_map"].items():
        if name.endswith("_scale_inv"):
            assert index["weight_map"][name.removesuffix("_scale_inv")] == file


@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4"])
def test_the_quantization_entry_names_exactly_what_is_not_quantized(checkpoints, tmp_path, dtype):
    run(checkpoints["fp8_omni"], tmp_path / "out", dtype=dtype)
    tensors = read_tensors(tmp_path / "out")
    entry = read_json(tmp_path / "out").get("quantization_config")
    scaled = {name.rpartition("_scale")[0] for name in tensors if "_scale" in name}
    plain = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    plain = {name for name in plain if tensors[f"{name}.weight"].dim() > 1 and f"{name}.weight" not in scaled}
    assert {"lm_head", "model.mtp.layers.1.eh_proj", "model.mtp.layers.0.self_attn.o_proj"} <= plain
    if dtype == "bf16":
        assert entry is None
        assert not scaled
    else:
        assert set(entry["ignored_layers"]) == set(entry["modules_to_not_convert"]) == plain
        assert entry["store_dtype"] == {"keep": "fp8"}.get(dtype, dtype)
        assert entry.get("mxfp4_block_size") == (32 if dtype == "mxfp4" else None)


def test_a_quantized_release_gets_the_released_entry(checkpoints, tmp_path):
    run(checkpoints["bf16_fused"], tmp_path / "out", to="xiaomi", dtype="fp8")
    expected, got = (read_json(folder) for folder in (checkpoints["fp8_fused"], tmp_path / "out"))
    assert expected == got
    assert read_json(tmp_path / "out", INDEX)["metadata"]["save_format"] == "fp8"


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_float_targets_are_float_but_for_the_router(checkpoints, tmp_path, dtype, name):
    run(checkpoints["fp8_omni"], tmp_path / "out", dtype=dtype)
    for tensor, value in read_tensors(tmp_path / "out").items():
        assert value.dtype == (torch.float32 if ".mlp.gate." in tensor else getattr(torch, name))
    assert read_json(tmp_path / "out")["dtype"] == name


def test_companions_of_the_hub_format(tmp_path):
    source = write_random_checkpoint(tmp_path / "source", "tiny", vision=True)
    (source / "modeling_mimo_v2.py").write_text("raise RuntimeError")
    template = source / "chat_template.jinja"
    template.unlink(missing_ok=True)
    settings = read_json(source, "tokenizer_config.json")
    settings.pop("chat_template", None)
    write_json(source, settings, "tokenizer_config.json")
    report = run(source, tmp_path / "out")
    out = tmp_path / "out"
    assert "Hello" in AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "README.md").read_text().startswith("---")
    assert not list(out.glob("*.py"))
    assert "auto_map" not in read_json(out)
    assert any("modeling_mimo_v2.py" in line for line in report.changes)
    # a template of the source stays
    write_json(source, settings | {"chat_template": "{{ messages }}"}, "tokenizer_config.json")
    run(source, tmp_path / "kept")
    assert not (tmp_path / "kept" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("only", "gone"),
    [
        ("text", ("model.mtp.", *VISION, *AUDIO)),
        ("text,mtp", (*VISION, *AUDIO)),
        (["text", "vision"], ("model.mtp.", *AUDIO)),
        ("text,mtp,audio", VISION),
    ],
)
def test_parts_that_are_left_out_are_not_in_the_config(checkpoints, tmp_path, only, gone):
    report = run(checkpoints["fp8_omni"], tmp_path / "out", only=only)
    tensors = read_tensors(tmp_path / "out")
    everything = read_tensors(checkpoints["fp8_omni"])
    assert tensors.keys() == {name for name in everything if not name.startswith(gone)}
    config = read_json(tmp_path / "out")
    assert ("vision_config" in config) == ("visual." not in gone)
    assert ("audio_config" in config) == ("audio_encoder." not in gone) == (tmp_path / "out/audio_tokenizer").exists()
    assert config.get("num_nextn_predict_layers", 3) == (0 if "model.mtp." in gone else 3)
    assert any("left out: the tensors of" in line for line in report.changes)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("to", ["hub", "xiaomi"])
def test_the_mtp_heads_alone(checkpoints, tmp_path, to):
    report = run(checkpoints["fp8_omni"], tmp_path / "out", to=to, only="mtp")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MTP_FILE, INDEX, "config.json"}
    tensors = read_tensors(tmp_path / "out")
    assert len(tensors) == 48
    assert set(read_json(tmp_path / "out", INDEX)["weight_map"]) == set(tensors)
    assert any("from_pretrained needs the rest" in line for line in report.changes)
    with pytest.raises(ValueError, match="missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_part_that_is_not_there_is_an_error(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"only: expected parts that .* has, got vision"):
        run(checkpoints["fp8_fused"], tmp_path / "out", only="text,vision")
    with pytest.raises(ValueError, match="only: expected some of text, mtp, vision, audio, got 'smell'"):
        run(checkpoints["fp8_fused"], tmp_path / "out", only="smell")


def drop_scale(folder):
    rewrite(folder, SCALE, lambda tensors: tensors.pop(SCALE))


def add_unknown(folder):
    rewrite(folder, SCALE, lambda tensors: tensors.update({"model.layers.0.surprise.weight": torch.zeros(2)}))


def misshape(folder):
    rewrite(folder, SCALE, lambda tensors: tensors.update({SCALE: torch.ones(3, 2)}))


def climb_out(folder):
    index = read_json(folder, INDEX)
    index["weight_map"][SCALE] = "../elsewhere.safetensors"
    write_json(folder, index, INDEX)


def link_out(folder):
    file = read_json(folder, INDEX)["weight_map"][SCALE]
    shutil.move(folder / file, folder.parent / "elsewhere.safetensors")
    (folder / file).symlink_to(folder.parent / "elsewhere.safetensors")


def link_a_companion(folder):
    (folder.parent / "secret").write_text("secret")
    (folder / "vocab.txt").symlink_to(folder.parent / "secret")


def add_weights(folder):
    save_file({"model.layers.9.weight": torch.zeros(2)}, folder / "consolidated.safetensors")


def other_model(folder):
    write_json(folder, read_json(folder) | {"model_type": "llama"})


def bomb(folder):
    write_json(folder, read_json(folder) | {"num_nextn_predict_layers": 10**9})


def nested_bomb(folder):
    (folder / "config.json").write_text("[" * 10**5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_scale, rf"missing \(1\): {SCALE}"),
        (add_unknown, r"unknown \(1\): model.layers.0.surprise.weight"),
        (misshape, rf"mis-shaped .*{SCALE}"),
        (climb_out, "expected a file inside"),
        (link_out, "expected a file inside"),
        (link_a_companion, "vocab.txt: expected a file inside"),
        (add_weights, "consolidated.safetensors"),
        (other_model, "`model_type`: expected 'mimo_v2' or 'mimo_v2_flash', got 'llama'"),
        (bomb, "expected at most"),
        (nested_bomb, "expected a JSON object"),
    ],
)
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_a_bad_source_stops_before_the_first_byte(source, tmp_path, spoil, message, dtype):
    spoil(source)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        run(source, tmp_path / "out", dtype=dtype)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "to: expected one of hub, xiaomi"),
        ({"dtype": "int4"}, "dtype: expected one of keep"),
        ({"to": "xiaomi", "layout": "split"}, "layout: expected fused for xiaomi"),
        ({"shard_size": "5 apples"}, "shard_size: expected a size such as"),
        ({"jobs": 0}, "jobs: expected at least 1"),
        ({"max_memory": "1KB"}, r"max_memory: expected at least \d+ bytes for "),
    ],
)
def test_bad_options_stop_before_the_first_byte(checkpoints, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoints["fp8_fused"], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_value_that_float16_cannot_hold_is_named(source, tmp_path):
    name = "model.norm.weight"
    rewrite(source, name, lambda tensors: tensors[name].__setitem__(3, 1e5))
    with pytest.raises(ValueError, match=f"{name}: expected values that float16 holds"):
        run(source, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    rewrite(source, name, lambda tensors: tensors[name].fill_(1e4))
    shutil.rmtree(tmp_path / "out.partial")
    with pytest.raises(ValueError, match="float16 holds"):
        run(source, tmp_path / "out", dtype="fp16")


def test_a_scale_that_is_no_number_is_named(source, tmp_path):
    rewrite(source, SCALE, lambda tensors: tensors[SCALE].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{SCALE}: expected finite, non-negative scales"):
        run(source, tmp_path / "out", dtype="bf16")


def test_processing_leaves_its_inputs_alone(checkpoints):
    for form in ("fp8_plain", "fp8_fused", "fp8_split", "bf16_fused"):
        source = SafetensorsSource(checkpoints[form])
        for dtype, layout in (("keep", "split"), ("keep", "fused"), ("fp8", None), ("bf16", None)):
            plan = plan_conversions(source, "hub", dtype, layout, PARTS)
            for conversion in [item for item in plan.conversions if item.sizes is not None][:3]:
                inputs = {name: source.read(name) for name in conversion.inputs}
                before = {name: as_bytes(tensor).clone() for name, tensor in inputs.items()}
                conversion.process(inputs)
                for name, tensor in inputs.items():
                    assert torch.equal(as_bytes(tensor), before[name]), (form, dtype, layout, name)


def test_reported_errors_are_those_of_the_files(checkpoints, tmp_path):
    report = run(checkpoints["bf16_fused"], tmp_path / "out", dtype="fp8", shard_size="1MB")
    before, after = read_tensors(checkpoints["bf16_fused"]), read_tensors(tmp_path / "out")
    differences, magnitudes = [], []
    for name in before:
        if name.endswith("down_proj.weight") and ".experts." in name:
            scale = after[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            value = after[name].float() * scale[: after[name].shape[0], : after[name].shape[1]]
            differences.append((value - before[name].float()).abs().flatten())
            magnitudes.append(before[name].float().abs().flatten())
    difference, magnitude = torch.cat(differences).double(), torch.cat(magnitudes).double()
    error = report.errors["experts.down_proj"]
    assert error["tensors"] == len(differences) == 56
    assert error["max_relative"] == pytest.approx((difference.max() / magnitude.max()).item())
    assert error["mean_relative"] == pytest.approx((difference.mean() / magnitude.mean()).item())


def test_files_are_laid_out_as_by_the_library(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "a": torch.randint(0, 256, (4,), dtype=torch.uint8),
        "d": torch.randn(2),
        "c": torch.randn(2, 2).bfloat16(),
        "é": torch.tensor(1.5, dtype=torch.float16),
    }
    dtypes = {"a": "U8", "b": "F8_E4M3", "c": "BF16", "d": "F32", "é": "F16"}
    planned = {name: shard_writer.Planned(dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    for number, metadata in enumerate((None, {"format": "pt"})):
        path = tmp_path / str(number)
        writer = shard_writer.ShardWriter(path, planned, metadata)
        for name in ("c", "a", "é", "b", "d"):
            writer.write(name, tensors[name])
        assert not path.exists()
        digest = writer.finish()
        assert path.read_bytes() == save(tensors, metadata)
        assert digests(tmp_path)[path.name] == digest


def test_a_file_with_a_hole_is_not_finished(tmp_path):
    planned = {name: shard_writer.Planned("F32", (4, 2)) for name in ("one", "two")}
    writer = shard_writer.ShardWriter(tmp_path / "file", planned)
    writer.write("one", torch.zeros(4, 2))
    writer.write_rows("two", torch.zeros(2, 2), 2)
    with pytest.raises(ValueError, match="expected every planned tensor once, got only a part of two"):
        writer.finish()
    with pytest.raises(ValueError, match="one: expected F32"):
        writer.write("one", torch.zeros(4, 3))
    writer.close()
    assert not (tmp_path / "file").exists()


def test_a_repository_of_the_hub_is_a_source(checkpoints, tmp_path, monkeypatch):
    # what a download leaves in the cache: links into blobs
    commit = "1" * 40
    repository = tmp_path / "cache" / "models--someone--mimo"
    snapshot = repository / "snapshots" / commit
    for directory in (snapshot, repository / "refs", repository / "blobs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(Path(checkpoints["fp8_fused"]).iterdir())):
        shutil.copyfile(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))
    report = run("someone/mimo", tmp_path / "out")
    assert (report.source, report.revision) == ("someone/mimo", commit)
    assert same_tensors(checkpoints["fp8_fused"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="someone/else: expected a folder or a reachable Hub repository"):
        open_source("someone/else")
    with pytest.raises(FileNotFoundError, match="expected a folder or a Hub repository `owner/name`"):
        open_source(tmp_path / "nowhere")


def test_shards_may_be_one_file_without_an_index(tmp_path, checkpoints):
    tensors = read_tensors(checkpoints["fp8_fused"])
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(checkpoints["fp8_fused"] / "config.json", tmp_path / "config.json")
    run(tmp_path, tmp_path.parent / "single_out")
    assert same_tensors(tmp_path, tmp_path.parent / "single_out")
    assert json.loads((tmp_path.parent / "single_out" / INDEX).read_text())["weight_map"].keys() == tensors.keys()


def test_a_file_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for opener in (open_source, open_headers):
        with pytest.raises(FileNotFoundError, match=r"expected a folder or a Hub repository .* got neither"):
            opener("owner/name")
