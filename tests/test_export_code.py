"""Exported folders load where the package is not importable, with the package's numbers."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from audio_media import sound
from media import picture
from patience import PATIENCE
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.conversion.export_code import export_code, exported_sources, main
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(1, 20)[None]
QUESTION = "What is it?"

# runs without the package: loads every class, then saves what the package's own results are compared with
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_mimo":
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refuse())
import json
import torch
from pathlib import Path
from PIL import Image
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

omni, text, given, result = sys.argv[1:]
given = torch.load(given)
trust = {"trust_remote_code": True}
autos = AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoImageProcessor, AutoFeatureExtractor
made = [type(auto.from_pretrained(omni, **trust)).__name__ for auto in autos]
mapped = {}
for path in Path(omni).glob("*.json"):
    values = json.loads(path.read_text())
    parts = [values, *values.values()] if isinstance(values, dict) else []
    for part in parts:
        mapped |= part.get("auto_map", {}) if isinstance(part, dict) else {}
classes = {name: get_class_from_dynamic_module(target, omni).__name__ for name, target in mapped.items()}

model = AutoModelForImageTextToText.from_pretrained(omni, **trust)
processor = AutoProcessor.from_pretrained(omni, **trust)
content = [
    {"type": "image", "image": Image.open(given["image"])},
    {"type": "audio", "audio": (given["sound"].numpy(), 24000)},
    {"type": "text", "text": given["question"]},
]
chat = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
plain = model.generate(**inputs, **options)
drafted = model.generate(**inputs, use_mtp=True, **options)

kept = {"quantization_config": AUTO_QUANTIZATION_CONFIG_MAPPING["mimo_v2_fp8"](dequantize=False)}
second = AutoModelForCausalLM.from_pretrained(text, **trust)
second_kept = AutoModelForCausalLM.from_pretrained(text, **trust, **kept)
with torch.no_grad():
    seconds = second(given["ids"]).logits, second_kept(given["ids"]).logits
torch.save({
    "made": made,
    "classes": classes,
    "modules": sorted({type(thing).__module__ for thing in (model, processor, second)}),
    "inputs": dict(inputs),
    "logits": logits,
    "generated": (plain.sequences, drafted.sequences),
    "proposed": sum(drafted.mtp_stats.proposed),
    "seconds": seconds,
    "kept": str(second_kept.model.layers[1].mlp.experts.down_proj.dtype),
    "tokenizer": AutoTokenizer.from_pretrained(text, **trust)(given["question"])["input_ids"],
    "template": processor.chat_template,
}, result)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    # loading bf16 needs the conversion mapping that the model's file registers, FP8 the quantizer
    omni = write_random_checkpoint(root / "omni", "tiny", dtype="bf16", vision=True, audio=True)
    text = write_random_checkpoint(root / "text", "tiny", layout="split")
    for folder in (omni, text):
        export_code(folder)
    return omni, text


@pytest.fixture(scope="module")
def given(folders):
    path = folders[0].parent / "image.png"
    Image.fromarray(picture(64, 96)).save(path)
    return {"image": str(path), "sound": torch.from_numpy(sound(1.2, 24000)), "question": QUESTION, "ids": IDS}


@pytest.fixture(scope="module")
def alone(folders, given):
    """What a process says that cannot import the package."""
    root = folders[0].parent
    torch.save(given, root / "given.pt")
    environment = os.environ | {
        "HF_HOME": str(root / "home"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    paths = [str(path) for path in (*folders, root / "given.pt", root / "result.pt")]
    command = [sys.executable, "-c", ALONE, *paths]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return torch.load(root / "result.pt")


@pytest.fixture(scope="module")
def here(folders, given):
    """What the package says."""
    omni, text = folders
    model = AutoModelForImageTextToText.from_pretrained(omni)
    processor = AutoProcessor.from_pretrained(omni)
    content = [
        {"type": "image", "image": Image.open(given["image"])},
        {"type": "audio", "audio": (given["sound"].numpy(), 24000)},
        {"type": "text", "text": QUESTION},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    kept = MiMoV2FP8Config(dequantize=False)
    with torch.no_grad():
        return {
            "module": type(model).__module__,
            "inputs": dict(inputs),
            "logits": model(**inputs).logits,
            "generated": (
                model.generate(**inputs, max_new_tokens=8, do_sample=False),
                model.generate(**inputs, max_new_tokens=8, do_sample=False, use_mtp=True),
            ),
            "seconds": (
                AutoModelForImageTextToText.from_pretrained(text)(IDS).logits,
                AutoModelForImageTextToText.from_pretrained(text, quantization_config=kept)(IDS).logits,
            ),
            "tokenizer": processor.tokenizer(QUESTION)["input_ids"],
            "template": processor.chat_template,
        }


def test_the_classes_come_from_the_folder(alone, here):
    assert here["module"] == "modeling_mimo.modeling_mimo_v2"
    assert all(name.startswith("transformers_modules.") for name in alone["modules"])
    assert alone["made"] == [
        "MiMoV2Config",
        "MiMoV2Model",
        "MiMoV2ForCausalLM",
        "MiMoV2ImageProcessor",
        "MiMoV2FeatureExtractor",
    ]


def test_every_auto_map_entry_names_a_class(alone):
    assert alone["classes"] == {
        "AutoConfig": "MiMoV2Config",
        "AutoModel": "MiMoV2Model",
        "AutoModelForCausalLM": "MiMoV2ForCausalLM",
        "AutoModelForImageTextToText": "MiMoV2ForCausalLM",
        "AutoModelForMultimodalLM": "MiMoV2ForCausalLM",
        "AutoProcessor": "MiMoV2Processor",
        "AutoImageProcessor": "MiMoV2ImageProcessor",
        "AutoVideoProcessor": "MiMoV2VideoProcessor",
        "AutoFeatureExtractor": "MiMoV2FeatureExtractor",
    }


def test_the_processor_gives_the_same_inputs(alone, here):
    assert alone["inputs"].keys() == here["inputs"].keys() >= {"pixel_values", "audio_codes"}
    for name, value in here["inputs"].items():
        assert torch.equal(alone["inputs"][name], value), name
    assert alone["tokenizer"] == here["tokenizer"]
    assert alone["template"] == here["template"]


def test_the_logits_are_the_same_bits(alone, here):
    assert torch.equal(alone["logits"], here["logits"])


def test_plain_and_drafted_generation_give_the_same_tokens(alone, here):
    assert alone["proposed"] > 0
    for left, right in zip(alone["generated"], here["generated"], strict=True):
        assert torch.equal(left, right)


def test_a_second_exported_folder_in_one_process_loads_the_same_bits(alone, here):
    """Its classes are not those that registered the quantizer."""
    assert alone["kept"] == "torch.float8_e4m3fn"
    for left, right in zip(alone["seconds"], here["seconds"], strict=True):
        assert torch.equal(left, right)


def test_exported_sources_import_siblings_and_libraries(folders):
    omni, _ = folders
    names = {path.stem for path in omni.glob("*.py")}
    assert {"modeling_mimo_v2", "processing_mimo_v2"} < names
    for path in omni.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}: {ast.unparse(node)}"
                assert node.module in names, f"{path.name}: {ast.unparse(node)}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "modeling_mimo" not in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"
            # importlib.resources.files("modeling_mimo") is an import as well
            assert not (isinstance(node, ast.Constant) and node.value == "modeling_mimo"), path.name


def test_text_alone_gets_no_processor(folders):
    _, text = folders
    names = {path.name for path in text.iterdir()}
    assert "modeling_mimo_v2.py" in names
    assert not names & {"processing_mimo_v2.py", "processor_config.json", "preprocessor_config.json"}


def test_only_auto_maps_change_and_a_second_export_changes_nothing(folders, tmp_path):
    omni, _ = folders
    plain = write_random_checkpoint(tmp_path / "plain", "tiny", dtype="bf16", vision=True, audio=True)
    added = {path.name for path in omni.glob("*.py")} | {"processor_config.json"}
    changed = {"config.json", "preprocessor_config.json"}
    assert {path.name for path in omni.iterdir()} == added | {path.name for path in plain.iterdir()}
    for path in plain.rglob("*"):
        other = omni / path.relative_to(plain)
        if path.name in changed and path.parent == plain:
            before, after = (json.loads(file.read_text()) for file in (path, other))
            assert list(before | {"auto_map": None}) == list(after)
            assert before | {"auto_map": after["auto_map"]} == after
        elif path.is_file():
            assert path.read_bytes() == other.read_bytes(), path
    before = {path: path.read_bytes() for path in omni.iterdir() if path.is_file()}
    written = export_code(omni)
    assert {path.name for path in written} == added | changed
    assert before == {path: path.read_bytes() for path in omni.iterdir() if path.is_file()}


def test_the_parts_of_a_saved_processor_are_mapped(folders, tmp_path):
    omni, _ = folders
    folder = tmp_path / "saved"
    AutoProcessor.from_pretrained(omni).save_pretrained(folder)
    shutil.copy(omni / "config.json", folder)
    export_code(folder)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["image_processor"]["auto_map"] == {"AutoImageProcessor": "processing_mimo_v2.MiMoV2ImageProcessor"}
    assert saved["video_processor"]["auto_map"] == {"AutoVideoProcessor": "processing_mimo_v2.MiMoV2VideoProcessor"}
    assert saved["feature_extractor"]["auto_map"] == {
        "AutoFeatureExtractor": "processing_mimo_v2.MiMoV2FeatureExtractor"
    }
    again = AutoProcessor.from_pretrained(folder)
    assert type(again).__module__ == "modeling_mimo.processors.processing_mimo_v2"
    (ids,) = again(text=QUESTION)["input_ids"]
    assert ids == again.tokenizer(QUESTION)["input_ids"]


def test_a_failed_export_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mimo_v2"}')
    (folder / "modeling_mimo_v2.py").write_text("released = True\n")
    write_text = Path.write_text

    def full_disk(path, *args, **kwargs):
        if path.name.startswith("weight_mapping"):
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_code(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.json": '{"model_type": "mimo_v2"}',
        "modeling_mimo_v2.py": "released = True\n",
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected a checkpoint with config.json, got none"),
        ("[1]", "config.json: expected a JSON object, got list"),
        ("[" * 100_000, "config.json: expected a JSON object"),
        ('{"model_type": "llama"}', "config.json: model_type: expected mimo_v2 or mimo_v2_flash, got 'llama'"),
    ],
)
def test_a_folder_without_a_config_is_refused_in_one_line(tmp_path, capsys, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        export_code(tmp_path)
    assert "\n" not in str(error.value)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["config.json"])


def test_a_source_that_imports_the_package_is_refused():
    expected = r"^serve_requests\.py: expected imports of siblings, got imports of modeling_mimo"
    with pytest.raises(ValueError, match=expected):
        exported_sources(["modeling_mimo.cli.serve_requests"])
