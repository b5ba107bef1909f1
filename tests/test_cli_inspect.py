import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_mimo.cli.main import SUBCOMMANDS, main
from modeling_mimo.cli.releases import DATA, shipped_manifest
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


SHARD = "model_pp0_ep3_shard0.safetensors"
READ_BACK = "model.layers.42.mlp.experts.100.down_proj.weight"

# peak resident memory of this very process image; getrusage would count the parent it was forked from
PEAK = """
import json, re
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""

# work of the checkpoint, whatever the machine: bytes that were read, Python functions that were called
INSPECT = """
import re, sys
from modeling_mimo.cli.main import main
calls, opened = 0, []
def count(frame, event, argument):
    global calls
    calls += event == "call"
def read():
    return int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
before = read()
sys.setprofile(count)
status = main(["inspect", sys.argv[1], "--json"])
sys.setprofile(None)
files = [path for path in opened if path.endswith(".safetensors")]
print(json.dumps({"calls": calls, "read": read() - before, "files": len(files), "peak": peak()}), file=sys.stderr)
sys.exit(status)
"""

READ_ONE = """
import json, resource, sys
import safetensors, torch
from modeling_mimo.checkpoint_mimo_v2 import Checkpoint
folder, shard, name = sys.argv[1:]
# private writable memory: what a machine with less memory than one shard cannot promise
resource.setrlimit(resource.RLIMIT_DATA, (20 * 2**30, 20 * 2**30))
try:
    safetensors.safe_open(f"{folder}/{shard}", framework="pt")
    mmap = "mapped"
except Exception as error:
    mmap = f"{type(error).__name__}: {error}"
slices = Checkpoint.from_folder(folder).slices()
opened = peak()
tensor = slices[name][:].view(torch.uint8)
print(json.dumps({"mmap": mmap, "slices": len(slices), "opened": opened, "peak": peak(),
                  "shape": tensor.shape, "sums": [tensor[0].sum().item(), tensor[-1].sum().item()]}))
