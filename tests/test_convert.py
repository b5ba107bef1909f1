"""Every released form, to every target, in every dtype: what comes out loads, and gives the logits it has to."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model.safetensors.index.json"
# name -> arguments of write_random_checkpoint, beside the session's checkpoints
MORE = {
    "bf16_plain": {"dtype": "bf16", "layout": "plain"},
    "bf16_split": {"dtype": "bf16", "layout": "split"},
    "mxfp4_fused": {"dtype": "mxfp4", "layout": "fused_qkv"},
}
FORMS = ["fp8_fused", "bf16_fused", "fp8_split", "fp8_plain", "fp8_omni", *MORE]
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Relative error of the logits, |after - before| / |before|. Random routers change their choice at a breath: measured
# 0.25 for weights that become FP8, 0.16 for FP8 rows in another order. The weights themselves are held to half a step.
LOGITS = {"fp8": 0.4, "mxfp4": 0.9}
# largest and mean error of a weight: half of FP8's last step below 448 is 16/448; of MXFP4's from 4 to 6 it is 1/5
STEPS = {"fp8": (0.0358, 0.03), "mxfp4": (0.2, 0.15)}


def read_json(folder, name="config.json"):
    return json.loads((Path(folder) / name).read_text())


def write_json(folder, value, name="config.json"):
    (Path(folder) / name).write_text(json.dumps(value))


def read_tensors(folder):
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def same_tensors(left, right):
    left, right = read_tensors(left), read_tensors(right)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(as_bytes(left[name]), as_bytes(right[name]))
        for name in left
    )


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def logits(folder, dtype="auto"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens = torch.arange(1, 25)[None] * 37 % 2000
    with torch.inference_mode():
        output = model(tokens, output_hidden_states=False)
        assert len(model.model.mtp.layers) == 3
        return output.logits.float()


def relative(before, after):
    return ((after - before).norm() / before.norm()).item()


@pytest.fixture(scope="module")
def forms(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    more = {
        name: write_random_checkpoint(root / name, "tiny", with_tokenizer=False, **arguments)
        for name, arguments in MORE.items()
    }
    # nothing in a bf16 file tells the row order
    write_json(more["bf16_plain"], read_json(more["bf16_plain"]) | {"fused_qkv_layout": "plain"})
    return {**checkpoints, **more}


@pytest.fixture(scope="module")
def source_logits(forms):
    known = {}

    def get(form, dtype):
        if (form, dtype) not in known:
            known[form, dtype] = logits(forms[form], FLOATS.get(dtype, "auto"))
        return known[form, dtype]

    return get


@pytest.mark.parametrize("to", ["hub", "xiaomi"])
@pytest.mark.parametrize("dtype", ["keep", "fp8", "bf16", "fp16", "mxfp4"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_every_other(forms, source_logits, tmp_path, form, dtype, to):
    report = convert(forms[form], tmp_path / "out", to=to, dtype=dtype, progress=False)
    before, after = source_logits(form, dtype), logits(tmp_path / "out")
    # plain FP8 rows change their order in the released format, which requantizes some blocks
    moved = form == "fp8_plain" and to == "xiaomi" and dtype in ("keep", "fp8", "mxfp4")
    is_stored = {"fp8": form.startswith("fp8"), "mxfp4": form.startswith("mxfp4")}
    if is_stored.get(dtype, True) and not moved:
        assert torch.equal(before, after)
    else:
        assert 0 < relative(before, after) < LOGITS.get(dtype, LOGITS["fp8"])
    largest, mean = STEPS.get(dtype, STEPS["fp8"])
    for group, error in report.errors.items():
        is_mxfp4 = group.startswith("experts") and dtype == "mxfp4"
        assert error["max_relative"] <= (largest if is_mxfp4 else STEPS["fp8"][0])
        assert error["mean_relative"] < (mean if is_mxfp4 else STEPS["fp8"][1])
    if dtype == "keep":
        assert set(report.errors) == ({"attention.qkv_proj", "mtp.qkv_proj"} if moved else set())
    if dtype == "bf16":
        assert not report.errors


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "fp8_omni"])
def test_projections_are_split_and_fused_at_will(forms, source_logits, tmp_path, form, layout):
    convert(forms[form], tmp_path / "kept", layout=layout, progress=False)
    names = read_tensors(tmp_path / "kept")
    assert ("model.layers.1.self_attn.q_proj.weight" in names) == (layout == "split")
    assert ("model.mtp.layers.2.self_attn.qkv_proj.weight" in names) == (layout == "fused")
    assert relative(source_logits(form, "keep"), logits(tmp_path / "kept")) < LOGITS["fp8"]
    convert(forms[form], tmp_path / "bf16", layout=layout, dtype="bf16", progress=False)
    # the same numbers in another order are added up in another order
    assert relative(source_logits(form, "bf16"), logits(tmp_path / "bf16")) < 0.02
