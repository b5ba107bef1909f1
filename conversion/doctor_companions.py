"""What can be wrong beside the weights: audio tokenizer, tokenizer, chat template, processor settings."""

from pathlib import Path
from typing import Any

from modeling_mimo.checkpoint_mimo_v2 import read_header, read_json_object
from modeling_mimo.configuration_mimo_v2 import MiMoV2Config

from .audio_tokenizer_table import (
    CONFIG_NAME,
    FOLDER,
    WEIGHTS_NAME,
    compare_audio_tokenizer,
    read_audio_tokenizer_config,
)
from .findings import DATA, Finding, Release, download


TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_VARIABLES = {"add_generation_prompt": True, "enable_thinking": False}

# two conversations that show what templates of this family disagree on: line breaks between turns, the system text,
# where thoughts go, and the placeholders of media; calls of tools are left out, V2.6 writes them otherwise
PROBES = (
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "reasoning_content": "A greeting.", "content": "Hi!"},
        {"role": "user", "content": "Again"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": "What?"}]},
    ],
)

# the largest template of the family has 9 kB
MAX_TEMPLATE = 200_000

AUDIO_WHY = "the model hears through this tokenizer: every audio or video input with sound fails without it"
WRONG_AUDIO_WHY = "codes of another tokenizer mean nothing to this model: it would hear noise, without an error"
TOKENIZER_WHY = "token ids would stand for other words than in training: fluent nonsense, without an error"


def check_audio_tokenizer_folder(folder: Path, config: MiMoV2Config, release: Release | None) -> list[Finding]:
    """`audio_tokenizer/` is there, is the one inside MiMo-V2.5, and its weights are those of its config."""
    if config.audio_config is None:
        return []
    fix = download(folder, f'--include "{FOLDER}/*"', release)
    absent = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if absent:
        return [
            Finding("error", f"{' and '.join(absent)} missing, though config.json has audio_config", AUDIO_WHY, fix)
        ]
    try:
        values = read_audio_tokenizer_config(folder)
        problems = compare_audio_tokenizer(values, read_header(folder / WEIGHTS_NAME))
    except (OSError, ValueError) as error:
        return [Finding("error", str(error), AUDIO_WHY, fix)]
    findings = [Finding("error", problem, WRONG_AUDIO_WHY, fix) for problem in problems]
    wrong = {}
    if values.get("encoder_causal") is not True:
        wrong["encoder_causal"] = (values.get("encoder_causal"), True)
    window = values.get("encoder_attn_window_size")
    if not isinstance(window, list) or len(window) != 2 or window[1] != 0:
        wrong["encoder_attn_window_size"] = (window, "[positions before, 0]")
    if values["num_quantizers"] != config.audio_config.audio_channels:
        wrong["num_quantizers"] = (values["num_quantizers"], config.audio_config.audio_channels)
    if (most := max(values["codebook_size"])) > config.audio_config.speech_zeroemb_idx:
        wrong["codebook_size"] = (most, f"at most {config.audio_config.speech_zeroemb_idx}")
    if wrong:
        shown = ", ".join(f"{key} is {str(got)[:60]}, expected {there}" for key, (got, there) in wrong.items())
        what = (
            f"{CONFIG_NAME} is not the tokenizer of this model ({shown}); is it the stand-alone MiMo-Audio-Tokenizer?"
        )
        findings.append(Finding("error", what, WRONG_AUDIO_WHY, fix))
    return findings


def check_tokenizer(folder: Path, values: dict[str, Any], release: Release | None) -> list[Finding]:
    """tokenizer.json has the tokens that config.json names, under the same ids, and no more than embedding rows."""
    path = folder / "tokenizer.json"
    fix = download(folder, "tokenizer.json tokenizer_config.json vocab.json merges.txt", release)
    if not path.is_file():
        what = "tokenizer.json missing"
        return [
            Finding("error", what, "texts cannot be turned into tokens; AutoTokenizer and AutoProcessor fail", fix)
        ]
    # imported here: they bring in all of Transformers
    from tokenizers import Tokenizer

    from .small_tokenizer import special_token_ids

    try:
        # bounded reading first: the library takes any file
        read_json_object(path)
        tokenizer = Tokenizer.from_file(str(path))
        ids = special_token_ids(tokenizer)
    except Exception as error:
        # the library raises plain Exception for a file that is no tokenizer
        return [Finding("error", f"{path.name}: {str(error)[:500]}", TOKENIZER_WHY, fix)]
    findings = []
    size, rows = tokenizer.get_vocab_size(with_added_tokens=True), values.get("vocab_size")
    if isinstance(rows, int) and max(size, max(tokenizer.get_vocab().values()) + 1) > rows:
        what = f"{path.name} has {size:,} tokens, config.json has vocab_size {rows:,}"
        findings.append(Finding("error", what, "ids past the embedding end in an index error", fix))
    processor = values.get("processor_config")
    said = {key: value for part in (processor, values) if isinstance(part, dict) for key, value in part.items()}
    wrong = [
        f"{key} is {said[key]}, the token has {there}"
        for key, there in ids.items()
        if isinstance(said.get(key), int) and said[key] != there
    ]
    if wrong:
        what = f"{path.name} is not the tokenizer that config.json was written for: {'; '.join(wrong)}"
        findings.append(Finding("error", what, TOKENIZER_WHY, fix))
    return findings


