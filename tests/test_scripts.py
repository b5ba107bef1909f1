"""Every script of benchmarks/ and examples/ runs: benchmarks in their quick form, which judges what they compute."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import av
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from modeling_mimo.conversion.verify import verify


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
}
# those that make no table of their own
PAGES = {"benchmarks/gallery.py", "benchmarks/run_all.py"}
TABLES = sorted(name for name in SCRIPTS - PAGES if name.startswith("benchmarks/"))
# which file of tests runs it
OTHERS = {
    "benchmarks/gallery.py": "test_scripts.py",
    "benchmarks/run_all.py": "test_scripts.py",
    "examples/finetune/finetune.py": "test_training_example.py",
    "examples/media/make_media.py": "test_scripts.py",
    "examples/micro/build.py": "test_scripts.py",
    "examples/micro/make_media.py": "test_scripts.py",
    "examples/micro/make_words.py": "test_scripts.py",
    "examples/micro/release.py": "test_scripts.py",
    "examples/micro/screenshot.py": "test_scripts.py",
    "examples/micro/teach_colour.py": "test_scripts.py",
    "examples/micro/train.py": "test_scripts.py",
    "examples/micro/train_codec.py": "test_scripts.py",
    "examples/micro/train_towers.py": "test_scripts.py",
    "examples/parallel/generate.py": "test_parallel.py",
}

pytestmark = [
    pytest.mark.usefixtures("one_thread", "plain_torch"),
    # torch's own remark on a cached function of Transformers
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _as_it_was():
    """Scripts are silent, and their folders hold modules with common names."""
    modules, verbosity, bars = set(sys.modules), logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if any(Path(file).is_relative_to(ROOT / folder) for folder in ("benchmarks", "examples")):
            del sys.modules[name]
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
    torch._dynamo.reset()


@pytest.fixture
def load(monkeypatch):
    """The module of a script, whose neighbours it finds as when it is run."""

    def load(script):
        path = ROOT / script
        monkeypatch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        # a worker of a DataLoader looks it up by its name
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run(load, monkeypatch):
    """Runs a script with arguments; `constants` of its module make it small."""

    def run(script, *arguments, **constants):
        module = load(script)
        for name, value in constants.items():
            assert hasattr(module, name)
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        assert not module.main()

    return run


def test_every_script_is_run_by_a_test():
    assert set(TABLES) | set(OTHERS) == SCRIPTS
    assert not set(TABLES) & set(OTHERS)
    for script, file in OTHERS.items():
        assert Path(script).name in Path(__file__).with_name(file).read_text(encoding="utf-8")


@pytest.mark.parametrize("script", TABLES)
def test_a_benchmark_finds_its_results_right(load, script, capsys):
    status = load(script).main(["--quick", "--threads", "1", "--json"])
    report = json.loads(capsys.readouterr().out)
    passed = {bar["name"]: bar["passed"] for bar in report["bars"]}
    assert status == 0, passed
    assert report["results"]
    assert True in passed.values()


def test_all_benchmarks_make_a_page(load, tmp_path):
    module, page = load("benchmarks/run_all.py"), tmp_path / "page.md"
    assert sorted(f"benchmarks/{name}" for name in module.SCRIPTS) == TABLES
    assert module.main(["--quick", "--threads", "1", "--only", "moe.py", "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert f"## {module.SCRIPTS['moe.py']}\n" in text
    assert "PASS: largest difference from grouped_mm" in text


def test_scripts_know_the_arguments_that_the_page_is_measured_with(load, capsys):
    for script, arguments in load("benchmarks/run_all.py").ARGUMENTS.items():
        with pytest.raises(SystemExit):
            load(f"benchmarks/{script}").main(["--help"])
        words = capsys.readouterr().out.split()
        assert {word for word in arguments if word.startswith("--")} <= {word.strip("[],") for word in words}, script


def test_a_benchmark_that_is_wrong_or_too_slow_ends_with_status_1(load, capsys):
    common = load("benchmarks/common.py")
    for value, status in ((2.0, 0), (0.5, 1), (float("nan"), 1), (None, 0)):
        assert common.finish(True, "", ["a"], [[1]], [common.Bar("times faster", value, 1.5)]) == status


def test_the_gallery_is_measured_and_drawn(load, tmp_path):
    module = load("benchmarks/gallery.py")
    quick = ["--quick", "--threads", "1", "--count", "4", "--longest", "256", "--out", str(tmp_path)]
    if importlib.util.find_spec("matplotlib"):
        assert module.main(quick) == 0
        assert {path.stem for path in tmp_path.glob("*.png")} == set(module.PLOTS)
        return
    options = module.parse(quick)
    for name in module.PLOTS:
        module.write_json(tmp_path / f"{name}.json", module.measured(name, options))
    text = module.page(options)
    assert all(f"## {plot.heading}\n" in text for plot in module.PLOTS.values())


def test_the_media_of_the_examples_are_made_again(run, tmp_path):
    run("examples/media/make_media.py", tmp_path)
    assert Image.open(tmp_path / "chart.png").size == (640, 448)
    for name, frames in (("clip.mp4", 72), ("clip_with_sound.mp4", 48)):
        with av.open(tmp_path / name) as file:
            assert sum(1 for _ in file.decode(video=0)) == frames
    assert soundfile.info(tmp_path / "sweep.ogg").duration == 3


def test_the_media_of_the_demo_are_made_again(run, tmp_path):
    """Of the same examples as those that are shipped."""
    run("examples/micro/make_media.py", tmp_path)
    shipped = ROOT / "modeling_mimo" / "data" / "media"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in shipped.iterdir()}
    made, known = (json.loads((folder / "media.json").read_text(encoding="utf-8")) for folder in (tmp_path, shipped))
    assert made == known
    assert Image.open(tmp_path / "picture.png").tobytes() == Image.open(shipped / "picture.png").tobytes()


def test_words_are_spoken(run, tmp_path):
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng")
    run("examples/micro/make_words.py", tmp_path, WORDS=("cat",), VOICES=2)
    assert soundfile.info(tmp_path / "cat.ogg").duration > 1


def test_the_screenshot_is_taken(run, tmp_path):
    if shutil.which("chromedriver") is None:
        pytest.skip("needs Chromium and its chromedriver")
    run("examples/micro/screenshot.py", tmp_path / "web.png")
    assert Image.open(tmp_path / "web.png").size == (1280, 800)


def test_a_colour_is_taught(run, tmp_path, capsys):
    run("examples/micro/teach_colour.py", "--output", tmp_path, "--steps", 1, "--count", 1, BATCH=2)
    assert "1 steps in" in capsys.readouterr().out
    assert (tmp_path / "adapter_config.json").is_file()


def test_the_recipe_runs_from_the_codec_to_the_release(run, tmp_path):
    """Each stage takes what the one before has written, as `make micro` calls them."""
    recipe = "examples/micro"
    stages = {name: tmp_path / name for name in ("codec", "untrained", "towers", "trunk", "heads")}
    codec, untrained, towers, trunk, heads = stages.values()
    run(f"{recipe}/train_codec.py", codec, "--steps", 1, LATENTS=600, ROUNDS=1)
    run(f"{recipe}/build.py", codec, untrained, TEXTS=200)
    run(f"{recipe}/train_towers.py", untrained, towers, "--steps", 1, BATCH=4)
    short = ["--steps", 1, "--save-every", 1, "--score-count", 1]
    run(f"{recipe}/train.py", "trunk", towers, trunk, *short, BATCH=2, PARTS=1)
    run(f"{recipe}/train.py", "heads", trunk, heads, *short, BATCH=2, PARTS=1)
    run(f"{recipe}/release.py", heads, tmp_path / "micro")
    assert "Not measured yet." in (tmp_path / "micro" / "README.md").read_text(encoding="utf-8")
    assert verify(tmp_path / "micro", progress=False).problems == []
    weights = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "bf16", heads)
    ]
    for released, trained in zip(*(model.state_dict().values() for model in weights), strict=True):
        torch.testing.assert_close(released, trained, rtol=2**-8, atol=0)
