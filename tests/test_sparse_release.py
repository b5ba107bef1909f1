"""The released files as holes: true names, headers, sizes and index, on a few MB of disk."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from modeling_mimo.checkpoint_mimo_v2 import INDEX_NAME, Checkpoint, read_config, read_header
from modeling_mimo.cli.main import main
from modeling_mimo.conversion import sparse_release
from modeling_mimo.conversion.audio_tokenizer_table import WEIGHTS_NAME
from modeling_mimo.conversion.sparse_release import write_layer, write_sparse_release
from modeling_mimo.conversion.verify import verify


LOCK = Path(__file__).resolve().parents[1] / "../shared/reference/data/prismwing/model.lock.json"

# checkpoint.md of the releases, section 6: tensors and bytes per part, scales counted with their weights
TOTALS = {"tensors": 73_081, "elements": 310_775_040_000, "parameters": 310_756_322_688, "bytes": 315_031_102_208}
PARAMETERS = {
    "experts": 302_795_194_368,
    "attention": 2_872_049_664 + 1_610_612_736,
    "dense_mlp": 201_326_592,
    "embeddings": 1_249_902_592,
    "router": 49_295_104,
    "norms": 397_312,
    "sinks": 2_496,
    "mtp": 987_820_224,
    "vision": 728_594_432,
    "audio": 261_127_168,
}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "MiMo-V2.5"
    try:
        write_sparse_release(folder)
    except OSError as error:
        pytest.skip(f"this filesystem refuses sparse files of 34 GB: {error}")
    yield folder
    # pytest keeps old folders, and 315 GB would frighten whoever copies them
    shutil.rmtree(folder)


def test_the_files_take_no_room(release):
    stats = [path.stat() for path in release.rglob("*") if path.is_file()]
    assert sum(stat.st_size for stat in stats) > 315e9
    assert sum(stat.st_blocks * 512 for stat in stats) < 64e6
    assert len(list(release.rglob("*.safetensors"))) == 18


def test_inspect_and_verify_call_it_complete(release, capsys):
    assert main(["inspect", str(release)]) == 0
    assert "known release: MiMo-V2.5: tensors, elements, parameters, bytes match" in capsys.readouterr().out
    assert main(["verify", str(release), "--headers", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert {name: report[name] for name in TOTALS} == TOTALS
    assert {part: sums["parameters"] for part, sums in report["parts"].items()} == PARAMETERS
    assert (report["files"], report["layout"], report["audio_tokenizer"]) == (17, "chunked", 449)
    assert report["known_release"] == {"name": "MiMo-V2.5", "match": list(TOTALS), "differ": []}


def test_a_missing_audio_tokenizer_is_a_problem(release, tmp_path):
    for path in release.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    (problem,) = verify(tmp_path, headers_only=True, progress=False).problems
    assert "audio_tokenizer/model.safetensors: expected a safetensors file, got nothing" in problem


@pytest.mark.skipif(not LOCK.is_file(), reason="the published file list is not beside the checkout")
def test_every_file_has_the_published_size_and_small_ones_the_published_hash(release):
    published = {entry["path"]: entry for entry in json.loads(LOCK.read_text())["files"]}
    files = {path.relative_to(release).as_posix(): path for path in release.rglob("*") if path.is_file()}
    assert len(files) == 22
    for name, path in files.items():
        assert path.stat().st_size == published[name]["bytes"], name
        if path.suffix == ".json":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == published[name]["sha256"], name


def test_a_weight_and_its_scale_lie_in_different_files(release):
    weight_map = json.loads((release / INDEX_NAME).read_text())["weight_map"]
    weights = [name.removesuffix("_scale_inv") for name in weight_map if name.endswith("_scale_inv")]
    apart = [name for name in weights if weight_map[name] != weight_map[f"{name}_scale_inv"]]
    # the last expert of each of 8 ranks
    assert sorted(apart) == sorted(f"model.layers.43.mlp.experts.{32 * rank + 31}.up_proj.weight" for rank in range(8))


def test_the_audio_tokenizer_is_the_released_one(release):
    tensors = read_header(release / WEIGHTS_NAME)
    elements = {dtype: 0 for dtype in ("BF16", "F32")}
    for info in tensors.values():
        elements[info.dtype] += torch.Size(info.shape).numel()
    assert elements["BF16"] == 307_927_040
    assert sum(info.nbytes for info in tensors.values()) == 652_572_240


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """Two experts of a global layer, in released sizes and with values: 200 MB."""
    folder = tmp_path_factory.mktemp("layer") / "layer"
    yield write_layer(folder, 5, experts=2)
    shutil.rmtree(folder)


def test_a_layer_alone_is_a_sound_checkpoint_of_released_geometry(layer):
    config = read_config(layer / "config.json")
    assert (config.layer_types, config.mlp_layer_types) == (["full_attention"], ["sparse"])
    report = verify(layer, progress=False)
    assert (report.problems, report.layout) == ([], "chunked")
    assert report.parts["experts"]["parameters"] == 2 * 3 * 4096 * 2048
    assert report.parts["attention"]["parameters"] == 13568 * 4096 + 4096 * 8192
    assert report.scales.keys() == {"experts", "attention"}
    for low, high in report.scales.values():
        assert 0.005 <= low < high <= 0.02


def test_the_same_seed_gives_the_same_values_and_another_one_others(layer, tmp_path):
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    read = [Checkpoint.from_folder(layer).slices()[name][:].view(torch.uint8)]
    for folder, seed in (("same", 0), ("other", 1)):
        write_layer(tmp_path / folder, 5, seed=seed, experts=2)
        read.append(Checkpoint.from_folder(tmp_path / folder).slices()[name][:].view(torch.uint8))
        shutil.rmtree(tmp_path / folder)
    assert torch.equal(read[0], read[1])
    assert (read[0] != read[2]).float().mean() > 0.9


@pytest.mark.parametrize("layer", [0, 48, -1])
def test_a_layer_without_experts_is_refused(tmp_path, layer):
    with pytest.raises(ValueError, match="layer: expected a layer with experts, 1 to 47, got"):
        write_layer(tmp_path / "layer", layer)
    with pytest.raises(ValueError, match="experts: expected 1 to 256, got 257"):
        write_layer(tmp_path / "layer", 1, experts=257)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    assert sparse_release.main([str(tmp_path / "x"), "--release", "MiMo-V9"]) == 1
    assert capsys.readouterr().err == "error: release: expected one of MiMo-V2.5, got 'MiMo-V9'.\n"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert sparse_release.main([str(tmp_path / "full")]) == 1
    assert "expected a new or an empty folder" in capsys.readouterr().err