def find_template(folder: Path) -> tuple[str, str] | None:
    """(name of its file, chat template) as Transformers finds it: a file of its own wins over tokenizer_config.json.

    ValueError: tokenizer_config.json is no JSON object, or the template is too long.
    """
    text, where = None, TEMPLATE_NAME
    if (folder / TEMPLATE_NAME).is_file():
        with (folder / TEMPLATE_NAME).open("rb") as file:
            text = file.read(MAX_TEMPLATE + 1).decode("utf-8", errors="replace")
    elif (folder / "tokenizer_config.json").is_file():
        where = "tokenizer_config.json"
        text = read_json_object(folder / where).get("chat_template")
        if isinstance(text, list):
            named = [entry for entry in text if isinstance(entry, dict) and entry.get("name") == "default"]
            text = named[0].get("template") if named else None
    if not isinstance(text, str):
        return None
    if len(text) > MAX_TEMPLATE:
        raise ValueError(f"{where}: expected a chat template of at most {MAX_TEMPLATE} characters, got more.")
    return where, text


def check_template(folder: Path, release: Release | None) -> list[Finding]:
    """The chat template writes the same texts as the published one, for the conversations in PROBES."""
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = (DATA / TEMPLATE_NAME).read_text(encoding="utf-8")
    fix = download(folder, "tokenizer_config.json", release) + f", and remove {TEMPLATE_NAME} if it lies beside it"
    why = "the model is used to other texts between turns: worse answers, thoughts and tool calls in wrong places"
    try:
        found = find_template(folder)
    except ValueError as error:
        return [Finding("error", str(error), why, fix)]
    if found is None:
        what = f"no chat template in tokenizer_config.json and no {TEMPLATE_NAME}"
        return [
            Finding("warning", what, "AutoProcessor brings its own, AutoTokenizer and other engines have none", fix)
        ]
    where, text = found
    old = folder / FOLDER / TEMPLATE_NAME
    is_old = old.is_file() and old.stat().st_size <= MAX_TEMPLATE and old.read_bytes() == text.encode()
    if is_old and text != ours:
        what = f"the chat template in {where} is the older one of {FOLDER}/, which the model does not use"
        return [Finding("error", what, why, fix)]
    for number, probe in enumerate(PROBES, 1):
        expected = render_jinja_template([probe], chat_template=ours, **TEMPLATE_VARIABLES)[0][0]
        try:
            got = render_jinja_template([probe], chat_template=text, **TEMPLATE_VARIABLES)[0][0]
        except Exception as error:
            # a template is a program of somebody else, in a sandbox: it may fail in any way
            what = f"the chat template in {where} fails on an ordinary conversation: {str(error)[:200]!r}"
            return [Finding("error", what, "AutoTokenizer.apply_chat_template fails", fix)]
        if got != expected:
            place = next((at for at, pair in enumerate(zip(got, expected)) if pair[0] != pair[1]), len(expected))
            what = (
                f"the chat template in {where} is not the published one: probe {number} differs after {place} "
                f"characters, {got[place : place + 30]!r} instead of {expected[place : place + 30]!r}"
            )
            return [Finding("error", what, why, fix)]
    return []


def check_processor(folder: Path, values: dict[str, Any], release: Release | None) -> list[Finding]:
    """Media settings are those of config.json, generation settings stop where the model stops."""
    findings = []
    if values.get("vision_config") is not None and not isinstance(values.get("processor_config"), dict):
        what = "config.json has vision_config and no processor_config"
        why = "frame rates and pixel limits are only there: AutoProcessor refuses the checkpoint"
        findings.append(Finding("error", what, why, download(folder, "config.json", release)))
    stub = folder / "preprocessor_config.json"
    if stub.is_file() and isinstance(values.get("processor_config"), dict):
        try:
            said = read_json_object(stub)
        except ValueError as error:
            findings.append(Finding("warning", str(error), "other programs read it", "delete it"))
            said = {}
        limits = [("min_pixels", "image_min_pixels"), ("max_pixels", "image_max_pixels")]
        served = [(key, said[key], values["processor_config"].get(name)) for key, name in limits if key in said]
        if any(got != there for _, got, there in served):
            what = "preprocessor_config.json has pixel limits that are not those of config.json: " + ", ".join(
                f"{key} {str(got)[:20]} (config.json: {str(there)[:20]})" for key, got, there in served
            )
            why = (
                "it is the published stub; this package reads processor_config in config.json, other programs may not"
            )
            findings.append(Finding("note", what, why, "nothing to do here; elsewhere set the limits of config.json"))
    if not (folder / "generation_config.json").is_file():
        what = "generation_config.json missing"
        why = "without it generation stops at one end token alone and samples as the library likes"
        findings.append(Finding("warning", what, why, download(folder, "generation_config.json", release)))
    return findings
