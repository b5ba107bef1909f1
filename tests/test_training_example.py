"""examples/finetune/finetune.py as a user runs it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_scene import MEDIA, load, write_checkpoint
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_mimo.training import load_adapter


pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "finetune" / "finetune.py"
IMAGE = {"type": "image", "path": "media/chart.png", "max_pixels": 20000}
SOUND = {"type": "audio", "path": "media/speech.wav", "end": 1}
QUICK = ["--steps", "2", "--accumulate", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("example") / "omni")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "media").mkdir()
    for name in ("chart.png", "speech.wav"):
        shutil.copy(MEDIA / name, tmp_path / "media")
    lines = [
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "This."}]}
        for part in (IMAGE, SOUND)
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    return file


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(1, 13)[None] * 37).logits.float()


def test_a_stage_is_trained_and_saved_as_a_checkpoint(main, folder, data, tmp_path, capsys):
    output = tmp_path / "tuned"
    arguments = ["--output", str(output), "--stage", "sft", "--mtp-loss-weight", "0.1", "--router-bias-rate", "0.01"]
    assert main([str(folder), str(data), *arguments, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "projectors: " in printed
    assert "mtp_loss_3" in printed
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    before = load(folder, torch.bfloat16)
    assert torch.equal(model.visual.patch_embed.proj.weight, before.visual.patch_embed.proj.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert len(list((output / "audio_codes").iterdir())) == 1
    assert AutoProcessor.from_pretrained(output).chat_template


def test_adapters_on_fp8_are_trained_and_merged(main, folder, data, tmp_path):
    output = tmp_path / "tuned"
    arguments = ["--output", str(output), "--lora", "attention,experts,projectors", "--base", "fp8", "--merge"]
    assert main([str(folder), str(data), *arguments, *QUICK, "--learning-rate", "1e-2"]) == 0
    adapted = load_adapter(load(folder, torch.bfloat16), output)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.bfloat16)
    distance = float((logits(merged) - logits(adapted)).norm())
    assert distance < 0.5 * float((logits(merged) - logits(load(folder, torch.bfloat16))).norm())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: ["none/such", *a[1:]], r"none/such"),
        (lambda a: [a[0], "none.jsonl", *a[2:]], r"none\.jsonl"),
        (lambda a: [*a[:-1], "heads"], r"`parts`: expected some of .*got \('heads',\)"),
        (lambda a: [*a, "--router-bias-rate", "1"], r"--router-bias-rate: expected --stage"),
        (lambda a: [*a[:-2], "--stage", "sft", "--base", "fp8"], r"--base fp8: expected --lora"),
    ],
    ids=["no checkpoint", "no data", "no such part", "biases under adapters", "quantized weights to train"],
)
def test_wrong_input_is_one_line(main, folder, data, tmp_path, capfd, change, message):
    arguments = change([str(folder), str(data), "--output", str(tmp_path / "tuned"), "--lora", "attention"])
    assert main([*arguments, *QUICK]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("finetune: error: ")]
    assert len(error) == 1
    assert re.search(message, error[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"data\.jsonl:1: expected JSON"),
        ('{"prompt": 1}', r"data\.jsonl:1: expected an object with a list of `messages`"),
        ("", r"data\.jsonl: expected conversations, got none"),
        ('{"messages": [{"role": "user", "content": "x"}]}', r"examples\[0\]: expected an assistant turn to learn"),
    ],
    ids=["no JSON", "no messages", "nothing", "no answer"],
)
def test_wrong_data_is_named(main, folder, data, tmp_path, capfd, text, message):
    data.write_text(text)
    assert main([str(folder), str(data), "--output", str(tmp_path / "tuned"), "--stage", "projector", *QUICK]) == 2
    # a progress bar may stand before it
    assert re.search(f"finetune: error: .*{message}", capfd.readouterr().err)
