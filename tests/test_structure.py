"""What is installed and imported: one top-level package, no side effect but registration, no hidden defaults."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from patience import PATIENCE


ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("modeling_mimo", "processors") for path in (ROOT / folder).glob("*.py"))
FOLDERS = ("processors", "conversion", "cli", "training")
TESTS = sorted(path for path in (ROOT / "tests").glob("*.py") if path.name != "patience.py")
# (file, seconds): tests of what an argument `timeout` of ours does
TIMEOUTS = {("test_image_processing_mimo_v2.py", "0.2")}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def calls(path, function):
    return [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
    ]


def run_python(code):
    # elsewhere, so that the folders of the checkout are not importable by accident
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel that is built from a copy of the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=ignored)
    command = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    result = subprocess.run([sys.executable, "-m", "pip", *command], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_has_one_top_level_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modeling_mimo"}
    (listed,) = [content for name, content in wheel.items() if name.endswith("top_level.txt")]
    assert listed.decode().split() == ["modeling_mimo"]


def test_the_wheel_has_all_sources_and_data(wheel):
    assert "modeling_mimo/py.typed" in wheel
    for path in (ROOT / "modeling_mimo").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in wheel
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            assert f"modeling_mimo/{folder}/{path.name}" in wheel


def test_the_wheel_has_the_command_and_the_license(wheel):
    (entries,) = [content for name, content in wheel.items() if name.endswith("entry_points.txt")]
    assert "mimo = modeling_mimo.cli.main:main" in entries.decode()
    assert any(name.endswith("LICENSE") for name in wheel)


IMPORTS = """
import os, sys, warnings
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForMultimodalLM, CONFIG_MAPPING
import transformers.modeling_utils, transformers.integrations.finegrained_fp8, transformers.quantizers.auto
import transformers.utils.auto_docstring, transformers.generation, transformers.loss.loss_utils

def state():
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    flags = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), sdpa
    return dict(os.environ), flags, torch.get_rng_state().tolist(), len(warnings.filters)

before = state()
import modeling_mimo
print([left == right for left, right in zip(before, state())])
folders = {folders!r}
prefixes = tuple("modeling_mimo." + folder for folder in folders)
print([name for name in sys.modules if name.partition(".")[0] in folders or name.startswith(prefixes)])
config = AutoConfig.for_model("mimo_v2")
autos = AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
print([auto._model_mapping[type(config)].__name__ for auto in autos])
import importlib
route = transformers.AutoProcessor.from_pretrained.__func__
print(importlib.reload(modeling_mimo).MiMoV2Config().vocab_size)
# AutoProcessor imports the processors when it first meets a MiMo checkpoint
print(route.__module__, route is transformers.AutoProcessor.from_pretrained.__func__)
"""


def test_importing_registers_and_does_nothing_else():
    unchanged, others, registered, reloaded, routed = run_python(IMPORTS.format(folders=FOLDERS)).strip().split("\n")
    # environment, threads and default dtype and attention functions, random state, warning filters
    assert unchanged == "[True, True, True, True]"
    assert others == "[]"
    assert registered == str(["MiMoV2Model", *["MiMoV2ForCausalLM"] * 3])
    # a second import registers again without an error
    assert reloaded == "152576"
    assert routed == "modeling_mimo.auto_mimo_v2 True"


def test_the_public_names():
    import modeling_mimo

    assert {"MiMoV2Config", "MiMoV2Model", "MiMoV2ForCausalLM", "HybridCache"} <= set(modeling_mimo.__all__)
    for name in modeling_mimo.__all__:
        assert hasattr(modeling_mimo, name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_assert_in_the_package(path):
    assert [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_default_for_a_config_field_outside_the_config(path):
    """`getattr(config, name, default)` and `hasattr(config, name)` hide a field that is missing."""

    def is_config(node):
        return ast.unparse(node).split(".")[-1].endswith("config")

    hidden = [call.lineno for call in calls(path, "getattr") if is_config(call.args[0]) and len(call.args) > 2]
    hidden += [call.lineno for call in calls(path, "hasattr") if is_config(call.args[0])]
    assert hidden == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_package_imports_siblings_and_never_the_other_folders(path):
    """But for files of modeling_mimo/ in processors/, which the export makes siblings."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    if path.parent.name == "processors":
        modules -= {f"modeling_mimo.{source.stem}" for source in SOURCES if source.stem.endswith("_mimo_v2")}
    assert not {module for module in modules if module.split(".")[0] in ("modeling_mimo", *FOLDERS)}
    # flat: one dot and one name
    assert not {module for module in modules if module.startswith("..") or module.lstrip(".").split(".")[0] in FOLDERS}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_no_test_looks_at_the_clock(path):
    """A busy machine would fail it. Also in the programs that tests start, which are strings here."""
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\btime\.(?:time|monotonic|perf_counter|process_time|sleep)\b|\bsignal\.alarm\b", text)
    assert not re.findall(r"^ *(?:import|from) time\b", text, re.MULTILINE)
    deadlines = [
        ast.unparse(keyword.value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "timeout"
    ]
    assert {(path.name, value) for value in deadlines if "PATIENCE" not in value} <= TIMEOUTS
