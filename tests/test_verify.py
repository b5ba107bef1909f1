"""What `mimo verify` must find, each fault made on purpose, and what it must not mind."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_mimo.checkpoint_mimo_v2 import INDEX_NAME, Checkpoint, read_config
from modeling_mimo.cli.main import main
from modeling_mimo.conversion import compare
from modeling_mimo.conversion.compare import Side
from modeling_mimo.conversion.fp8 import dequantize_chunks
from modeling_mimo.conversion.random_audio import write_random_audio_tokenizer
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.conversion.verify import verify
from modeling_mimo.weight_mapping_mimo_v2 import released_tensors


pytestmark = pytest.mark.usefixtures("one_thread")

QKV = "model.layers.1.self_attn.qkv_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(checkpoints["fp8_omni"], tmp_path / "copy"))


def change(folder, **tensors):
    """Rewrites the files that hold `tensors`; a function gets the old value."""
    weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    for name, value in tensors.items():
        path = folder / weight_map[name]
        stored = load_file(path)
        stored[name] = value(stored[name]) if callable(value) else value
        save_file(stored, path)


def put(position, value, dtype=None):
    """A function that writes one element, as bits of `dtype` if given."""

    def changed(tensor):
        tensor = tensor.clone()
        (tensor if dtype is None else tensor.view(dtype)).view(-1)[position] = value
        return tensor

    return changed


def problems(folder, *others, **arguments):
    return verify(folder, *others, progress=False, **arguments).problems


# ---- one checkpoint


@pytest.mark.parametrize("name", ["fp8_fused", "bf16_fused", "fp8_split", "fp8_plain", "fp8_omni", "mxfp4"])
def test_a_sound_checkpoint_has_no_problems(checkpoints, name):
    report = verify(checkpoints[name], progress=False)
    assert report.problems == []
    assert report.layout == {"fp8_split": "split", "fp8_plain": "plain"}.get(name, "chunked")
    assert bool(report.scales) == (not name.startswith("bf16"))
    assert (report.audio_tokenizer is not None) == (name == "fp8_omni")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{EXPERT}_scale_inv", put(0, math.nan), "FP8 scales outside .* or not finite"),
        (f"{EXPERT}_scale_inv", put(0, math.inf), "FP8 scales outside .* or not finite"),
        (f"{EXPERT}_scale_inv", put(0, 0.0), "FP8 scales outside .* or not finite"),
        (f"{EXPERT}_scale_inv", put(0, -0.001), "FP8 scales outside .* or not finite"),
        (f"{EXPERT}_scale_inv", put(0, 1e-16), "FP8 scales outside .* or not finite"),
        (f"{EXPERT}_scale_inv", put(0, 147.0), "FP8 scales outside .* or not finite"),
        (EXPERT, put(5, 0x7F, torch.uint8), "NaN codes in FP8 weights"),
        (EXPERT, put(5, 0xFF, torch.uint8), "NaN codes in FP8 weights"),
        ("model.norm.weight", put(1, math.nan), "NaN or infinite values"),
        ("model.layers.1.mlp.gate.weight", put(1, -math.inf), "NaN or infinite values"),
        (EXPERT, torch.zeros_like, "all zero: a hole of an incomplete download"),
        ("visual.patch_embed.proj.weight", torch.zeros_like, "all zero: a hole of an incomplete download"),
    ],
)
def test_an_unsound_value_is_reported_by_name_and_not_seen_in_headers(folder, name, value, message):
    change(folder, **{name: value})
    (problem,) = problems(folder)
    count = "" if "all zero" in message else r" \(1\)"
    assert re.fullmatch(rf"{message}.* \(1\): {re.escape(name)}{count}", problem)
    assert problems(folder, headers_only=True) == []


def test_an_exponent_of_an_mxfp4_expert_that_is_nan_or_overflows(checkpoints, tmp_path):
    copy = Path(shutil.copytree(checkpoints["mxfp4"], tmp_path / "copy"))
    change(copy, **{f"{EXPERT}_scale": lambda scale: put(1, 255)(put(0, 141)(scale))})
    assert problems(copy) == [f"MXFP4 exponents above 140 or NaN (1): {EXPERT}_scale (2)"]
    # small exponents are those of empty blocks
    change(copy, **{f"{EXPERT}_scale": lambda scale: put(1, 0)(put(0, 140)(scale))})
    assert problems(copy) == []


def test_mxfp4_experts_are_compared_by_value(checkpoints):
    """The same floats in FP8 and in MXFP4: as far apart as 2 significant bits make them."""
    report = verify(checkpoints["mxfp4"], checkpoints["fp8_fused"], progress=False)
    experts = report.comparison["groups"]["experts"]
    assert 0.05 < experts["errors"]["rms_relative"] < 0.2
    assert (report.problems, experts["different"]) == ([], experts["tensors"])
    assert verify(checkpoints["mxfp4"], checkpoints["mxfp4"], progress=False).comparison["different"] == 0


def test_every_finite_code_and_a_zero_bias_are_fine(folder):
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)

    def every_code(weight):
        return codes.repeat(-(-weight.numel() // len(codes)))[: weight.numel()].view(weight.shape).view(weight.dtype)

    change(folder, **{EXPERT: every_code, "visual.blocks.0.attn.qkv.bias": torch.zeros_like})
    assert problems(folder) == []


def test_faults_of_names_shapes_and_dtypes(folder):
    change(folder, **{EXPERT: lambda weight: weight[:-1], "model.norm.weight": lambda weight: weight.to(torch.int16)})
    found = problems(folder, headers_only=True)
    assert found[0] == "the files do not match the config"
    assert any("mis-shaped (expected, got) (1): " + EXPERT in problem for problem in found)
    assert any("wrong dtype (expected, got) (1): model.norm.weight" in problem for problem in found)


def test_a_total_that_the_index_gives_and_the_files_have_not(folder):
    index = json.loads((folder / INDEX_NAME).read_text())
    total = index["metadata"]["total_size"]
    index["metadata"]["total_size"] = total + 1
    (folder / INDEX_NAME).write_text(json.dumps(index))
    expected = f"model.safetensors.index.json: expected `total_size` {total} bytes, got {total + 1}"
    assert problems(folder, headers_only=True) == [expected]
    del index["metadata"]["total_size"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert problems(folder, headers_only=True) == []


def test_the_audio_tokenizer_is_checked_too(folder):
    path = folder / "audio_tokenizer" / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.layers.0.fc1.weight"
    save_file(tensors | {name: tensors[name].fill_(math.nan)}, path)
    (problem,) = problems(folder)
    assert problem == f"NaN or infinite values (1): {name} ({tensors[name].numel():,})"
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(kept | {"encoder.extra": torch.ones(1)}, path)
    found = problems(folder)
    assert f"audio_tokenizer/model.safetensors: missing (1): {name}" in found
    assert "audio_tokenizer/model.safetensors: unknown (1): encoder.extra" in found
    shutil.rmtree(path.parent)
    assert "audio_tokenizer/model.safetensors: expected a safetensors file, got nothing" in problems(folder)[0]


def test_the_decoder_of_v2_6_is_known(folder):
    shutil.rmtree(folder / "audio_tokenizer")
    write_random_audio_tokenizer(folder / "audio_tokenizer", "tiny", decoder=True)
    assert problems(folder) == []


def test_a_file_without_config(checkpoints, folder, capsys):
    (folder / "config.json").unlink()
    (problem,) = problems(folder)
    assert "expected config.json beside all files" in problem
    (folder / INDEX_NAME).unlink()
    assert main(["verify", str(folder / "model_mtp.safetensors")]) == 1
    assert "names are not checked" in capsys.readouterr().out


def test_row_blocks_change_nothing(folder, monkeypatch):
    change(folder, **{EXPERT: put(-1, 0x7F, torch.uint8)})
    whole = problems(folder)
    # a few rows at a time
    monkeypatch.setattr("modeling_mimo.conversion.verify.STEP", 1000)
    assert problems(folder) == whole


# ---- sha256 sums


def test_sums_are_those_of_sha256sum(folder, tmp_path, capsys):
    sums = tmp_path / "sums.sha256"
    assert main(["verify", str(folder), "--headers", "--write-manifest", str(sums)]) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert f"sha256 of {len(files)} files: written" in capsys.readouterr().out
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" for path in files]
    assert sorted(sums.read_text().splitlines()) == sorted(lines)
    checked = subprocess.run(["sha256sum", "-c", "--quiet", sums], cwd=folder, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
    assert problems(folder, headers_only=True, manifest=sums) == []


def test_sums_that_lie_in_the_folder_leave_themselves_out(folder):
    sums = folder / "SHA256SUMS"
    for _ in range(2):
        assert problems(folder, headers_only=True, write_sums=sums) == []
    assert "SHA256SUMS" not in sums.read_text()
    assert problems(folder, headers_only=True, manifest=sums) == []


def test_a_file_that_differs_is_missing_or_is_not_listed(folder, tmp_path):
    sums = tmp_path / "sums"
    problems(folder, headers_only=True, write_sums=sums)
    text = sums.read_text().splitlines()
    # binary mode is fine, and so are capital letters
    sums.write_text(
        "\n".join([line.replace("  ", " *").upper().replace(line[66:].upper(), line[66:]) for line in text])
    )
    assert problems(folder, headers_only=True, manifest=sums) == []
    sums.write_text("\n".join(line for line in text if "model_mtp" not in line) + f"\n{'0' * 64}  absent.json")
    with (folder / "generation_config.json").open("a") as file:
        file.write(" ")
    found = problems(folder, headers_only=True, manifest=sums)
    assert [problem.split(" expected")[0] for problem in found] == [
        "sums: generation_config.json:",
        "sums: absent.json: in the list of sums, but there is no such file",
        "sums: model_mtp.safetensors: weights that the list of sums does not have",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one line"),
        ("hello", "line 1: expected `<sha256>  <path>`, got 'hello'"),
        (f"{'0' * 64}  ../secret", "line 1: expected a path inside the folder, got '../secret'"),
        (f"{'0' * 64}  /etc/passwd", "line 1: expected a path inside the folder, got '/etc/passwd'"),
        (f"{'0' * 64}  a\n{'1' * 64}  a", "line 2: expected every path once, got 'a' again"),
        (f"{'g' * 64}  a", "line 1: expected `<sha256>  <path>`"),
    ],
)
def test_a_list_that_is_none_is_refused(folder, tmp_path, capsys, text, message):
    (tmp_path / "sums").write_text(text)
    assert main(["verify", str(folder), "--headers", "--manifest", str(tmp_path / "sums")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- two checkpoints


def test_the_same_twice_is_equal_by_bytes(checkpoints, capsys):
    place = str(checkpoints["fp8_omni"])
    assert main(["verify", place, place, "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert (comparison["dequantized"], comparison["different"]) == (0, 0)
    # scales are compared with their weights
    weights = [name for name in Checkpoint.from_folder(place).tensors if not name.endswith("_scale_inv")]
    assert comparison["equal"] == len(weights) + 149
    assert comparison["groups"]["audio_tokenizer"]["equal"] == 149


@pytest.mark.parametrize("name", [EXPERT, f"{EXPERT}_scale_inv", QKV, "model.norm.weight"])
def test_one_other_bit_in_the_same_form_is_a_problem(checkpoints, folder, name):
    change(folder, **{name: lambda tensor: put(0, tensor.view(torch.uint8).view(-1)[0] ^ 1, torch.uint8)(tensor)})
    report = verify(checkpoints["fp8_omni"], folder, progress=False)
    (problem,) = report.problems
    weight = name.removesuffix("_scale_inv")
    assert problem.startswith(f"stored with the same dtype and other values (rms relative) (1): {weight} (")
    assert report.comparison["different"] == 1
    (group,) = [sums for sums in report.comparison["groups"].values() if sums["different"]]
    assert group["worst"]["tensor"] == weight
    assert 0 < group["errors"]["mean_abs"] <= group["errors"]["max_abs"] < 0.1


def test_names_of_one_side_are_problems(checkpoints, folder):
    shutil.rmtree(folder / "audio_tokenizer")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if not key.startswith("model.mtp.")}
    del index["metadata"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    (folder / "model_mtp.safetensors").unlink()
    found = problems(checkpoints["fp8_omni"], folder)
    assert any(problem.startswith("only in A (36): model.mtp.layers.0.") for problem in found)
    assert any(problem.startswith("audio_tokenizer/: only in ") for problem in found)
    found = problems(folder, checkpoints["fp8_omni"])
    assert any(problem.startswith("only in B (36): model.mtp.layers.0.") for problem in found)
    found = problems(folder, checkpoints["fp8_omni"], headers_only=True)
    assert any(problem.startswith("only in B (48): model.mtp.layers.0.") for problem in found)


@pytest.fixture(scope="module")
def dequantized(checkpoints, tmp_path_factory):
    """fp8_fused as bf16: every weight is the released formula, rounded."""
    source, target = checkpoints["fp8_fused"], tmp_path_factory.mktemp("bf16") / "bf16"
    config = read_config(source / "config.json")
    slices = Checkpoint.from_folder(source).slices()
    tensors = {}
    for name, spec in released_tensors(config).items():
        tensors[name] = slices[name][:]
        if spec.quantized:
            tensors[name] = dequantize_chunks(tensors[name], slices[f"{name}_scale_inv"][:], spec.chunks)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    del values["quantization_config"]
    (target / "config.json").write_text(json.dumps(values))
    return target


def test_a_dequantized_copy_is_equal_after_dequantization(checkpoints, dequantized):
    for pair in ((checkpoints["fp8_fused"], dequantized), (dequantized, checkpoints["fp8_fused"])):
        report = verify(*pair, progress=False)
        assert report.problems == []
        quantized = sum(spec.quantized for spec in released_tensors(read_config(dequantized / "config.json")).values())
        assert (report.comparison["dequantized"], report.comparison["different"]) == (quantized, 0)


def test_row_blocks_of_a_comparison_change_nothing(checkpoints, dequantized, monkeypatch):
    whole = verify(checkpoints["fp8_fused"], checkpoints["bf16_fused"], progress=False).comparison
    for step in (10_000, 128 * 256):
        monkeypatch.setattr(compare, "STEP", step)
        parts = verify(checkpoints["fp8_fused"], checkpoints["bf16_fused"], progress=False).comparison
        for group, sums in whole["groups"].items():
            for key, value in sums["errors"].items():
                assert parts["groups"][group]["errors"][key] == pytest.approx(value, rel=1e-6)
        assert verify(checkpoints["fp8_fused"], dequantized, progress=False).comparison["different"] == 0


@pytest.mark.parametrize(
    ("a", "b"), [("fp8_fused", "fp8_plain"), ("fp8_fused", "fp8_split"), ("fp8_plain", "fp8_split")]
)
def test_another_row_order_is_no_problem_and_other_blocks_are_measured(checkpoints, a, b):
    """The three were quantized from the same floats, so only blocks that were cut otherwise differ."""
    report = verify(checkpoints[a], checkpoints[b], progress=False)
    assert report.problems == []
    groups = report.comparison["groups"]
    for part in ("experts", "dense_mlp", "norms", "embeddings", "router"):
        assert groups[part]["equal"] == groups[part]["tensors"]
    assert groups["attention"]["errors"]["rms_relative"] < 0.05


def test_quantization_is_measured_against_the_floats_it_was_made_of(checkpoints):
    report = verify(checkpoints["bf16_fused"], checkpoints["fp8_fused"], progress=False)
    assert report.problems == []
    experts = report.comparison["groups"]["experts"]
    assert experts["different"] == experts["tensors"]
    # a code has 4 significant bits: at most 1/16 relative, some 0.026 rms
    assert 0.01 < experts["errors"]["rms_relative"] < 0.05
    slices = [Checkpoint.from_folder(checkpoints[name]).slices() for name in ("bf16_fused", "fp8_fused")]
    difference, norm, largest = 0.0, 0.0, 0.0
    for name in experts_of(slices[0]):
        one = slices[0][name][:].double()
        two = dequantize_chunks(slices[1][name][:], slices[1][f"{name}_scale_inv"][:], 1, torch.float32).double()
        difference, norm = difference + (one - two).square().sum(), norm + one.square().sum()
        largest = max(largest, (one - two).abs().max().item())
    assert experts["errors"]["rms_relative"] == pytest.approx(math.sqrt(difference / norm), rel=1e-6)
    assert experts["errors"]["max_abs"] == pytest.approx(largest, rel=1e-6)


def experts_of(slices):
    return [name for name in slices if ".mlp.experts." in name]


def test_rows_in_a_wrong_order_are_a_problem_with_a_hint(checkpoints, tmp_path):
    """bf16 has no scale grid: plain rows under the released tag look like chunks, and only the values differ."""
    plain = write_random_checkpoint(tmp_path / "plain", "tiny", dtype="bf16", layout="plain", with_tokenizer=False)
    found = problems(checkpoints["fp8_fused"], plain)
    assert found[0].startswith("further apart than 0.05 (rms relative), the most for fp8 (11): model.")
    assert found[1].startswith("hint: shapes do not show the row order of qkv_proj in B")
    values = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(values | {"fused_qkv_layout": "plain"}))
    assert problems(checkpoints["fp8_fused"], plain) == []


def test_query_key_and_value_rows_of_each_layout_are_those_of_the_split_files(checkpoints):
    split = Side(
        Checkpoint.from_folder(checkpoints["fp8_split"]), read_config(checkpoints["fp8_split"] / "config.json")
    )
    for name in ("fp8_fused", "fp8_plain"):
        side = Side(Checkpoint.from_folder(checkpoints[name]), read_config(checkpoints[name] / "config.json"))
        mine = side.tensors(True)
        assert mine.keys() == split.tensors(True).keys()
        for layer in (0, 1):
            for letter in "qkv":
                rows = mine[f"model.layers.{layer}.self_attn.{letter}_proj.weight"]
                theirs = split.tensors(True)[f"model.layers.{layer}.self_attn.{letter}_proj.weight"]
                assert rows.count == theirs.count
                one, two = side.values(rows, 0, rows.count), split.values(theirs, 0, rows.count)
                assert ((one - two).norm() / two.norm()).item() < 0.05
                # any cut gives the same rows
                assert torch.equal(side.values(rows, 7, rows.count - 5), one[7:-5])


def test_another_shape_is_a_problem(checkpoints, folder):
    change(folder, **{"model.layers.0.mlp.down_proj.weight": lambda weight: weight[:-1]})
    found = problems(checkpoints["fp8_omni"], folder)
    assert "shapes differ (1): model.layers.0.mlp.down_proj.weight" in found


def test_without_configs_only_bytes_are_compared(checkpoints, folder):
    (folder / "config.json").unlink()
    found = verify(folder, folder, progress=False)
    assert found.comparison["different"] == 0
    assert all("names are not checked" in problem for problem in found.problems)


def test_memory_stays_bounded_for_a_large_tensor(tmp_path):
    """A tensor of 205 MB against a copy, in a process that gets no more memory of its own than 200 MB: the pages of
    mapped files, which come and go as the system likes, are none of it."""
    rows, columns = 12_500, 8192
    save_file({"w": torch.full((rows, columns), 0.5, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    code = """
import re, resource, sys
from modeling_mimo.conversion.verify import verify
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
# blocks of 16 MB on each side, as float32 and float64: some 160 MB
resource.setrlimit(resource.RLIMIT_DATA, (used + 200_000_000,) * 2)
print(verify(sys.argv[1], sys.argv[2], progress=False).comparison["different"])
"""
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0"]


def test_a_folder_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