"""


def run_python(code, *args):
    return subprocess.run([sys.executable, "-c", PEAK + code, *map(str, args)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The 17 files of V2.5 with true headers and sizes and no data: 315 GB that take a few MB of disk."""
    folder = tmp_path_factory.mktemp("MiMo-V2.5")
    files = {}
    for name, info in shipped_manifest("MiMo-V2.5").items():
        files.setdefault(info.file.name, []).append((name, info))
    for file, tensors in files.items():
        header, position = {}, 0
        for name, info in tensors:
            header[name] = {
                "dtype": info.dtype,
                "shape": info.shape,
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        try:
            with (folder / file).open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                if READ_BACK in header:
                    begin, end = (8 + len(text) + offset for offset in header[READ_BACK]["data_offsets"])
                    for offset, byte in ((begin, b"\x01"), (end - 2048, b"\x02")):
                        out.seek(offset)
                        out.write(byte * 2048)
                out.truncate(8 + len(text) + position)
        except OSError as error:
            pytest.skip(f"this filesystem refuses a sparse file of {position:,} bytes: {error}")
    weight_map = {name: file for file, tensors in files.items() for name, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_bytes((DATA / "MiMo-V2.5" / "config.json").read_bytes())
    if sum(path.stat().st_blocks for path in folder.iterdir()) * 512 > 2**30:
        pytest.skip("this filesystem has no sparse files")
    yield folder
    # pytest keeps old folders, and 315 GB would frighten whoever copies them
    shutil.rmtree(folder)


def test_the_whole_release_from_its_headers_in_a_gigabyte(release):
    result = run_python(INSPECT, release)
    assert result.returncode == 0, result.stderr
    work = json.loads(result.stderr.splitlines()[-1])
    assert work["peak"] < 1e9
    assert work["files"] == 17
    # headers, index and config, and modules that are imported on the way
    headers = [int.from_bytes(path.open("rb").read(8), "little") for path in release.glob("*.safetensors")]
    texts = [path.stat().st_size for path in release.glob("*.json")]
    assert len(headers) == 17
    assert work["read"] < sum(headers) + sum(texts) + 5e6
    # 55 for each of 73,081 tensors; a search through all of them for each would be far more
    assert work["calls"] < 100 * 73_081
    # a pipe gets no progress bar
    assert len(result.stderr.splitlines()) == 1
    found = json.loads(result.stdout)
    assert (found["tensors"], found["bytes"], found["files"]) == (73_081, 315_031_102_208, 17)
    assert found["known_release"] == {
        "name": "MiMo-V2.5",
        "match": ["tensors", "elements", "parameters", "bytes"],
        "differ": [],
    }
    assert found["layout"] == {"found": "chunked", "source": "scale grid of 9 layers"}
    assert found["parameters"]["total"] == 310_756_322_688
    assert found["parameters"]["experts"] == 302_795_194_368
    assert found["dtypes"]["F8_E4M3"]["elements"] == 306_655_002_624
    assert found["dtypes"]["BF16"]["bytes"] == 2 * 4_052_024_960
    assert found["problems"] == []


def test_one_tensor_of_a_34_gb_shard_where_mmap_is_refused(release):
    assert (release / SHARD).stat().st_size > 34e9
    result = run_python(READ_ONE, release, SHARD, READ_BACK)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["mmap"] != "mapped"
    assert "allocate memory" in found["mmap"]
    assert found["slices"] == 73_081
    assert (found["shape"], found["sums"]) == ([4096, 2048], [2048, 4096])
    # lazy: opening reads headers, the read itself takes the 8 MB of one expert and not the 34 GB of its file
    assert found["opened"] < 1e9
    assert found["peak"] - found["opened"] < 200e6


@pytest.fixture
def folder(tmp_path):
    config = MiMoV2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        v_head_dim=4,
        rope_parameters={
            layer_type: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for layer_type in ("full_attention", "sliding_attention")
        },
        n_routed_experts=2,
        num_experts_per_tok=1,
        num_mtp_layers=1,
    )
    config.save_pretrained(tmp_path)
    tensors = {name: torch.zeros(spec.shape, dtype=torch.bfloat16) for name, spec in released_tensors(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def inspect_json(capsys, path):
    status = main(["inspect", str(path), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_small_folder(folder, capsys):
    status, found = inspect_json(capsys, folder)
    assert (status, found["problems"], found["known_release"]) == (0, [], None)
    assert found["layout"] == {"found": "chunked", "source": "released rule (shapes do not decide)"}
    assert found["bytes"] == 2 * found["parameters"]["total"] == found["dtypes"]["BF16"]["bytes"]
    assert found["parts"]["router"]["tensors"] == 2


@pytest.mark.parametrize("is_said", [True, False])
def test_a_small_folder_without_draft_heads(folder, capsys, is_said):
    """Missing heads are a problem only where config.json says that there are some."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if not is_said:
        del config["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.mtp.")}
    save_file(rest, folder / "model.safetensors")
    status, found = inspect_json(capsys, folder)
    assert status == int(is_said)
    assert any("pass load_mtp=False" in line for line in found["problems"]) == is_said


def test_problems_exit_with_1_and_still_print_the_rest(folder, capsys):
    save_file({"lm_head.weight": torch.zeros(32, 16), "extra": torch.zeros(2)}, folder / "model.safetensors")
    status, found = inspect_json(capsys, folder)
    assert (status, found["tensors"], found["bytes"]) == (1, 2, 32 * 16 * 4 + 8)
    assert any(line.startswith("missing (") for line in found["problems"])
    assert "unknown (1): extra" in found["problems"]
    assert main(["inspect", str(folder)]) == 1
    assert "unknown (1): extra" in capsys.readouterr().out


def test_a_folder_without_config_is_a_problem(folder, capsys):
    (folder / "config.json").unlink()
    status, found = inspect_json(capsys, folder)
    assert (status, found["layout"]) == (1, None)
    assert "expected config.json beside the files" in found["problems"][0]


def test_one_shard_is_counted_and_not_checked(release, capsys):
    status, found = inspect_json(capsys, release / "model_mtp.safetensors")
    assert (status, found["tensors"], found["bytes"], found["problems"]) == (0, 48, 1_189_400_448, [])
    assert found["parameters"]["total"] == 987_820_224


def test_the_shipped_tensor_list(capsys):
    assert main(["inspect", "MiMo-V2.5"]) == 0
    text = capsys.readouterr().out
    assert "17 files, 73,081 tensors, 315,031,102,208 bytes (293.40 GiB)" in text
    assert "known release: MiMo-V2.5: tensors, elements, parameters, bytes match\nproblems: none" in text


def test_a_release_without_one_of_its_files(release, tmp_path, capsys):
    """All files but the MTP file, as people fetch them: the index says what is missing."""
    for path in release.iterdir():
        if path.name != "model_mtp.safetensors":
            (tmp_path / path.name).symlink_to(path)
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mimo: error: ")
    assert "model_mtp.safetensors: expected a safetensors file, got nothing" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "MiMo-V9"], "MiMo-V9: expected a folder, a .safetensors file or one of"),
        (["inspect", "MiMo-V2.5-Pro"], "expected safetensors files, got only a config"),
        (["inspect", "{tmp}"], "expected config.json, model.safetensors.index.json or model.safetensors"),
        (
            ["inspect", "{tmp}/broken.safetensors"],
            "broken.safetensors: expected a safetensors file of at least 8 bytes",
        ),
        (["inspect", "{tmp}/llama"], "`model_type`: expected 'mimo_v2' or 'mimo_v2_flash', got 'llama'"),
        (["inspect", "{tmp}/text"], "expected a JSON object without duplicate keys, got"),
    ],
)
def test_unreadable_input_is_one_line_and_exit_status_2(tmp_path, capsys, args, message):
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    for name, content in (("llama", b'{"model_type": "llama"}'), ("text", b"\xff{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
    assert main([arg.format(tmp=tmp_path) for arg in args]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mimo: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["inspect"], ["unknown"], ["inspect", "x", "--nope"]])
def test_a_wrong_command_line_is_one_line_and_exit_status_2(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mimo: error: ")
    assert error.count("\n") == 1


def test_help_and_version(capsys):
    for args in (["--help"], *([name, "--help"] for name in SUBCOMMANDS), ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        if args == ["--help"]:
            assert all(name in text for name in SUBCOMMANDS)
        elif args != ["--version"]:
            assert f"mimo {args[0]} " in text.split("\nexample")[1]
    assert text.startswith("mimo 0.")


def test_the_console_script_and_a_reader_that_leaves(release):
    script = Path(sys.executable).with_name("mimo")
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [script, "inspect", release / "model_mtp.safetensors"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")
