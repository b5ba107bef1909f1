"""Lines of Transformers: the same tokens on each, the cache under either name, and what is said on another line."""

import inspect
import json
import subprocess
import sys
from importlib.metadata import version

import line_tokens
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from run_page import ROOT
from transformers import DynamicCache

import modeling_mimo
from modeling_mimo import HybridCache
from modeling_mimo.cli.main import main
from modeling_mimo.versions_mimo_v2 import check_transformers


EXPECTED = json.loads(line_tokens.FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def micro():
    return line_tokens.load()


def test_all_ways_of_generating_give_the_same_tokens_on_every_line(micro):
    found = line_tokens.tokens(*micro)
    assert {way: rows for way, rows in found.items() if rows != EXPECTED.get(way)} == {}
    assert found.keys() == EXPECTED.keys()


def test_ways_that_choose_the_best_token_agree():
    """What is stored is right, not merely the same: greedy tokens do not depend on how they are made."""
    for way, rows in EXPECTED.items():
        if "sampled" not in way and "beams" not in way and "reused" not in way:
            assert rows == EXPECTED["without a cache"][: len(rows)], way
    reused = [rows for way, rows in EXPECTED.items() if "reused" in way]
    assert len(reused) == 4
    assert all(rows == reused[0] for rows in reused)


@pytest.mark.parametrize("name", line_tokens.CACHE_NAMES)
@pytest.mark.parametrize("make", [HybridCache, lambda config: DynamicCache(config=config)])
def test_a_cache_under_either_name_is_filled_and_changes_no_token(micro, name, make):
    """Would have caught that 5.24 says `cache`: forward swallowed it, and generated wrong tokens without an error."""
    model, tokenizer = micro
    inputs, cache = line_tokens.prompt(tokenizer, line_tokens.QUESTION), make(model.config)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **{name: cache}, **options)
    assert torch.equal(output.sequences, model.generate(**inputs, use_cache=False, **options).sequences)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1 > length
    forward_cache = make(model.config)
    logits = model(**inputs, **{name: forward_cache}).logits
    assert forward_cache.get_seq_length() == length
    last = model(output.sequences[:, length : length + 1], **{name: forward_cache}).logits
    whole = model(output.sequences[:, : length + 1]).logits
    torch.testing.assert_close(torch.cat((logits, last), dim=1), whole, rtol=0, atol=1e-4)
    assert model.model(**inputs, **{name: make(model.config)}, use_cache=True).cache.get_seq_length() == length


@pytest.mark.parametrize("options", [{}, {"use_mtp": True}, {"num_beams": 2}, None])
def test_outputs_answer_to_both_names(micro, options):
    model, tokenizer = micro
    inputs = line_tokens.prompt(tokenizer, line_tokens.QUESTION)
    if options is None:
        output = model(**inputs, use_cache=True)
    else:
        output = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, **options)
    (stored,) = output.keys() & set(line_tokens.CACHE_NAMES)
    cache = output[stored]
    assert isinstance(cache, HybridCache)
    # the old one is logged as deprecated on the newest line
    for name in line_tokens.CACHE_NAMES if stored == "past_key_values" else ("cache",):
        assert getattr(output, name) is output[name] is output.get(name) is cache
        assert name in output


def test_no_cache_is_none_under_both_names(micro):
    output = micro[0](torch.ones(1, 3, dtype=torch.long), use_cache=False)
    assert output.cache is None
    assert output.get("cache") is None
    assert "cache" not in output


