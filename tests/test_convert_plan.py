"""The plan of the released V2.5 without its weights, dry runs, memory, and the command line."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from safetensors.torch import save_file
from test_convert import INDEX, read_json, same_tensors, write_json

from modeling_mimo.cli import convert as command
from modeling_mimo.cli.releases import DATA, RELEASES, shipped_manifest
from modeling_mimo.conversion.checkpoint import HeadersSource, open_headers, parse_config
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert, parse_size
from modeling_mimo.conversion.converters import PARTS, plan_conversions
from modeling_mimo.conversion.random_checkpoint import released_config, write_random_checkpoint
from modeling_mimo.conversion.shard_plan import index_of, plan_shards
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


pytestmark = pytest.mark.usefixtures("one_thread")

RELEASE = "MiMo-V2.5"
# published sizes of the 17 files
RELEASED_FILES = {"model_mtp.safetensors": 1_189_405_960, "model_pp0_ep0_shard1.safetensors": 14_463_302_008}
FIRST_SHARDS = [34_369_159_872, 34_369_162_432, 34_369_162_432, 34_369_169_600, *[34_369_170_624] * 4]
SECOND_SHARDS = [3_490_619_024, 3_490_619_024, 3_490_619_752, *[3_490_619_856] * 4]
RELEASED_FILES |= {f"model_pp0_ep{rank}_shard0.safetensors": size for rank, size in enumerate(FIRST_SHARDS)}
RELEASED_FILES |= {f"model_pp0_ep{rank}_shard1.safetensors": size for rank, size in enumerate(SECOND_SHARDS, 1)}


def mimo(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["convert", *map(str, arguments)]))


@pytest.fixture(scope="module")
def release():
    config = json.loads((DATA / RELEASE / "config.json").read_bytes())
    return HeadersSource(RELEASE, config, shipped_manifest(RELEASE))


def test_the_released_files_come_out_as_published(release):
    plan = plan_conversions(release, "xiaomi", "keep", None, PARTS)
    # names that say nothing of ranks: the rule has to find the files
    file = Path("model.safetensors")
    tensors = {name: info._replace(file=file) for name, info in release.tensors.items()}
    shards = plan_shards(plan, HeadersSource(RELEASE, release.config, tensors), "xiaomi", "keep", None)
    assert {shard.file: shard.size for shard in shards} == RELEASED_FILES
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    assert weight_map == {name: info.file.name for name, info in release.tensors.items()}
    # byte for byte the published file
    index = json.dumps(index_of(shards, plan, "xiaomi"), indent=2).encode()
    assert hashlib.sha256(index).hexdigest().startswith("f2e1774c")


def test_a_dry_run_of_the_release_needs_little(tmp_path):
    program = (
        "import sys; sys.argv[0] = 'mimo'\n"
        "from modeling_mimo.cli.main import Parser\n"
        "from modeling_mimo.cli import convert\n"
        "parser = Parser(); convert.add_parser(parser.add_subparsers())\n"
        "arguments, calls = parser.parse_args(sys.argv[1:]), 0\n"
        "def count(frame, event, argument):\n"
        "    global calls\n"
        "    calls += event == 'call'\n"
        "sys.setprofile(count)\n"
        "convert.run(arguments)\n"
        "sys.setprofile(None)\n"
        "print(calls)\n"
        # getrusage would count what the tests' own process held when it started this one
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "convert", RELEASE, "--dry-run", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=PATIENCE,
    )
    text, calls, kib = done.stdout.rstrip().rsplit("\n", 2)
    assert int(kib) < 10**6
    # 43 for each tensor, however fast the machine
    assert int(calls) < 80 * 73_081
    report = json.loads(text)
    assert (report["total_size"], report["tensors"]) == (RELEASES[RELEASE].bytes, RELEASES[RELEASE].tensors)
    assert sum(file["tensors"] for file in report["files"]) == 73_081
    assert all(file["bytes"] < 5.001e9 for file in report["files"])
    assert len(report["files"]) == 64
    assert not list(tmp_path.iterdir())


def test_totals_of_the_release(release):
    report = convert(release, None, dtype="bf16", dry_run=True)
    # two bytes for each parameter, four for those of the router
    assert report.total_size == 2 * RELEASES[RELEASE].parameters + 2 * 49_295_104 == 621_611_235_584
    assert report.peak_memory < 4e9
    report = convert(release, None, dtype="mxfp4", dry_run=True)
    experts = 302_795_194_368
    saved = experts + experts // 128**2 * 4 - experts // 2 - experts // 32
    assert report.total_size == RELEASES[RELEASE].bytes - saved


def test_a_dry_run_needs_config_and_index_alone(checkpoints, tmp_path):
    for form in ("fp8_omni", "bf16_fused"):
        folder = tmp_path / form
        folder.mkdir()
        for name in ("config.json", INDEX):
            shutil.copyfile(checkpoints[form] / name, folder / name)
        for dtype in ("keep", "fp16"):
            full = convert(checkpoints[form], None, dtype=dtype, dry_run=True)
            assert convert(folder, None, dtype=dtype, dry_run=True).total_size == full.total_size
            assert convert(checkpoints[form], tmp_path / f"{form}-{dtype}", dtype=dtype).total_size == full.total_size
        index = read_json(folder, INDEX)
        index["weight_map"]["model.layers.0.surprise"] = "x.safetensors"
        write_json(folder, index, INDEX)
        with pytest.raises(ValueError, match=r"unknown \(1\): model.layers.0.surprise"):
            open_headers(folder)
        with pytest.raises(ValueError, match=r"model_mtp\.safetensors"):
            convert(folder, tmp_path / "never")


def test_headers_cannot_be_converted(release, tmp_path):
    with pytest.raises(ValueError, match="expected weights for anything but a dry run"):
        convert(release, tmp_path / "out", only="mtp")


def test_the_command_converts_and_reports(checkpoints, tmp_path, capsys):
    source = checkpoints["fp8_omni"]
    assert mimo(source, tmp_path / "out", "--dtype", "fp16", "--only", "text", "--only", "mtp", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parts"] == ["text", "mtp"]
    assert report["dtype"] == "fp16"
    assert all(len(file["sha256"]) == 64 for file in report["files"])
    assert mimo(source, "--dry-run", "--to", "xiaomi") == 0
    text = capsys.readouterr().out
    assert "model_mtp.safetensors" in text
    assert "would become" in text
    assert "changed: nothing" in text
    assert mimo(checkpoints["bf16_fused"], tmp_path / "fp8", "--dtype", "fp8") == 0
    assert "experts.down_proj" in capsys.readouterr().out
    with pytest.raises(ValueError, match="DST: expected a folder"):
        mimo(source)
    with pytest.raises(FileNotFoundError, match="expected a folder or a Hub repository"):
        mimo(RELEASE, tmp_path / "out2")
    with pytest.raises(ValueError, match="expected a release with a tensor list"):
        mimo("MiMo-V2.5-Pro", "--dry-run")


def test_sizes_are_read():
    assert parse_size("5GB", "x") == 5 * 10**9
    assert parse_size("1.5 MiB", "x") == 3 * 2**19
    assert parse_size(7, "x") == parse_size("7", "x") == 7
    assert parse_size(None, "x") is None


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["keep", "fp8", "fp16"])
def test_memory_stays_below_the_ceiling(large, tmp_path, dtype):
    """One dense layer of released width: 16384 x 4096 three times, and an embedding as large as all of them."""
    source = large["bf16" if dtype == "fp8" else "fp8"]
    peak = convert(source, None, dtype=dtype, dry_run=True).peak_memory
    program = """if True:
        import sys
        from pathlib import Path
        from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert

        def resident(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

        # what a first conversion imports and keeps does not count
        convert(sys.argv[4], sys.argv[5], dtype=sys.argv[3], progress=False)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], max_memory=int(sys.argv[6]), progress=False)
        print(resident("VmHWM") - before)
    """
    small = large["small_bf16" if dtype == "fp8" else "small_fp8"]
    arguments = [source, tmp_path / "out", dtype, small, tmp_path / "small", peak]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    grown = int(done.stdout)
    # the allocator and the interpreter take a few MB more; far less would mean that the announcement says nothing
    assert peak / 3 < grown < peak + 16 * 2**20, f"{grown / 1e6:.0f} MB in flight, announced {peak / 1e6:.0f}"
    if dtype == "keep":
        assert same_tensors(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"max_memory: expected at least \d+ bytes for model\."):
        convert(source, tmp_path / "never", dtype=dtype, max_memory=peak - 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    overrides = {
        "hidden_size": 4096,
        "hybrid_layer_pattern": [0],
        "moe_layer_freq": [0],
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "intermediate_size": 16384,
        "vocab_size": 16384,
    }
    folders = {}
    for dtype in ("fp8", "bf16"):
        folders[f"small_{dtype}"] = write_random_checkpoint(root / f"small_{dtype}", dtype=dtype, with_tokenizer=False)
        config = released_config("tiny", dtype, overrides=overrides)
        folder = folders[dtype] = root / dtype
        folder.mkdir()
        save_file(constant_tensors(config, dtype), folder / "model.safetensors")
        write_json(folder, config)
    return folders


def constant_tensors(config, dtype):
    """The tensors of one dense layer; drawing 400 million random values would take longer than the test."""
    tensors = {}
    for name, spec in released_tensors(parse_config(config)).items():
        value = torch.full(spec.shape, 0.5, dtype=torch.float32 if spec.part == "router" else torch.bfloat16)
        if spec.quantized and dtype == "fp8":
            value = value.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(spec.scale_shape)
        tensors[name] = value
    return tensors