def test_a_line_that_is_not_supported_is_named_in_one_line():
    (pinned,) = [
        Requirement(line).specifier
        for line in (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("transformers >")
    ]
    assert pinned.contains(version("transformers"))
    for installed in ("5.22.9", "5.25.0", "5.25.0.dev0", "6.0.0", "4.57.1"):
        with pytest.raises(ImportError) as caught:
            check_transformers(installed)
        message = str(caught.value)
        assert "\n" not in message
        assert f"expected transformers {pinned}, got {installed}; run `pip install" in message
    for installed in ("5.23.0", "5.23.7", "5.24.0", "5.24.0.dev0"):
        check_transformers(installed)


def test_the_check_comes_before_everything_else():
    """In a process whose Transformers says that it is of another line, and which lacks every name."""
    code = """
import importlib.metadata, sys, types
installed = importlib.metadata.version
importlib.metadata.version = lambda name: "5.99.0" if name == "transformers" else installed(name)
sys.modules["transformers"] = types.ModuleType("transformers")
import modeling_mimo
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: modeling-mimo ")
    assert "got 5.99.0" in done.stderr


def test_the_pins_are_the_first_and_the_last_line_that_is_supported():
    pins = {}
    for name in ("constraints.txt", "constraints-oldest.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        (pins[name],) = [line.removeprefix("transformers==") for line in lines if line.startswith("transformers==")]
    assert version("transformers") in pins.values()
    check_transformers(pins["constraints.txt"])
    check_transformers(pins["constraints-oldest.txt"])
    major, minor, _ = map(int, pins["constraints.txt"].split("."))
    oldest_major, oldest_minor, _ = map(int, pins["constraints-oldest.txt"].split("."))
    for beyond in (f"{major}.{minor + 1}.0", f"{oldest_major}.{oldest_minor - 1}.0"):
        with pytest.raises(ImportError):
            check_transformers(beyond)
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert all(f"| {pin} " in page for pin in pins.values())


def test_the_version_is_that_of_the_distribution(capsys):
    assert modeling_mimo.__version__ == version("modeling-mimo")
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    installed = f"transformers {version('transformers')}, torch {version('torch')}"
    assert capsys.readouterr().out == f"mimo {modeling_mimo.__version__} ({installed})\n"


def test_importing_says_nothing():
    """Each line complains at import of arguments whose docstrings it does not understand."""
    code = "import modeling_mimo, modeling_mimo.processors, modeling_mimo.modeling_mimo_v2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# names of Transformers that begin with an underscore or that no document promises, and the arguments we give them or
# override them with
PRIVATE = {
    "generation.GenerationMixin._prefill": ("input_ids", "generation_config", "model_kwargs"),
    "generation.GenerationMixin._extract_generation_mode_kwargs": ("custom_generate",),
    "generation.GenerationMixin._maybe_prepare_encoder_kwargs_for_generation": (
        "inputs_tensor",
        "model_kwargs",
        "model_input_name",
        "generation_config",
    ),
    "generation.GenerationMixin._expand_multimodal_outputs": (
        "input_ids",
        "mm_encoder_output",
        "expand_size",
        "inputs_embeds",
    ),
    "generation.GenerationMixin._prepare_cache_for_generation": (
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "generation.GenerationMixin._valid_auto_compile_criteria": ("model_kwargs", "generation_config"),
    "generation.GenerationMixin._validate_model_kwargs": ("model_kwargs",),
    "generation.GenerationMixin._sample": ("input_ids", "logits_processor", "stopping_criteria", "generation_config"),
    "modeling_utils.PreTrainedModel._load_pretrained_model": (
        "model",
        "state_dict",
        "checkpoint_files",
        "load_config",
        "expected_keys",
    ),
    "modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation": ("attn_implementation",),
    "utils.chat_template_utils._get_template_variables": ("chat_template",),
    "utils.chat_template_utils.mark_control_tokens": (),
    "utils.chat_template_utils._CONTROL_TOKEN_START": (),
    "utils.chat_template_utils._CONTROL_TOKEN_END": (),
    "cli.serving.utils.DirectStreamer": (),
    "cli.serving.model_manager.ModelManager.load_model_and_processor": ("model_id_and_revision",),
    "cli.serving.server.build_server": (
        "completion_handler",
        "response_handler",
        "transcription_handler",
        "generation_state",
    ),
}


@pytest.mark.parametrize("path", PRIVATE)
def test_private_names_of_transformers_are_where_they_were(path):
    """The culprit of the next line in one line, before anything else fails on it."""
    found, parts = transformers, path.split(".")
    for place, part in enumerate(parts):
        if inspect.ismodule(found) and not hasattr(found, part):
            __import__(f"transformers.{'.'.join(parts[: place + 1])}")
        found = getattr(found, part)
    if PRIVATE[path]:
        assert set(PRIVATE[path]) <= inspect.signature(found).parameters.keys()


def test_the_loader_still_asks_a_quantizer_by_these_names():
    quantizer = transformers.quantizers.base.HfQuantizer
    for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
        assert "model" in inspect.signature(getattr(quantizer, name)).parameters
